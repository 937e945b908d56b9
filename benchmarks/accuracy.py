"""Perplexity of a model in bf16 and under each scheme: `python -m benchmarks.accuracy`, `--help` for the options.

One command makes the whole table. Settings that share a calibration share it here too: the floating-point model behind
its prefix is measured between `calibrate` and `quantize_`, the integers and their reference after.
"""

import argparse
import copy
import gc
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchao.quantization import quantize_
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import pq_ao
from benchmarks.accuracy_table import accuracy as accuracy_tables
from benchmarks.command import command_line, described, positive
from benchmarks.results_file import RESULTS, Results, ResultsFile, Row
from pq_ao.data import DATASET_NAMES, EMBEDDED, count_windows, load_text, token_ids

logger = logging.getLogger(__name__)

BENCHMARK = "accuracy"


@dataclass(frozen=True)
class Calibration:
    """Arguments of `prefixquant_config` and `calibrate` that settings differ in; the defaults are the headline's."""

    scheme: str = "w4a4kv4"
    mode: str = "static"
    prefix: bool = True
    search: str = "tensor"
    rounding: str = "nearest"


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
        calibration: None for the model as it was loaded.
        path: "integer", "reference" (both after `quantize_`) or None: floating point.
        every_seed: measured for all seeds, not the first alone.
    """

    calibration: Calibration | None = None
    path: str | None = "integer"
    every_seed: bool = False


HEADLINE = Calibration()

SETTINGS: dict[str, Setting] = {
    "bf16": Setting(None, path=None),
    "bf16-prefix": Setting(HEADLINE, path=None),
    "w4a4kv4-static": Setting(HEADLINE, every_seed=True),
    "w4a4kv4-static-reference": Setting(HEADLINE, path="reference"),
    "w4a4kv4-static-search-none": Setting(Calibration(search="none")),
    "w4a4kv4-static-search-block": Setting(Calibration(search="block")),
    "w4a4kv4-static-no-prefix": Setting(Calibration(prefix=False)),
    # scales of dynamic mode come with each token: there is nothing to search
    "w4a4kv4-dynamic": Setting(Calibration(mode="dynamic", search="none")),
    "w4a4kv4-dynamic-no-prefix": Setting(Calibration(mode="dynamic", search="none", prefix=False)),
    "w4a8kv4-static": Setting(Calibration("w4a8kv4")),
    "w8a8kv8-static": Setting(Calibration("w8a8kv8")),
    "w4a4kv16-static": Setting(Calibration("w4a4kv16")),
}

# a calibration (None: the model as it was loaded) with its seed, and the settings to measure on it, by name
Job = tuple[Calibration | None, int, dict[str, Setting]]


def jobs(patterns: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """What is to be done: the settings that match one of the glob `patterns`, by calibration and seed.

    Raises:
        ValueError: nothing matches.
    """
    chosen = {name: s for name, s in SETTINGS.items() if any(fnmatch(name, pattern) for pattern in patterns)}
    if not chosen:
        raise ValueError(f"--rows {' '.join(patterns)} matches none of the rows {', '.join(SETTINGS)}")
    found: dict[tuple[Calibration | None, int], dict[str, Setting]] = {}
    for name, setting in chosen.items():
        for seed in seeds if setting.every_seed else seeds[:1]:
            found.setdefault((setting.calibration, seed), {})[name] = setting
    return [(calibration, seed, settings) for (calibration, seed), settings in found.items()]


class AccuracyRun:
    """One model, one corpus: measures jobs and writes each row as it comes.

    Args:
        options: of the command line, see `parse`.
        command: the command as the results record it.

    Raises:
        ValueError: corpus and calibration overlap, or an argument does not fit the data.
    """

    def __init__(self, options: argparse.Namespace, command: str):
        self.options = options
        self.failures = 0
        corpus, self.calibration_text = load_text(options.corpus, "test"), load_text(options.calibration, "train")
        refuse_overlap(corpus, self.calibration_text)
        folder = model_folder(options.model)
        self.model_name = model_name(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.ids = token_ids(self.tokenizer, corpus)
        available = count_windows(self.ids, options.sequence_length)
        self.windows = available if options.windows is None else options.windows
        if not 1 <= self.windows <= available:
            raise ValueError(f"--windows {self.windows}: the corpus has 1 to {available} at this --sequence-length")
        # kept on the CPU, so that the peak of GPU memory is that of the measured model alone
        self.base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.file = ResultsFile(Results.begin(BENCHMARK, command, options.device), options.output)

    @property
    def progress(self) -> bool:
        """Bars for people, not for log files."""
        return sys.stderr.isatty()

    def run(self, todo: list[Job]) -> None:
        """Measures everything; what fails is recorded and does not stop the rest."""
        for calibration, seed, settings in tqdm(todo, desc="calibrations", unit="run", disable=not self.progress):
            model = record = None
            waiting = dict(settings)
            try:
                model = copy.deepcopy(self.base).to(self.options.device)
                if calibration is not None:
                    record = self._calibrate(model, calibration, seed)
                floating = {name: setting for name, setting in waiting.items() if setting.path is None}
                for name in floating:
                    self._measure(model, name, waiting.pop(name), seed, record)
                if waiting:
                    quantize_(model, record.config)
                for name in list(waiting):
                    self._measure(model, name, waiting.pop(name), seed, record)
            except Exception as error:  # whatever it is: the other rows, hours of work perhaps, do not depend on it
                logger.error("seed %d of %s failed", seed, ", ".join(waiting), exc_info=True)
                for name, setting in waiting.items():
                    self._keep(name, self._row(setting, seed) | {"error": described(error)})
            del model, record
            gc.collect()
            torch.cuda.empty_cache()

    def _calibrate(self, model: nn.Module, calibration: Calibration, seed: int) -> Any:
        config = pq_ao.prefixquant_config(calibration.scheme, mode=calibration.mode, prefix=calibration.prefix)
        return pq_ao.calibrate(
            model,
            self.tokenizer,
            config,
            data=[self.calibration_text],
            num_sequences=self.options.num_sequences,
            sequence_length=self.options.calibration_length,
            rounding=calibration.rounding,
            search=calibration.search,
            seed=seed,
            progress=self.progress,
        )

    def _measure(self, model: nn.Module, name: str, setting: Setting, seed: int, record: Any) -> None:
        row = self._row(setting, seed)
        if record is not None:
            row["prefix_ids"] = list(record.prefix.prefix_ids)
            row["calibration_seconds"] = round(record.seconds, 3)
        on_gpu = torch.device(self.options.device).type == "cuda"
        try:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(self.options.device)
            if setting.path == "reference":
                row["integer_ppl"] = self._perplexity(model, row["windows"]).ppl
                with pq_ao.reference_path(model):
                    result = self._perplexity(model, row["windows"])
            else:
                result = self._perplexity(model, row["windows"])
            row["ppl"], row["evaluation_seconds"] = result.ppl, round(result.seconds, 3)
            if on_gpu:
                row["peak_gib"] = round(torch.cuda.max_memory_allocated(self.options.device) / 2**30, 3)
        except Exception as error:  # as in `run`: the same model may still serve the next row
            logger.error("%s, seed %d, failed", name, seed, exc_info=True)
            row["error"] = described(error)
        self._keep(name, row)

    def _perplexity(self, model: nn.Module, windows: int) -> Any:
        return pq_ao.perplexity(
            model,
            self.tokenizer,
            self.ids,
            sequence_length=self.options.sequence_length,
            windows=windows,
            batch_size=self.options.batch_size,
            progress=self.progress,
        )

    def _row(self, setting: Setting, seed: int) -> Row:
        """What is known of a row before it is measured; None where a key does not apply."""
        options, calibration = self.options, setting.calibration
        floating = setting.path is None
        windows = self.windows
        if setting.path == "reference":
            windows = min(windows, options.reference_windows)
        row: Row = {
            "model": self.model_name,
            "scheme": "bf16" if floating else calibration.scheme,
            "mode": "none" if floating else calibration.mode,
            "path": setting.path,
            "prefix": calibration is not None and calibration.prefix,
            "rotation": calibration is not None,
            "search": None if floating else calibration.search,
            "rounding": None if floating else calibration.rounding,
            "finetuned": False,
            "corpus": text_name(options.corpus),
            "seqlen": options.sequence_length,
            "windows": windows,
            "ppl": None,
            "seed": None if calibration is None else seed,
            "calibration_corpus": None,
            "calibration_sequences": None,
            "calibration_length": None,
            "prefix_ids": [],
            "calibration_seconds": None,
            "evaluation_seconds": None,
            "peak_gib": None,
        }
        if calibration is not None:
            row["calibration_corpus"] = text_name(options.calibration)
            row["calibration_sequences"] = options.num_sequences
            row["calibration_length"] = options.calibration_length
        return row

    def _keep(self, name: str, row: Row) -> None:
        self.file.append(row)
        self.failures += "error" in row
        if "error" in row:
            outcome = f"failed: {row['error']}"
        elif "integer_ppl" in row:
            outcome = f"{row['ppl']:.4f} (integers {row['integer_ppl']:.4f}) on {row['windows']} windows"
        else:
            outcome = f"{row['ppl']:.4f}"
        seed = "" if row["seed"] is None else f", seed {row['seed']}"
        tqdm.write(f"{name}{seed}: {outcome}", file=sys.stdout)
        sys.stdout.flush()  # so that an interrupted run's log is whole


def refuse_overlap(corpus: str, calibration: str) -> None:
    """ValueError where one text holds the other: a model calibrated on its test text gives a number too good."""
    small, large = sorted((corpus.strip(), calibration.strip()), key=len)
    if small in large:
        raise ValueError("--calibration holds the text that --corpus is measured on, or part of it; give another text.")


def model_folder(model: str | None) -> Path | str:
    """The folder or hub id to load from; SmolLM2-135M-Instruct where none is named."""
    if model is not None:
        return Path(model) if Path(model).is_dir() else model
    from recipes.smollm2 import smollm2_folder

    return smollm2_folder()


def model_name(folder: Path | str) -> str:
    """Hub id, or what `source.json` of a folder of ours says it is, or the folder's name."""
    if isinstance(folder, str):
        return folder
    source = folder / "source.json"
    if source.is_file():
        facts = json.loads(source.read_text(encoding="utf-8"))
        name = facts.get("hub_id") or Path(facts.get("file", "")).stem
        if name:
            return name
    return folder.resolve().name


def text_name(source: str) -> str:
    """Name of a corpus, a file's without its folder."""
    return source if source in (EMBEDDED, *DATASET_NAMES) else Path(source).name


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description=__doc__.split(": `")[0],
        epilog=f"Rows: {', '.join(SETTINGS)}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="folder or hub id; where not given, the SmolLM2-135M-Instruct of recipes/smollm2.py")
    add("--corpus", default="wikitext2", help="name (its test part) or file to measure on")
    add("--calibration", default="wikitext2", help="name (its training part) or file to calibrate on")
    add("--sequence-length", type=positive, default=2048, help="tokens a window")
    add("--windows", type=positive, help="measure the first so many only; all where not given")
    add("--reference-windows", type=positive, default=4, help="windows of the row on the reference path")
    add("--num-sequences", type=positive, default=16, help="calibration sequences")
    add("--calibration-length", type=positive, default=2048, help="tokens of a calibration sequence")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="all for the headline, the first for the other rows")
    add("--batch-size", type=positive, default=4, help="windows at a time")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    add("--rows", nargs="+", default=["*"], metavar="GLOB", help="only rows whose name matches")
    add("--output", type=Path, default=RESULTS, help="folder of results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0, 1 if a row failed, 2 if nothing could be begun."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments)
    logging.basicConfig(level=logging.WARNING)
    try:
        todo = jobs(options.rows, options.seeds)  # first: a wrong pattern should not cost loading a model
        run = AccuracyRun(options, command_line("benchmarks.accuracy", arguments))
    except ValueError as error:
        print(f"benchmarks.accuracy: {error}", file=sys.stderr)
        return 2
    print(f"{run.model_name}: {run.windows} windows of {options.sequence_length} tokens; writing {run.file.path}")
    run.run(todo)
    print(f"\n{accuracy_tables([run.file.results])}")
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
