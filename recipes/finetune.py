"""Fine-tunes a model block by block, quantizes it, and measures what is left of its perplexity.

    python -m recipes.finetune --data wikitext2 --resume out/finetune/blocks
    python -m recipes.finetune --model FOLDER --data train.jsonl --corpus test.jsonl --resume FOLDER

Prints each block's error before and after its fine-tuning, and perplexity as loaded and quantized. Writes
finetuning.json (how it was calibrated and what came of it) and finetuning.png to the output folder.

With `--resume FOLDER` every finished block is kept there: after an interruption, the same command goes on behind the
last of them, to the same result. The defaults are for a GPU; on a CPU take smaller `--epochs` and `--windows`. Where
the picture shows an error that falls in training but not in validation, take more `--num-sequences`.
"""

import argparse
import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torchao.quantization import quantize_
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import pq_ao
from pq_ao.config import SCHEMES
from pq_ao.data import DATASET_NAMES, EMBEDDED, TextSource, load_text
from pq_ao.evaluation import PerplexityResult
from pq_ao.plots import plot_finetuning
from pq_ao.rounding import ROUNDINGS
from pq_ao.streams import STORAGES
from recipes.smollm2 import smollm2_folder

NAMED = (EMBEDDED, *DATASET_NAMES)


def calibration_data(sources: list[str]) -> TextSource:
    """A name or a file as it is; several files as their texts."""
    return sources[0] if len(sources) == 1 else [load_text(source) for source in sources]


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


def plain(value: Any) -> Any:
    """`value` with None for NaN and infinity, the errors of a block that stopped: JSON has no such numbers."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(facts: dict, path: Path) -> None:
    """Writes `facts`, whole or not at all."""
    text = json.dumps(plain(facts), indent=1, ensure_ascii=False, allow_nan=False)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace
) -> PerplexityResult:
    """Perplexity on the evaluation part of the data, or on the corpus."""
    corpus = arguments.corpus or arguments.data[0]
    return pq_ao.perplexity(
        model, tokenizer, corpus, split="test", sequence_length=arguments.eval_length, windows=arguments.windows
    )


def step(what: str) -> None:
    """Announces a step above its progress bars."""
    print(f"-- {what}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> dict:
    """Runs everything; returns what finetuning.json holds."""
    arguments = parse(argv)
    # what can be wrong with the arguments shows before the work begins
    config = pq_ao.prefixquant_config(arguments.scheme, mode=arguments.mode)
    finetune = pq_ao.FinetuneConfig(
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        weight_learning_rate=arguments.weight_learning_rate,
        validation_sequences=arguments.validation_sequences,
        compile=arguments.compile,
    )
    data = calibration_data(arguments.data)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)

    step("model")
    folder = smollm2_folder(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(arguments.device)
    step("perplexity as loaded")
    dense = measure(model, tokenizer, arguments)

    step("calibration and fine-tuning")
    if arguments.resume:
        step(f"finished blocks are kept in {arguments.resume}: after an interruption, run the same command to go on")
    else:
        step("an interruption would lose everything: with --resume FOLDER, finished blocks are kept")
    record = pq_ao.calibrate(
        model,
        tokenizer,
        config,
        data=data,
        num_sequences=arguments.num_sequences,
        sequence_length=arguments.sequence_length,
        rounding=arguments.rounding,
        finetune=finetune,
        seed=arguments.seed,
        storage=arguments.storage,
        resume=arguments.resume,
    )
    print(table(record.finetuning))
    results = {
        "model": folder.name,
        "data": [Path(source).name for source in arguments.data],
        "device": arguments.device,
        "versions": {"torch": torch.__version__, "pq_ao": pq_ao.__version__},
        "calibration": record.to_dict(),
        "perplexity": {"bf16": asdict(dense)},
    }
    path = output / "finetuning.json"
    write_json(results, path)  # already now: what follows may fail
    picture = plot_finetuning(record.finetuning, output / "finetuning.png")

    step("perplexity quantized")
    quantize_(model, config)
    quantized = measure(model, tokenizer, arguments)
    results["perplexity"]["quantized"] = asdict(quantized)
    write_json(results, path)
    print(
        f"\nPerplexity on {dense.corpus}, {dense.windows} x {dense.sequence_length} tokens: {dense.ppl:.2f} as loaded, "
        f"{quantized.ppl:.2f} as {config.scheme} {config.mode}.\n{path}\n{picture}"
    )
    return plain(results)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fine-tune a model block by block, quantize it and measure it.")
    default = pq_ao.FinetuneConfig()
    add = parser.add_argument
    add("--model", help="a local folder or a hub id (default: SmolLM2-135M-Instruct, hub or PyPI)")
    add("--output", default="out/finetune", help="folder of finetuning.json and .png (default: %(default)s)")
    add("--resume", metavar="FOLDER", help="keeps finished blocks, to go on after an interruption (default: none)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default here: %(default)s")
    add("--seed", type=int, default=0, help="of rotation, windows and order (default: %(default)s)")

    add("--scheme", choices=tuple(SCHEMES), default="w4a4kv4", help="default: %(default)s")
    add("--mode", choices=("static", "dynamic"), default="static", help="default: %(default)s")
    add("--rounding", choices=tuple(ROUNDINGS), default="gptq", help="default: %(default)s")

    add("--data", nargs="+", default=[EMBEDDED], help=f"one of {', '.join(NAMED)}, or files (default: {EMBEDDED})")
    add("--num-sequences", type=int, default=64, help="to train on (default: %(default)s)")
    add("--sequence-length", type=int, default=512, help="tokens of each (default: %(default)s)")
    add("--storage", choices=STORAGES, default="device", help="of their hidden states (default: %(default)s)")

    add("--epochs", type=int, default=default.epochs, help="passes over the sequences (default: %(default)s)")
    add("--batch-size", type=int, default=default.batch_size, help="sequences a step (default: %(default)s)")
    add(
        "--learning-rate",
        type=float,
        default=default.learning_rate,
        help="of scales, clip factors, biases (default: %(default)s)",
    )
    add(
        "--weight-learning-rate",
        type=float,
        default=default.weight_learning_rate,
        help="of weights, in quantization steps (default: %(default)s)",
    )
    add(
        "--validation-sequences",
        type=int,
        default=default.validation_sequences,
        help="which choose the state that is kept (default: %(default)s)",
    )
    add("--compile", action=argparse.BooleanOptionalAction, help="the training step (default: on a GPU)")

    add("--corpus", help="name or file to measure perplexity on (default: evaluation part of a named --data)")
    add("--eval-length", type=int, default=2048, help="tokens of a window of it (default: %(default)s)")
    add("--windows", type=int, help="the first so many (default: all)")
    arguments = parser.parse_args(argv)

    named = [source for source in arguments.data if source in NAMED]
    if named and len(arguments.data) > 1:
        parser.error(f"--data {' '.join(arguments.data)}: give one of {', '.join(NAMED)} alone, or files")
    if not named and arguments.corpus is None:
        parser.error("--data: files have no evaluation part; add --corpus with another text to measure perplexity on")
    if arguments.corpus in set(arguments.data) - set(NAMED):
        parser.error(f"--corpus {arguments.corpus}: is what the model learns from; give another text")
    return arguments


if __name__ == "__main__":
    main()
