"""Round trips of a real model: saved and run in every way, compared bit by bit; `python -m benchmarks.round_trips`.

A cell is one way to save and one way to run. It holds if the model that comes back has every integer and scale of the
one that was saved, and greedy decoding gives the same logits at every step and the same codes in the cache as the
original does on that way, and as eager does; Inductor is told to round and to divide as eager does. On a GPU, the
decode of an exported program is timed against the model's in the same process, and perplexity is compared with the
CPU's. Beside the cells stands what the folder costs: its bytes, and time and memory of loading.
"""

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torchao.quantization import quantize_
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import pq_ao
from benchmarks.command import command_line, described, positive
from benchmarks.devices import compare_devices
from benchmarks.loading import cost_of_loading
from benchmarks.model_source import model_folder, model_name
from benchmarks.results_file import RESULTS, Results, ResultsFile, Row
from benchmarks.timing import step_ms
from benchmarks.ways import SAVES, WAYS, Outcome, Runner, integers_of, reloaded
from pq_ao.checkpoint.config import QUANT_METHOD
from pq_ao.data import load_text, token_ids
from pq_ao.exported import load_exported
from recipes.models import quantized_by
from recipes.terminal import columns

BENCHMARK = "round_trips"

PARTS = ("cells", "decode", "devices")
_ORIGINAL = "original"
_LEAD = 4  # untimed steps: they compile and record


class CompiledStep:
    """The model's own decode step, compiled by `torch.compile` alone, behind the calls of an engine.

    Args:
        model: quantized.
        batch_size, max_cache_len: of the cache.
        compile_options: of `torch.compile`.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int, max_cache_len: int, compile_options: dict[str, Any]):
        self.model, self.cache = model, pq_ao.PrefixStaticCache(model, batch_size, max_cache_len)
        self.decode = torch.compile(self._step, fullgraph=True, dynamic=False, **compile_options)

    def _step(self, token: Tensor) -> Tensor:
        return self.prefill(token[:, None])

    def prefill(self, ids: Tensor) -> Tensor:
        """[B, L] ids to the next ones [B]."""
        logits = self.model(ids.to(self.model.device), past_key_values=self.cache, logits_to_keep=1).logits
        return logits[:, -1].argmax(dim=-1)

    def reset(self) -> None:
        """Empties the cache."""
        self.cache.reset()


class RoundTrips:
    """Runs all cells and writes each row as it comes.

    Args:
        model: quantized.
        options: of the command line, see `parse`.
        file: of the results.
        folder: for what is saved; emptied by nobody here.
    """

    def __init__(self, model: PreTrainedModel, options: argparse.Namespace, file: ResultsFile, folder: Path):
        self.model, self.options, self.file, self.folder = model, options, file, folder
        self.name = model_name(model_folder(options.model))
        self.runner = Runner(folder, 1, options.prompt_tokens + options.new_tokens)
        generator = torch.Generator().manual_seed(options.seed)
        self.ids = torch.randint(model.config.vocab_size, (1, options.prompt_tokens), generator=generator)
        self.failures = 0
        self.began = time.monotonic()

    def run(self) -> None:
        """The parts that were asked for."""
        if "cells" in self.options.parts:
            self._cells()
        if "decode" in self.options.parts:
            self._decode()
        if "devices" in self.options.parts:
            self._devices()

    def _cells(self) -> None:
        """All cells, and what the folders cost."""
        originals = dict(self._originals())
        known = integers_of(self.model)
        for save in self.options.saves:
            folder = self.folder / save
            loaded = reloaded(self.model, save, folder)
            integers = integers_of(loaded) == known
            for way, original in originals.items():
                self._cell(way, save, loaded, originals["eager"], original, integers)
            if save != "state_dict":
                self._keep({"what": "folder", "save": save, **cost_of_loading(folder, self.options.device)})
            del loaded
            gc.collect()

    def _originals(self) -> Iterator[tuple[str, Outcome]]:
        """The model that was never saved, on every way; eager first, which the others are compared with."""
        eager = None
        for way in sorted({"eager", *self.options.ways}, key=WAYS.index):
            outcome = self._cell(way, _ORIGINAL, self.model, eager, None, True)
            eager = eager or outcome
            if outcome is not None:
                yield way, outcome

    def _cell(
        self,
        way: str,
        save: str,
        model: PreTrainedModel,
        eager: Outcome | None,
        original: Outcome | None,
        integers: bool,
    ) -> Outcome | None:
        begun = time.monotonic()
        row: Row = {"what": "cell", "way": way, "save": save, "integers": integers, "steps": self.options.new_tokens}
        outcome = None
        try:
            outcome = self.runner.run(way, model, self.ids, self.options.new_tokens)
        except Exception as error:  # the other cells do not depend on it
            row["error"] = described(error)
        else:
            eager, original = eager or outcome, original or outcome
            row |= {
                "steps_as_original": outcome.equal_steps(original),
                "cache_as_original": outcome.same_cache(original),
                "steps_as_eager": outcome.equal_steps(eager),
                "tokens_as_eager": outcome.equal_tokens(eager),
                "cache_as_eager": outcome.same_cache(eager),
                "prefill_db": outcome.prefill_sqnr(eager),
            }
        row["holds"] = "error" not in row and integers and _holds(row)
        self.failures += not row["holds"]
        self._keep(row | {"seconds": round(time.monotonic() - begun, 1)})
        return outcome

    @torch.no_grad()
    def _decode(self) -> None:
        """Times the exported program as a CUDA graph, against the model on the same way.

        By our recording that is the engine, by Inductor's the model's own step, compiled in the same mode.
        """
        length = self.options.prompt_tokens + self.options.new_tokens
        folder = self.folder / "timed"
        pq_ao.export_decoder(self.model, 1, length).save(folder)
        inductors = {"mode": "reduce-overhead"}
        ways = (
            ("our recording", pq_ao.recommended_compile_options(self.model.device), pq_ao.GenerationEngine),
            ("reduce-overhead", inductors, partial(CompiledStep, compile_options=inductors)),
        )
        for by, options, way in ways:
            skipped = counters["inductor"]["cudagraph_skips"]
            model_ms = self._decode_ms(way(self.model, 1, length))
            exported_ms = self._decode_ms(load_exported(folder, compile_options=options))
            row = {"what": "decode", "by": by, "exported_ms": exported_ms, "model_ms": model_ms}
            skips = counters["inductor"]["cudagraph_skips"] - skipped  # other than 0: one ran without
            self._keep(row | {"ratio": exported_ms / model_ms, "context": length, "cudagraph_skips": skips})

    def _devices(self) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model_folder(self.options.model))
        ids = token_ids(tokenizer, load_text(self.options.corpus, "test"))
        devices = (self.options.device, "cpu")
        self._keep(compare_devices(self.model, ids, devices, self.options.windows, self.options.window_length))

    def _decode_ms(self, decoder: "pq_ao.ExportedDecoder | pq_ao.GenerationEngine | CompiledStep") -> float:
        token = torch.zeros(1, dtype=torch.int64, device=self.model.device)

        def begin() -> None:
            decoder.reset()
            decoder.prefill(self.ids)

        steps = self.options.new_tokens - _LEAD
        return step_ms(lambda: decoder.decode(token), self.model.device, steps, self.options.repeats, begin, _LEAD)

    def _keep(self, row: Row) -> None:
        self.file.append({"model": self.name, **row})
        print(f"[{time.monotonic() - self.began:6.1f}] {_line(row)}", flush=True)


def _holds(row: Row) -> bool:
    places = ("original", "eager")
    return all(row[f"cache_as_{place}"] and row[f"steps_as_{place}"] == row["steps"] for place in places)


def _line(row: Row) -> str:
    if row["what"] == "folder":
        copies = f"floating-point copies of {row['float_copies']} elements" if row["float_copies"] else "no copy"
        return (
            f"{row['save']}: {row['quantized_bytes']:,} bytes, {row['ratio']:.3f} of bf16; loaded in "
            f"{row['load_seconds']} s, peak {row['peak_mib']:,} MiB for a model of {row['model_mib']:,} MiB; {copies}"
        )
    if row["what"] == "decode":
        return (
            f"decode, CUDA graph by {row['by']}: exported {row['exported_ms']:.3f} ms a token, model "
            f"{row['model_ms']:.3f} ms; ratio {row['ratio']:.3f}"
        )
    if row["what"] == "devices":
        return (
            f"perplexity of {row['windows']} windows: {row['ppl'][0]:.4f} on {row['devices'][0]}, {row['ppl'][1]:.4f} "
            f"on {row['devices'][1]}; ratio {row['ratio']:.5f}, standard error {row['standard_error']:.5f}"
        )
    cell = f"{row['way']} x {row['save']}"
    if "error" in row:
        return f"{cell}: failed: {row['error']}"
    same = row["steps_as_eager"] == row["steps"]
    eager = "" if same else f"; {row['tokens_as_eager']} tokens as eager, prefill {row['prefill_db']} dB"
    return f"{cell}: {'holds' if row['holds'] else 'DIFFERS'}, {row['seconds']} s{eager}"


def table(rows: Sequence[Row]) -> str:
    """The cells, ways down and saves across: steps as the original on that way, as eager; "!" where it must be all."""
    saves = list(dict.fromkeys(row["save"] for row in rows))
    found = {(row["way"], row["save"]): _verdict(row) for row in rows}
    ways = list(dict.fromkeys(row["way"] for row in rows))
    return columns([("", *saves), *((way, *(found.get((way, save), "-") for save in saves)) for way in ways)])


def _verdict(row: Row) -> str:
    if "error" in row:
        return "failed"
    return f"{row['steps_as_original']}, {row['steps_as_eager']} of {row['steps']}{'' if row['holds'] else ' !'}"


def load(options: argparse.Namespace) -> PreTrainedModel:
    """The quantized model: a checkpoint of ours, or another model, calibrated briefly."""
    folder = model_folder(options.model)
    if isinstance(folder, Path) and quantized_by(folder) == QUANT_METHOD:
        return AutoModelForCausalLM.from_pretrained(folder, device_map=options.device)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=options.device)
    config = pq_ao.prefixquant_config()
    pq_ao.calibrate(
        model,
        AutoTokenizer.from_pretrained(folder),
        config,
        num_sequences=options.num_sequences,
        sequence_length=options.sequence_length,
        progress=sys.stderr.isatty(),
    )
    quantize_(model, config)
    return model


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.round_trips",
        description=__doc__.split("; `")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, on_gpu = parser.add_argument, torch.cuda.is_available()
    ways = [way for way in WAYS if way != "aoti" or not on_gpu]
    add("--model", help="a checkpoint, or a model to calibrate briefly; SmolLM2-135M-Instruct by default")
    add("--device", default="cuda" if on_gpu else "cpu")
    add(
        "--parts",
        nargs="+",
        choices=PARTS,
        help="all by default; decode, which is timed, and devices, which compares a GPU with the CPU, are for GPUs",
    )
    add("--saves", nargs="+", choices=SAVES, default=list(SAVES))
    add("--ways", nargs="+", choices=WAYS, default=ways, help="aoti is for CPUs")
    add("--prompt-tokens", type=positive, default=24, help="drawn at random")
    add("--seed", type=int, default=0, help="of the prompt")
    add("--new-tokens", type=positive, default=128, help="steps that are compared and timed")
    add("--num-sequences", type=positive, default=8, help="of a brief calibration")
    add("--sequence-length", type=positive, default=128)
    add("--repeats", type=positive, default=7, help="of the timed decode")
    add("--corpus", default="wikitext2", help="of the comparison of devices: a file or a name, its test part")
    add("--windows", type=positive, default=40, help="of that comparison")
    add("--window-length", type=positive, default=2048)
    add("--output", default=str(RESULTS), help="folder of the results")
    options = parser.parse_args(arguments)
    known = PARTS if options.device.startswith("cuda") else PARTS[:1]
    options.parts = options.parts or known
    if not set(options.parts) <= set(known):
        parser.error(f"--parts decode, devices: need a GPU; leave them out with --device {options.device}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0, or 1 if a cell does not hold."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments)
    results = Results.begin(BENCHMARK, command_line("benchmarks.round_trips", arguments), options.device)
    model = load(options)
    with tempfile.TemporaryDirectory() as folder:
        run = RoundTrips(model, options, ResultsFile(results, options.output), Path(folder))
        run.run()
    if cells := [row for row in results.rows if row["what"] == "cell"]:
        print(f"\n{table(cells)}")
    print(f"\nwritten to {run.file.path}", flush=True)
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
