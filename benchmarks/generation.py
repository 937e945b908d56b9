"""Prefill and decode of an 8B decoder, ours against bf16 and torchao: `python -m benchmarks.generation`, `--help`.

Weights are random, and the same driver times every system: a step compiled as one graph, on a static cache. A group of
rows is one phase at one batch and context; its baseline, compiled bf16, is measured in the same process, first. Decode
is timed on a cache whose slots were filled at once, without the prefill of its context.
"""

import argparse
import contextlib
import gc
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch

from benchmarks.baselines import MODELS, AttentionChoice, best_attention, inductor_settings
from benchmarks.command import command_line, described
from benchmarks.generation_table import generation
from benchmarks.kernel_profile import KernelTime, kernel_times, kernels_per_layer, print_profile, split_ms
from benchmarks.results_file import RESULTS, Results, ResultsFile, Row
from benchmarks.systems import BASELINE, MODES, SYSTEMS, Loaded, Settings, Shape, System, compiled_step, step_bytes
from benchmarks.timing import call_ms, copy_bandwidth, is_cuda, step_ms

BENCHMARK = "generation"

SHAPES = tuple(
    [Shape("decode", batch, context) for batch, context in ((1, 1024), (1, 8192), (8, 2048), (32, 8192), (128, 2048))]
    + [Shape("prefill", batch, 2048) for batch in (1, 4, 16)]
)

# where keys and values are most of the bytes, a baseline that does not come near the bandwidth proves nothing
LEAST_BANDWIDTH = {Shape("decode", 32, 8192): 0.6}

_LEAD = 2  # untimed steps ahead of the timed ones


def shapes_of(patterns: Sequence[str]) -> list[Shape]:
    """The default shapes that match a glob, and others by their name, such as "decode-4x512".

    Raises:
        ValueError: a pattern is neither.
    """
    found: dict[Shape, None] = {}
    for pattern in patterns:
        named = re.fullmatch(r"(decode|prefill)-(\d+)x(\d+)(k?)", pattern)
        if named:
            phase, batch, context, kilo = named.groups()
            found[Shape(phase, int(batch), int(context) * (1024 if kilo else 1))] = None
            continue
        matching = [shape for shape in SHAPES if fnmatch(str(shape), pattern)]
        if not matching:
            raise ValueError(f"--rows {pattern} matches none of {', '.join(map(str, SHAPES))}, and is no shape's name")
        found |= dict.fromkeys(matching)
    return list(found)


def systems_of(patterns: Sequence[str]) -> list[System]:
    """The systems whose label matches one of the globs, in their order.

    Raises:
        ValueError: nothing matches.
    """
    found = [system for system in SYSTEMS if any(fnmatch(system.label, pattern) for pattern in patterns)]
    if not found:
        labels = ", ".join(system.label for system in SYSTEMS)
        raise ValueError(f"--systems {' '.join(patterns)} matches none of {labels}")
    return found


@dataclass
class Measurement:
    """One system at one shape and number of layers.

    Attributes:
        mode: the fastest of the modes tried.
        compile_seconds: of that mode, warm-up included.
        kernels: of one step; empty on a CPU.
    """

    ms: float
    mode: str
    compile_seconds: float
    peak_gib: float | None
    kernels: list[KernelTime]


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises TimeoutError inside the context when it takes longer; 0 for no limit. Main thread only."""

    def stop(*_) -> None:
        raise TimeoutError(f"longer than {seconds} s, compilation included")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class GenerationRun:
    """Measures groups of rows and writes each row as it comes.

    Args:
        options: of the command line, see `parse`.
        command: as the results record it.
    """

    def __init__(self, options: argparse.Namespace, command: str):
        self.options, self.device = options, torch.device(options.device)
        self.began = time.monotonic()
        self.failures = 0
        self.file = ResultsFile(Results.begin(BENCHMARK, command, options.device), options.output)
        self.copy_rate = copy_bandwidth(self.device)
        self.say(f"copy bandwidth {self.copy_rate / 1e12:.2f} TB/s; writing {self.file.path}")

    def say(self, text: str) -> None:
        """Prints with the seconds since the beginning."""
        print(f"[{time.monotonic() - self.began:6.1f}] {text}", flush=True)

    @torch.no_grad()
    def run(self, shapes: Sequence[Shape], systems: Sequence[System]) -> None:
        """Measures everything; what fails is recorded and does not stop the rest."""
        for shape in shapes:
            self.say(str(shape))
            config = MODELS[self.options.model]()
            attention = best_attention(
                config.num_attention_heads,
                config.num_key_value_heads,
                config.head_dim,
                shape.batch,
                shape.context,
                shape.phase == "decode",
                self.device,
            )
            baseline: Row | None = None
            for system in systems:
                if shape.phase not in system.phases:
                    continue
                if time.monotonic() - self.began > self.options.seconds:
                    self.say(f"{system.label}: not measured, the time of --seconds {self.options.seconds} is over")
                    continue
                row = self._row(system, shape)
                try:
                    with time_limit(self.options.system_seconds), inductor_settings():
                        row |= self._measured(system, shape, attention)
                except Exception as error:  # whatever it is: the other systems do not depend on it
                    self.say(f"{system.label} failed:\n{traceback.format_exc(limit=-4)}")
                    row["error"] = described(error)
                self._free()
                if system.name == BASELINE:
                    baseline = row
                self._keep(system, row, baseline)

    def _row(self, system: System, shape: Shape) -> Row:
        options = self.options
        return {
            "model": options.model,
            "system": system.name,
            "head": system.head,
            "phase": shape.phase,
            "batch": shape.batch,
            "context": shape.context,
            "layers": options.layers,
            "model_layers": MODELS[options.model]().num_hidden_layers,
            "extrapolated": options.extrapolate,
            "ms": None,
            "tokens_per_s": None,
            "speedup": None,
            "counts": True,
            "peak_gib": None,
            "bandwidth_fraction": None,
            "kernels_per_layer": None,
            "copy_tb_per_s": round(self.copy_rate / 1e12, 3),
        }

    def _measured(self, system: System, shape: Shape, attention: AttentionChoice) -> Row:
        layers = self.options.layers
        measured = self._measure(system, shape, attention, layers)
        ms, depth, peak = measured.ms, layers, measured.peak_gib
        if self.options.extrapolate:
            # what a layer takes is the difference to half of the layers; what stands outside of them stays
            self._free()
            half = self._measure(system, shape, attention, layers // 2)
            depth, peak = MODELS[self.options.model]().num_hidden_layers, None
            ms += (depth - layers) * (measured.ms - half.ms) / (layers - layers // 2)
        row = {
            "ms": round(ms, 4),
            "tokens_per_s": round(1e3 * shape.batch * (shape.context if shape.phase == "prefill" else 1) / ms, 2),
            "peak_gib": peak,
            "kernels_per_layer": kernels_per_layer(measured.kernels, layers),
            "compile_mode": measured.mode,
            "compile_seconds": round(measured.compile_seconds, 1),
            "split_ms": {name: round(value, 4) for name, value in split_ms(measured.kernels).items()},
        }
        if not system.name.startswith("pq_ao"):
            row["attention"] = attention.name
        if system.name == BASELINE:
            row["fused"] = self.options.fuse_baseline
        if shape.phase == "decode":
            moved = step_bytes(MODELS[self.options.model](depth), system, shape.batch, shape.context)
            row["bandwidth_fraction"] = round(moved / (1e-3 * ms) / self.copy_rate, 4)
        return row

    def _measure(self, system: System, shape: Shape, attention: AttentionChoice, layers: int) -> Measurement:
        options = self.options
        begin = time.monotonic()
        config = MODELS[options.model](layers)
        settings = Settings(options.peer_settings == "recommended", options.fuse_baseline)
        loaded = system.build(config, shape, self.device, attention, settings)
        loaded.fill()
        self.say(f"  {system.label}: {layers} layers built in {time.monotonic() - begin:.1f} s")
        modes = list(options.modes) if system.compiled else ["eager"]
        if system.name == BASELINE:
            modes = list(dict.fromkeys([*modes, *options.baseline_modes]))
        best: Measurement | None = None
        with loaded.active:
            for mode in modes:
                try:
                    found = self._measure_mode(loaded, shape, mode, config.vocab_size)
                except Exception as error:
                    over = mode == modes[-1] or isinstance(error, TimeoutError)
                    if best is None and over:
                        raise
                    self.say(f"  {system.label}, {mode}: {described(error)}")
                    if over:
                        break
                    continue
                finally:
                    torch._dynamo.reset()  # its CUDA graphs hold memory
                self.say(f"  {system.label}, {mode}: {found.ms:.3f} ms, compiled in {found.compile_seconds:.0f} s")
                if best is None or found.ms < best.ms:
                    best = found
        if options.profile:
            print_profile(best.kernels)
        return best

    def _measure_mode(self, loaded: Loaded, shape: Shape, mode: str, vocabulary: int) -> Measurement:
        options, device = self.options, self.device
        decode = shape.phase == "decode"
        length = shape.context - options.steps - _LEAD if decode else 0
        ids = torch.randint(vocabulary, (shape.batch, 1 if decode else shape.context), device=device)
        begin = time.monotonic()
        step = compiled_step(loaded, ids, mode, options.backend, length)
        seconds = time.monotonic() - begin

        def back() -> None:
            loaded.set_length(length)

        if decode:
            ms = step_ms(step, device, options.steps, options.repeats, back, _LEAD)
        else:
            ms = call_ms(step, device, options.repeats, back)
        peak = round(torch.cuda.max_memory_allocated(device) / 2**30, 3) if is_cuda(device) else None
        back()
        if not torch.isfinite(step()).all():
            raise FloatingPointError("logits are not finite")

        return Measurement(ms, mode, seconds, peak, kernel_times(step, device, back))

    def _free(self) -> None:
        torch._dynamo.reset()
        gc.collect()
        if is_cuda(self.device):
            torch.cuda.empty_cache()
            left = torch.cuda.memory_allocated(self.device) / 2**30
            if left > 1:
                self.say(f"  {left:.1f} GiB are still allocated and would count in the next peak")

    def _keep(self, system: System, row: Row, baseline: Row | None) -> None:
        if baseline is not None and baseline.get("ms") and row.get("ms"):
            row["speedup"] = round(baseline["ms"] / row["ms"], 4)
            least = LEAST_BANDWIDTH.get(Shape(row["phase"], row["batch"], row["context"]), 0.0)
            row["counts"] = (baseline["bandwidth_fraction"] or 0.0) >= least
        self.file.append(row)
        self.failures += "error" in row
        if "error" in row:
            return self.say(f"{system.label}: failed: {row['error']}")
        facts = [f"{row['ms']:.3f} ms", f"{row['tokens_per_s']:,.0f} tokens/s"]
        facts += [f"{row['speedup']:.2f}x"] if row["speedup"] else []
        facts += [f"{row['bandwidth_fraction']:.0%} of bandwidth"] if row["bandwidth_fraction"] else []
        facts += [f"{row['peak_gib']:.1f} GiB"] if row["peak_gib"] else []
        facts += [f"{row['kernels_per_layer']} kernels a layer"] if row["kernels_per_layer"] else []
        facts += [", ".join(f"{name} {value:.3f} ms" for name, value in row["split_ms"].items())]
        self.say(f"{system.label}: {'; '.join(filter(None, facts))}{'' if row['counts'] else '; DOES NOT COUNT'}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    choices = {"Rows": map(str, SHAPES), "Systems": [system.label for system in SYSTEMS], "Modes": MODES}
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation",
        description=__doc__.split(": `")[0],
        epilog="; ".join(f"{kind}: {', '.join(names)}" for kind, names in choices.items()),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("--model", choices=MODELS, default="llama-3-8b")
    add("--rows", nargs="+", default=["*"], metavar="GLOB", help="groups of rows, or others by name: decode-4x512")
    add("--systems", nargs="+", default=["*"], metavar="GLOB", help="only systems that match; keep the baseline in")
    add("--layers", type=int, help="decoder layers; the model's own number where not given")
    add("--extrapolate", action="store_true", help="measure --layers and half as many; ms is for the model's number")
    add(
        "--modes",
        nargs="+",
        choices=MODES,
        metavar="MODE",
        default=["default+graph"],
        help="of compiling; the fastest one counts",
    )
    baseline_help = "further modes for the baseline; max-autotune+graph takes minutes"
    add("--baseline-modes", nargs="*", choices=MODES, metavar="MODE", default=["reduce-overhead"], help=baseline_help)
    add("--fuse-baseline", action="store_true", help="one linear for q, k, v and one for gate, up in the baseline too")
    add("--backend", default="inductor", help="of torch.compile; eager where there is no compiler")
    add("--peer-settings", choices=("recommended", "plain"), default="recommended", help="Inductor options of torchao")
    add("--steps", type=int, default=8, help="decode steps between two events")
    add("--repeats", type=int, default=7, help="the median of so many counts")
    add("--seconds", type=float, default=480, help="no system is begun later")
    add("--system-seconds", type=int, default=0, help="give a system up after so long; 0: never")
    add("--profile", action="store_true", help="print the kernels of one call")
    add("--device", default="cuda" if cuda else "cpu", help="torch device")
    add("--output", type=Path, default=RESULTS, help="folder of results")
    options = parser.parse_args(arguments)
    depth = MODELS[options.model]().num_hidden_layers
    options.layers = options.layers or depth
    if options.layers < 1 or (options.extrapolate and not 2 <= options.layers < depth):
        parser.error(f"--layers {options.layers}: at least 1; with --extrapolate 2 to {depth - 1}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0, 1 if a row failed, 2 if nothing could be begun."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments)
    try:
        shapes, systems = shapes_of(options.rows), systems_of(options.systems)
        for shape in shapes:
            if shape.phase == "decode" and shape.context < options.steps + _LEAD:
                raise ValueError(f"--rows {shape}: the context is shorter than --steps {options.steps} and the lead")
    except ValueError as error:
        print(f"benchmarks.generation: {error}", file=sys.stderr)
        return 2
    run = GenerationRun(options, command_line("benchmarks.generation", arguments))
    run.run(shapes, systems)
    print(f"\n{generation([run.file.results])}", flush=True)
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
