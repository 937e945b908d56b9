"""Each op of a quantized decoder against its limit and against bf16: `python -m benchmarks.kernels`, `--help`.

The limit is what moving its bytes at copy bandwidth, measured in the same run, or doing its operations at the GPU's
peak takes, whichever is longer. Times come from CUDA graphs over rotated buffers.
"""

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

import torch

from benchmarks.baselines import MODELS
from benchmarks.block_cases import attention, norm_quantize, rope_store, silu_hadamard
from benchmarks.command import command_line, described, positive
from benchmarks.kernel_cases import Case, Sizes, head, linear, linears_case
from benchmarks.kernels_table import kernels
from benchmarks.results_file import RESULTS, Results, ResultsFile, Row
from benchmarks.timing import copy_bandwidth, is_cuda, launch_us

BENCHMARK = "kernels"

# each op's cases by its name, in the order of measuring
OPS: dict[str, Callable[[Sizes, argparse.Namespace], Iterator[Case]]] = {
    "linear": linear,
    "attention": attention,
    "silu_hadamard": silu_hadamard,
    "rope_store": rope_store,
    "norm_quantize": norm_quantize,
    "head": head,
}

TOKENS = (1, 8, 32, 64, 128, 256, 1024, 2048, 8192)

# dense operations per second by compute capability, NVIDIA's data sheets; elsewhere only bytes make the limit
_PEAKS = {(9, 0): {8: 1979e12, 16: 989e12}, (8, 0): {8: 624e12, 16: 312e12}, (8, 9): {8: 733e12, 16: 366e12}}


class KernelRun:
    """Measures cases and writes each row as it comes.

    Args:
        options: of the command line, see `parse`.
        command: as the results record it.
    """

    def __init__(self, options: argparse.Namespace, command: str):
        self.options, self.device = options, torch.device(options.device)
        self.began = time.monotonic()
        self.failures = 0
        self.baselines: dict[tuple, float] = {}  # paths of one op share theirs
        self.file = ResultsFile(Results.begin(BENCHMARK, command, options.device), options.output)
        self.copy_rate = copy_bandwidth(self.device)
        capability = torch.cuda.get_device_capability(self.device) if is_cuda(self.device) else None
        self.peaks = _PEAKS.get(capability, {})
        self.say(f"copy bandwidth {self.copy_rate / 1e12:.2f} TB/s; writing {self.file.path}")

    def say(self, text: str) -> None:
        """Prints with the seconds since the beginning."""
        print(f"[{time.monotonic() - self.began:6.1f}] {text}", flush=True)

    @torch.no_grad()
    def run(self, cases: Iterable[Case]) -> None:
        """Measures everything; what fails is recorded and does not stop the rest."""
        sums: dict[tuple[str, int], list[Row]] = {}
        for case in cases:
            if time.monotonic() - self.began > self.options.seconds:
                self.say(f"{case.name}: not measured, the time of --seconds {self.options.seconds} is over")
                continue
            row = self._row(case)
            try:
                row |= self._measured(case)
            except Exception as error:  # whatever it is: the other ops do not depend on it
                self.say(f"{case.name} failed:\n{traceback.format_exc(limit=-4)}")
                row["error"] = described(error)
            if is_cuda(self.device):
                torch._dynamo.reset()
                gc.collect()
                torch.cuda.empty_cache()
            self._keep(case, row)
            if case.op == "linear":
                sums.setdefault((case.path, case.shape["m"]), []).append(row)
        for (path, tokens), rows in sums.items():
            case = linears_case(path, tokens)
            if len(rows) == len(Sizes.of(MODELS[self.options.model]()).linears) and all("error" not in r for r in rows):
                row = self._row(case) | {
                    "us": sum(row["us"] for row in rows),
                    "baseline_us": sum(row["baseline_us"] for row in rows),
                    # times of the limit add up
                    "limit_fraction": sum(row["limit_fraction"] * row["us"] for row in rows)
                    / sum(row["us"] for row in rows),
                    "exact": all(row["exact"] for row in rows),
                    "note": ", ".join(dict.fromkeys(row["note"] for row in rows)),
                }
                row["speedup"] = row["baseline_us"] / row["us"]
                self._keep(case, {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})

    def _row(self, case: Case) -> Row:
        return {
            "model": self.options.model,
            "op": case.op,
            "path": case.path,
            **case.shape,
            **({"note": case.note} if case.note else {}),
            "us": None,
            "baseline_us": None,
            "speedup": None,
            "limit_fraction": None,
            "exact": None,
        }

    def _measured(self, case: Case) -> Row:
        work = case.build(self.device)
        us = launch_us(work.launches, self.device)
        work.launches.clear()
        key = (case.op, *case.shape.values())
        if key not in self.baselines and work.baseline is not None:
            self.baselines[key] = work.baseline()
        baseline_us = self.baselines.get(key)
        seconds = [case.nbytes / self.copy_rate]
        if case.operation_bits in self.peaks:
            seconds.append(case.operations / self.peaks[case.operation_bits])
        return {
            "us": round(us, 3),
            "baseline_us": None if baseline_us is None else round(baseline_us, 3),
            "speedup": None if baseline_us is None else round(baseline_us / us, 4),
            "limit_fraction": round(1e6 * max(seconds) / us, 4),
            "exact": work.exact,
        }

    def _keep(self, case: Case, row: Row) -> None:
        self.file.append(row)
        self.failures += "error" in row
        if "error" in row:
            return self.say(f"{case.name}: failed: {row['error']}")
        versus = "" if row["speedup"] is None else f", {row['speedup']:.2f}x of {row['baseline_us']:.1f} us"
        exact = {True: ", exact", False: ", NOT EXACT", None: ""}[row["exact"]]
        return self.say(f"{case.name}: {row['us']:.1f} us{versus}, {row['limit_fraction']:.0%} of the limit{exact}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=__doc__.split(": `")[0],
        epilog=f"Ops: {', '.join(OPS)}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", choices=MODELS, default="llama-3-8b")
    add("--ops", nargs="+", default=["*"], metavar="GLOB", help="only ops that match")
    add("--tokens", nargs="+", type=positive, default=list(TOKENS), help="tokens (M) of the linears")
    add("--all-paths", action="store_true", help="linears on every path that takes the shape, not the chosen one alone")
    add("--seconds", type=float, default=570, help="no op is begun later")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    add("--output", type=Path, default=RESULTS, help="folder of results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0, 1 if an op failed, 2 if nothing could be begun."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments)
    chosen = [op for op in OPS if any(fnmatch(op, pattern) for pattern in options.ops)]
    if not chosen:
        print(f"benchmarks.kernels: --ops {' '.join(options.ops)} matches none of {', '.join(OPS)}", file=sys.stderr)
        return 2
    sizes = Sizes.of(MODELS[options.model]())
    run = KernelRun(options, command_line("benchmarks.kernels", arguments))
    for op in chosen:
        run.run(OPS[op](sizes, options))
    print(f"\n{kernels([run.file.results])}", flush=True)
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
