"""Perplexity and task accuracy of a model in bf16 and under each scheme: `python -m benchmarks.accuracy --help`.

One command makes the whole table. With --resume it can be stopped at any point: the same command goes on, calibrations
behind their last finished block, and ends in one results file.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.accuracy_run import AccuracyRun
from benchmarks.accuracy_settings import SETTINGS, Job, jobs, longest_first
from benchmarks.accuracy_table import accuracy as accuracy_tables
from benchmarks.accuracy_workers import rows_of
from benchmarks.command import command_line, positive
from benchmarks.results_file import RESULTS, Results, ResultsFile
from benchmarks.run_lock import run_lock
from pq_ao.finetune import FinetuneConfig

BENCHMARK = "accuracy"


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
    add("--rows", nargs="+", default=["*"], metavar="GLOB", help="only rows whose name matches")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="rows take the first 3, 2 (the headline) or 1 of them")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    add("--output", type=Path, default=RESULTS, help="folder of results")
    add("--processes", type=positive, default=1, help="calibrations at a time, spread over the GPUs; each takes longer")
    add("--resume", type=Path, metavar="FOLDER", help="keep what is finished here and go on after an interruption")
    group = parser.add_argument_group("perplexity")
    add = group.add_argument
    add("--corpus", default="wikitext2", help="name (its test part) or file to measure on")
    add("--sequence-length", type=positive, default=2048, help="tokens a window")
    add("--windows", type=positive, help="measure the first so many only; all where not given")
    add("--long-context", type=positive, nargs="?", const=8192, metavar="TOKENS", help="windows of 8192 tokens as well")
    add(
        "--long-context-rows",
        nargs="+",
        default=["bf16", "*-tuned", "*-end-to-end"],
        metavar="GLOB",
        help="rows to measure on those windows",
    )
    add("--reference-windows", type=positive, default=4, help="windows of the row on the reference path")
    add("--batch-size", type=positive, default=4, help="windows at a time")
    group = parser.add_argument_group("tasks")
    add = group.add_argument
    add("--tasks", type=Path, metavar="FOLDER", help="measure five tasks, from jsonl files (pq_ao.tasks.records)")
    add(
        "--task-rows", nargs="+", default=["bf16", "bf16-prefix", "*-tuned"], metavar="GLOB", help="rows to do that for"
    )
    add("--task-batch-size", type=positive, default=32, help="requests at a time")
    group = parser.add_argument_group("calibration")
    add = group.add_argument
    add("--calibration", nargs="+", default=["wikitext2"], help="names (training part) or files, one text in the end")
    add("--num-sequences", type=positive, default=16, help="calibration sequences")
    add("--calibration-length", type=positive, default=2048, help="tokens of a calibration sequence")
    add("--prefix-ids", nargs="+", type=int, metavar="ID", help="the prefix, where rows have one, not the rule's")
    group = parser.add_argument_group("fine-tuning", "Rows with it use these sequences for the whole calibration.")
    add, default = group.add_argument, FinetuneConfig()
    add("--finetune-sequences", type=positive, default=64, help="calibration sequences")
    add("--finetune-length", type=positive, default=2048, help="tokens of a sequence")
    add(
        "--validation-sequences",
        type=positive,
        default=default.validation_sequences,
        help="further ones to validate on",
    )
    add("--epochs", type=positive, default=default.epochs, help="passes over the sequences")
    add("--batch-size-training", type=positive, default=default.batch_size, help="sequences a step")
    add("--learning-rate", type=float, default=default.learning_rate, help="of scales, clip factors and biases")
    add("--weight-learning-rate", type=float, default=default.weight_learning_rate, help="of weights")
    add("--end-to-end-epochs", type=positive, default=3, help="passes over all blocks together, in rows *-end-to-end")
    add("--end-to-end-rate", type=float, default=default.end_to_end_rate, help="learning rate there")
    add("--end-to-end-weight-rate", type=float, default=default.end_to_end_weight_rate, help="of weights, there")
    add("--end-to-end-prefix-rate", type=float, default=default.end_to_end_prefix_rate, help="of the prefix, there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0, 1 if a row failed, 2 if nothing could be begun."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments)
    logging.basicConfig(level=logging.WARNING)
    with ExitStack() as stack:
        try:
            todo = jobs(options.rows, options.seeds)  # first: a wrong pattern should not cost loading a model
            if options.resume is not None:
                stack.enter_context(run_lock(options.resume))
            results = Results.begin(BENCHMARK, command_line("benchmarks.accuracy", arguments), options.device)
            file = (ResultsFile if options.resume is None else ResultsFile.go_on)(results, options.output)
            run = AccuracyRun(options, todo, file)
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            print(f"benchmarks.accuracy: {error}", file=sys.stderr)
            return 2
        windows = ", ".join(f"{count} windows of {length} tokens" for length, count in run.windows.items())
        there = f", which has {len(file.results.rows)} rows" if file.results.rows else ""
        print(f"{run.model_name}: {windows}; writing {file.path}{there}", flush=True)
        failures = _run_in_processes(options, todo, file) if options.processes > 1 else run.run()
    print(f"\n{accuracy_tables([file.results])}")
    return 1 if failures else 0


def _run_in_processes(options: argparse.Namespace, todo: list[Job], file: ResultsFile) -> int:
    """Writes the rows of all jobs as they come; returns how many failed."""
    failures = 0
    found = rows_of(options, longest_first(todo), file.results)
    for row in tqdm(found, "measured", unit="row", disable=not sys.stderr.isatty()):
        file.append(row)
        failures += "error" in row
    return failures


if __name__ == "__main__":
    sys.exit(main())
