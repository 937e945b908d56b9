"""Fine-tunes a model block by block, quantizes and saves it, and measures what is left of its perplexity.

    python -m recipes.finetune --data wikitext2 --resume out/finetune/blocks
    python -m recipes.finetune --model FOLDER --data train.jsonl --corpus test.jsonl --resume FOLDER

What `recipes.quantize --finetune` does, and what shows whether it was worth it: each block's error before and after,
and perplexity as loaded and quantized. Writes finetuning.json (how it was calibrated and what came of it),
finetuning.png and the folder `checkpoint` to the output folder.

With `--resume FOLDER` every finished block is kept there: after an interruption, the same command goes on behind the
last of them, to the same result. The defaults are for a GPU; on a CPU take smaller `--epochs` and `--windows`. Where
the picture shows an error that falls in training but not in validation, take more `--num-sequences`.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import pq_ao
from pq_ao.data import load_text
from pq_ao.evaluation import PerplexityResult
from pq_ao.plots import plot_finetuning
from recipes.calibration_options import NAMED, add_calibration_options, calibrate_arguments, config_of
from recipes.models import add_original_options, check_output, load_original
from recipes.quantize import add_head_option, calibrated, saved
from recipes.terminal import count, plain, run, step, write_json


def table(histories: list[dict]) -> str:
    """A line for each block: its validation error before and after, and the epoch whose state was kept."""
    lines = [f"{'block':>5}{'before':>12}{'after':>12}{'ratio':>8}{'epoch':>7}"]
    for block, history in enumerate(histories):
        before, after = history["before"], kept_error(history)
        note = f"  stopped: {history['stopped']}" if history["stopped"] else ""
        lines.append(f"{block:5}{before:12.3e}{after:12.3e}{after / before:8.3f}{history['kept']:7}{note}")
    return "\n".join(lines)


def kept_error(history: dict) -> float:
    """Validation error of the state that a block kept."""
    return (history["before"], *history["validation"])[history["kept"]]


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace
) -> PerplexityResult:
    """Perplexity on the evaluation part of the data, or on the corpus."""
    corpus = arguments.corpus or arguments.data[0]
    return pq_ao.perplexity(
        model, tokenizer, corpus, split="test", sequence_length=arguments.eval_length, windows=arguments.windows
    )


def main(argv: Sequence[str] | None = None) -> dict:
    """Runs everything; returns what finetuning.json holds."""
    arguments = parse(argv)
    # what can be wrong with the arguments shows before the work begins
    config = config_of(arguments)
    calibrate_arguments(arguments)
    if arguments.corpus is not None and arguments.corpus not in NAMED:
        load_text(arguments.corpus, argument="--corpus")
    output = Path(arguments.output)
    check_output(output / "checkpoint")
    output.mkdir(parents=True, exist_ok=True)

    folder, model, tokenizer = load_original(arguments)
    step("perplexity as loaded")
    dense = measure(model, tokenizer, arguments)
    record = calibrated(model, tokenizer, arguments)
    print(table(record.finetuning))
    if record.end_to_end:
        before, after = record.end_to_end["before"], kept_error(record.end_to_end)
        print(f"end to end: {before:.3e} before, {after:.3e} after, epoch {record.end_to_end['kept']}")
    results = {
        "model": folder.resolve().name,
        "data": [Path(source).name for source in arguments.data],
        "device": str(arguments.device),
        "versions": {"torch": torch.__version__, "pq_ao": pq_ao.__version__},
        "calibration": record.to_dict(),
        "perplexity": {"as loaded": asdict(dense)},
    }
    path = output / "finetuning.json"
    write_json(results, path)  # already now: what follows may fail
    picture = plot_finetuning(record.finetuning, output / "finetuning.png")

    saved(model, tokenizer, output / "checkpoint", arguments)
    step("perplexity quantized")
    quantized = measure(model, tokenizer, arguments)
    results["perplexity"]["quantized"] = asdict(quantized)
    write_json(results, path)
    print(
        f"\nPerplexity on {dense.corpus}, {dense.windows} x {dense.sequence_length} tokens: {dense.ppl:.2f} as loaded, "
        f"{quantized.ppl:.2f} as {config.scheme} {config.mode}.\n{path}\n{picture}\n{output / 'checkpoint'}"
    )
    return plain(results)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fine-tune a model block by block, quantize, save and measure it.")
    add_original_options(parser)
    parser.add_argument("--output", default="out/finetune", metavar="FOLDER", help="default: %(default)s")
    add_calibration_options(parser)
    add_head_option(parser)
    add = parser.add_argument_group("measurement").add_argument
    add("--corpus", help="name or file to measure perplexity on (default: evaluation part of a named --data)")
    add("--eval-length", type=count, default=2048, help="tokens of a window of it (default: %(default)s)")
    add("--windows", type=count, help="the first so many (default: all)")
    parser.set_defaults(finetune=True, rounding="gptq", num_sequences=64, sequence_length=2048)
    arguments = parser.parse_args(argv)

    if not set(arguments.data) & set(NAMED) and arguments.corpus is None:
        parser.error("--data: files have no evaluation part; add --corpus with another text to measure perplexity on")
    if arguments.corpus in set(arguments.data) - set(NAMED):
        parser.error(f"--corpus {arguments.corpus}: is what the model learns from; give another text")
    return arguments


if __name__ == "__main__":
    run(main)
