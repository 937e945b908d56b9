"""The options of calibration on the command line, and the arguments of `pq_ao.calibrate` that they become."""

import argparse
import re
from dataclasses import fields
from typing import Any

import pq_ao
from pq_ao.calibration import SEARCHES
from pq_ao.config import SCHEMES
from pq_ao.data import DATASET_NAMES, EMBEDDED, TextSource, load_text
from pq_ao.rounding import ROUNDINGS
from pq_ao.streams import STORAGES
from recipes.models import device
from recipes.terminal import count, whole

NAMED = (EMBEDDED, *DATASET_NAMES)


def add_calibration_options(parser: argparse.ArgumentParser) -> None:
    """Adds every option of `prefixquant_config`, `calibrate` and `FinetuneConfig`."""
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("scheme").add_argument
    add("--scheme", choices=tuple(SCHEMES), default="w4a4kv4", help="default: %(default)s")
    add("--mode", choices=("static", "dynamic"), default="static", help="of the scales (default: %(default)s)")
    add("--prefix", action=switch, default=True, help="outlier tokens as a hidden prefix")
    add("--rotation", action=switch, default=True, help="Hadamard rotations")
    add(
        "--act-codes",
        choices=("even", "spread"),
        help="4-bit codes of activations (default: spread where it is allowed)",
    )

    group = parser.add_argument_group("calibration")
    add_data_options(group)
    add = group.add_argument
    add("--context", type=count, metavar="N", help="positions to calibrate for (default: those covered four times)")
    add("--balance", action=switch, default=True, help="of the inner channels of blocks")
    add("--search", choices=SEARCHES, default="tensor", help="objective of scales (default: %(default)s)")
    add("--rounding", choices=tuple(ROUNDINGS), default="nearest", help="of weights (default: %(default)s)")
    add(
        "--calibrate-on", type=device, metavar="DEVICE",
        help="with a model that has no room there on --device cpu: computes, a block at a time (default: --device)",
    )  # fmt: skip
    add("--storage", choices=STORAGES, default="device", help="of hidden states (default: %(default)s)")
    add("--resume", metavar="FOLDER", help="keeps finished blocks: the same command goes on after an interruption")

    add = parser.add_argument_group("fine-tuning").add_argument
    add("--finetune", action="store_true", help="train each block to put out what it did in floating point")
    for field in fields(pq_ao.FinetuneConfig):
        default = "chosen by device" if field.default is None else field.default
        text = f"{_meaning(field.name)} (default: {default})".replace("%", "%%")
        if field.default is None:
            add(_flag(field.name), action=switch, help=text)
        else:
            add(_flag(field.name), type=type(field.default), metavar="N", help=text)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _meaning(name: str) -> str:
    """What the docstring of FinetuneConfig says of an argument, to the end of a sentence or a semicolon."""
    found = re.search(rf"^ +{name}: (.*?)[.;]\s", pq_ao.FinetuneConfig.__doc__ or "", re.M | re.S)
    return " ".join(found[1].split()) if found else ""


def add_data_options(parser: argparse._ActionsContainer, num_sequences: int = 16, sequence_length: int = 2048) -> None:
    """Adds the text of calibration, and what is found in it."""
    add = parser.add_argument
    add("--data", nargs="+", default=[EMBEDDED], help=f"one of {', '.join(NAMED)}, or files (default: {EMBEDDED})")
    add("--num-sequences", type=count, default=num_sequences, metavar="N", help="windows (default: %(default)s)")
    add("--sequence-length", type=count, default=sequence_length, metavar="N", help="tokens (default: %(default)s)")
    add("--prefix-ids", type=int, nargs="+", metavar="ID", help="a prefix of your own (default: found)")
    add("--seed", type=whole, default=0, help="of windows, rotation and training (default: %(default)s)")


def config_of(arguments: argparse.Namespace) -> pq_ao.PrefixQuantConfig:
    """The scheme that was asked for."""
    return pq_ao.prefixquant_config(
        arguments.scheme,
        mode=arguments.mode,
        prefix=arguments.prefix,
        rotation=arguments.rotation,
        act_codes=arguments.act_codes,
    )


def calibrate_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `pq_ao.calibrate`.

    Raises:
        ValueError: options that do not go together, a number out of range, or a file that cannot be read.
    """
    if arguments.prefix_ids is not None and not arguments.prefix:
        raise ValueError("--prefix-ids: without effect beside --no-prefix; leave one of the two out.")
    names = ("num_sequences", "sequence_length", "context", "prefix_ids", "balance", "search", "rounding", "storage")
    return {name: getattr(arguments, name) for name in (*names, "resume", "seed")} | {
        "device": arguments.calibrate_on,
        "data": calibration_data(arguments.data),
        "finetune": _finetune(arguments),
    }


def calibration_data(sources: list[str]) -> TextSource:
    """A name or a file as it is, several files as their texts.

    Raises:
        ValueError: a name among other sources, or a file that cannot be read.
    """
    if len(sources) > 1 and set(sources) & set(NAMED):
        raise ValueError(f"--data {' '.join(sources)}: give one of {', '.join(NAMED)} alone, or files.")
    texts = [
        load_text(source, argument="--data") for source in sources if source not in NAMED
    ]  # before the work begins
    return sources[0] if len(sources) == 1 else texts


def _finetune(arguments: argparse.Namespace) -> pq_ao.FinetuneConfig | None:
    names = [field.name for field in fields(pq_ao.FinetuneConfig)]
    chosen = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.finetune:
        return pq_ao.FinetuneConfig(**chosen)
    if chosen:
        raise ValueError(f"{', '.join(map(_flag, chosen))}: without effect here; add --finetune, or leave it out.")
    return None
