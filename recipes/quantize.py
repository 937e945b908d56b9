"""Quantizes a model and saves it: the way from a model of transformers to a checkpoint.

    python -m recipes.quantize --num-sequences 8 --sequence-length 256          # SmolLM2-135M on a CPU: minutes
    python -m recipes.quantize --model meta-llama/Meta-Llama-3-8B --data pile --output out/llama-3-8b
    python -m recipes.quantize --model FOLDER --finetune --rounding gptq --data pile --num-sequences 64 \
--sequence-length 2048 --storage host --resume out/blocks

Every option of `pq_ao.prefixquant_config`, `pq_ao.calibrate` and `pq_ao.FinetuneConfig` is a flag. What is wrong with
them shows before the work begins. A checkpoint in the output folder is replaced at once or not at all.
"""

import argparse
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from torchao.quantization import quantize_
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import pq_ao
from pq_ao.calibration_record import CalibrationRecord
from pq_ao.explanation import totals
from recipes.calibration_options import add_calibration_options, calibrate_arguments, config_of
from recipes.models import add_original_options, check_output, load_original
from recipes.terminal import run, step


def calibrated(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace
) -> CalibrationRecord:
    """Calibrates `model` in place as the command line says."""
    keywords = calibrate_arguments(arguments)
    step("calibration" if keywords["finetune"] is None else "calibration and fine-tuning")
    if arguments.resume:
        step(f"finished blocks are kept in {arguments.resume}: after an interruption, run the same command to go on")
    elif keywords["finetune"] is not None:
        step("an interruption would lose everything: with --resume FOLDER, finished blocks are kept")
    return pq_ao.calibrate(model, tokenizer, config_of(arguments), **keywords)


def saved(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, arguments: argparse.Namespace
) -> int:
    """Puts the integers of a calibrated model in place and saves it; returns the bytes of its weights on the disk."""
    step("quantizing and saving")
    quantize_(model, config_of(arguments))
    if arguments.int8_head:
        pq_ao.quantize_head_(model)
    pq_ao.save(model, folder, tokenizer=tokenizer)
    return sum(file.stat().st_size for file in folder.glob("model-*.safetensors"))


def main(argv: Sequence[str] | None = None) -> Path:
    """Runs everything; returns the folder of the checkpoint."""
    arguments = parse(argv)
    started = time.perf_counter()
    config_of(arguments), calibrate_arguments(arguments)  # raise before anything takes long
    if arguments.output is not None:
        check_output(Path(arguments.output))
    source, model, tokenizer = load_original(arguments)
    name = source.resolve().name
    output = Path(arguments.output or Path("out", f"{name}-{arguments.scheme}"))
    check_output(output)
    record = calibrated(model, tokenizer, arguments)
    size = saved(model, tokenizer, output, arguments)

    prefix = [tokenizer.decode([token]) for token in record.prefix.prefix_ids]
    print(f"\n{name} as {record.config.scheme}, {record.config.mode} scales")
    print(f"prefix: {prefix or 'none'}\n\n{totals(model)}\n")
    print(f"calibrated in {record.seconds:.1f} s, everything in {time.perf_counter() - started:.1f} s")
    print(f"written to {output}, {size:,} bytes of weights; go on with:")
    folder = shlex.quote(str(output))
    for command in (f"generate {folder}", f"evaluate {folder} --corpus embedded", f"export {folder}"):
        print(f"    python -m recipes.{command}")
    return output


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Quantize a model by PrefixQuant and save it.")
    add_original_options(parser)
    parser.add_argument("--output", metavar="FOLDER", help="of the checkpoint (default: out/MODEL-SCHEME)")
    add_calibration_options(parser)
    add_head_option(parser)
    return parser.parse_args(argv)


def add_head_option(parser: argparse.ArgumentParser) -> None:
    """Adds --int8-head."""
    parser.add_argument("--int8-head", action="store_true", help="take the language-model head to INT8 weights")


if __name__ == "__main__":
    run(main)
