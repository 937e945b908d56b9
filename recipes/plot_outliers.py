"""Draws a model's outlier tokens without and with the prefix, as it was loaded and rotated.

    python -m recipes.plot_outliers
    python -m recipes.plot_outliers --model FOLDER --text notes.txt --tokens 128 --output out/pictures

Writes two pictures, outliers.png and outliers-rotated.png: of each token at each layer the largest activation at the
input of down_proj, over the layer's median. A rotation spreads an outlier over all channels of its token, and the token
still stands out; behind the prefix no token does, and one static scale serves them all.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import pq_ao
from pq_ao.data import EMBEDDED, calibration_windows, load_text, token_ids
from pq_ao.outliers import OUTLIER_THRESHOLD, token_ratios
from pq_ao.plots import plot_outliers
from pq_ao.prefix import find_prefix
from recipes.calibration_options import add_data_options, calibration_data
from recipes.models import add_original_options, load_original
from recipes.terminal import columns, count, run, step


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Runs everything; returns the pictures."""
    arguments = parse(argv)
    data, text = calibration_data(arguments.data), load_text(arguments.text, "test", argument="--text")  # raise at once
    folder, model, tokenizer = load_original(arguments)
    ids = token_ids(tokenizer, text)[: arguments.tokens]
    step("prefix")
    windows = calibration_windows(tokenizer, data, arguments.num_sequences, arguments.sequence_length, arguments.seed)
    prefix_ids = find_prefix(model, tokenizer, windows, arguments.prefix_ids, progress=True).prefix_ids

    above = f"above {OUTLIER_THRESHOLD:.0f}"
    pictures, rows = [], [("largest ratio", "without prefix", above, "with prefix", above)]
    output = Path(arguments.output)
    for kind, name in (("as loaded", "outliers.png"), ("rotated", "outliers-rotated.png")):
        step(kind)
        if kind == "rotated":
            pq_ao.rotate_(model, pq_ao.prefixquant_config(), seed=arguments.seed, progress=True)
        ratios = token_ratios(model, ids), token_ratios(model, ids, prefix_ids)
        title = f"{folder.resolve().name} {kind}: largest activation of each token at the input of down_proj"
        pictures.append(plot_outliers(*ratios, output / name, title=title, threshold=OUTLIER_THRESHOLD))
        rows.append((kind, *(cell for values in ratios for cell in largest(values))))
    print(f"\nprefix: {[tokenizer.decode([token]) for token in prefix_ids]}\n{columns(rows)}")
    print("\n".join(map(str, pictures)))
    return pictures


def largest(ratios: torch.Tensor) -> tuple[str, str]:
    """Of the ratios [layers, T] the largest, and the number above the threshold."""
    return f"{ratios.max():,.1f}", f"{int((ratios > OUTLIER_THRESHOLD).sum()):,}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw a model's outlier tokens.")
    add_original_options(parser)
    add = parser.add_argument
    add("--output", default="out/plot_outliers", metavar="FOLDER", help="of the pictures (default: %(default)s)")
    add("--text", default=EMBEDDED, help="name or file that is drawn (default: evaluation part of %(default)s)")
    add("--tokens", type=count, default=64, metavar="N", help="of the text (default: %(default)s)")
    add_data_options(parser, num_sequences=4, sequence_length=512)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
