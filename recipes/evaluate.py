"""Measures a model: perplexity on texts, at one or several lengths of context, and tasks of lm-eval.

    python -m recipes.evaluate out/llama-3-8b --corpus wikitext2 --sequence-length 2048 8192
    python -m recipes.evaluate FOLDER --corpus notes.txt wiki.test.raw.gz --windows 20 --json out/results.json
    python -m recipes.evaluate FOLDER --tasks piqa arc_easy --limit 200
    python -m recipes.evaluate FOLDER --tasks piqa_local --task-data DATA

Takes checkpoints of `pq_ao.save`, folders or hub ids, and floating-point models to compare with. Perplexity is that of
one stream of tokens in windows without overlap; a named corpus is measured on its evaluation part. `--json` is written
after every measurement, whole or not at all. Tasks need `pip install lm-eval accelerate`.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import pq_ao
from pq_ao.data import DATASET_NAMES, EMBEDDED, SPLITS, load_text
from recipes.models import add_saved_options, load_saved
from recipes.terminal import columns, count, run, step, write_json

_LENGTH = 2048  # of a window, where the model's context is not shorter


def measure_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace
) -> list[dict]:
    """Rows of `pq_ao.evaluate_tasks`."""
    # both need lm-eval, which perplexity does not
    if arguments.task_data is not None:
        tasks = pq_ao.local_tasks(arguments.task_data, arguments.tasks)
    else:
        from lm_eval.tasks import TaskManager

        tasks = TaskManager().load(arguments.tasks)["tasks"]
    return pq_ao.evaluate_tasks(model, tokenizer, tasks, arguments.batch_size, arguments.limit)


def table(results: dict) -> str:
    """Perplexities, then tasks."""
    parts = []
    if results["perplexity"]:
        rows = [("corpus", "context", "windows", "perplexity", "seconds")]
        for row in results["perplexity"]:
            numbers = f"{row['sequence_length']:,}", f"{row['windows']:,}", f"{row['ppl']:.3f}", f"{row['seconds']:.1f}"
            rows.append((row["corpus"], *numbers))
        parts.append(columns(rows))
    if results["tasks"]:
        rows = [("task", "acc", "+-", "acc_norm", "+-", "records")]
        for row in results["tasks"]:
            scores = (row["acc"], row["stderr"], row["acc_norm"], row["acc_norm_stderr"])
            rows.append(
                (row["task"], *("" if score is None else f"{score:.3f}" for score in scores), f"{row['records']:,}")
            )
        parts.append(columns(rows))
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> dict:
    """Runs everything; returns what --json gets."""
    arguments = parse(argv)
    for corpus in arguments.corpus:
        if corpus not in (EMBEDDED, *DATASET_NAMES):
            load_text(corpus, argument="--corpus")  # raises before the work begins
    folder, model, tokenizer = load_saved(arguments)
    context = model.config.get_text_config().max_position_embeddings
    lengths = arguments.sequence_length or [min(_LENGTH, context)]
    if max(lengths) > context:
        raise ValueError(
            f"--sequence-length {max(lengths)}: the model's context is {context} tokens; give at most that."
        )
    results = {
        "model": folder.resolve().name,
        "device": str(arguments.device),
        "versions": {"torch": torch.__version__, "pq_ao": pq_ao.__version__},
        "perplexity": [],
        "tasks": [],
    }
    for corpus in arguments.corpus:
        for length in lengths:
            step(f"perplexity on {corpus}, windows of {length:,} tokens")
            found = pq_ao.perplexity(
                model,
                tokenizer,
                corpus,
                split=arguments.split,
                sequence_length=length,
                windows=arguments.windows,
                batch_size=arguments.batch_size,
            )
            results["perplexity"].append(asdict(found))
            keep(results, arguments.json)
    if arguments.tasks:
        step(f"tasks: {', '.join(arguments.tasks)}")
        results["tasks"] = measure_tasks(model, tokenizer, arguments)
        keep(results, arguments.json)
    print(f"{results['model']}\n{table(results)}")
    if arguments.json:
        print(f"\nwritten to {arguments.json}")
    return results


def keep(results: dict, path: str | None) -> None:
    """Writes the results where --json says, if it does."""
    if path:
        write_json(results, Path(path))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure a model's perplexity and its accuracy on tasks.")
    add_saved_options(parser)
    add = parser.add_argument
    names = ", ".join((*DATASET_NAMES, EMBEDDED))
    add("--corpus", nargs="+", metavar="TEXT", help=f"{names}, or files (default: wikitext2; none beside --tasks)")
    add("--split", choices=SPLITS, default="test", help="of a named corpus (default: %(default)s)")
    add("--sequence-length", type=count, nargs="+", metavar="N", help=f"context (default: {_LENGTH})")
    add("--windows", type=count, metavar="N", help="the first so many (default: all)")
    add("--batch-size", type=count, default=1, metavar="N", help="windows or requests at once (default: %(default)s)")
    add("--tasks", nargs="+", default=[], metavar="NAME", help="tasks of lm-eval, or local ones (default: none)")
    add("--task-data", metavar="FOLDER", help="of the records of local tasks, see pq_ao/tasks")
    add("--limit", type=count, metavar="N", help="records of each task (default: all)")
    add("--json", metavar="FILE", help="gets the results too")
    arguments = parser.parse_args(argv)
    if arguments.corpus is None:
        arguments.corpus = [] if arguments.tasks else ["wikitext2"]
    local = [name for name in arguments.tasks if name.endswith("_local")]
    if local and arguments.task_data is None:
        parser.error(f"--tasks {local[0]}: its records are local; add --task-data FOLDER")
    idle = [name for name in ("task_data", "limit") if getattr(arguments, name) is not None and not arguments.tasks]
    if idle:
        parser.error(f"--{idle[0].replace('_', '-')}: without effect here; add --tasks, or leave it out")
    if arguments.task_data is not None and local != arguments.tasks:
        parser.error("--task-data: is for the tasks called *_local; name only these in --tasks")
    return arguments


if __name__ == "__main__":
    run(main)
