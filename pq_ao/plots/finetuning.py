"""The picture of a fine-tuning: what each block gained, and how it went over the epochs."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pq_ao.plots.picture import new_figure, png_path, write_png

# a line above so many times its start leaves the panel: one block that went astray must not flatten the others
_HIGHEST_COURSE = 2.0


def plot_finetuning(
    histories: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    title: str = "Block-wise fine-tuning: error of each block's output",
) -> Path:
    """Draws the validation error of each block before and after, and training and validation error over the epochs.

    The file appears whole or not at all, and folders above it are made. Lines of blocks that stopped early end where
    their errors cease to be finite, and those blocks are marked.

    Args:
        histories: of each block in order, dictionaries of `pq_ao.training.TrainingHistory`: `record.finetuning` of
            `calibrate`, or the same out of a JSON file, where None stands for what is not finite. Blocks may have
            different numbers of epochs.
        path: of the picture, a PNG.
        title: heading.

    Returns:
        The path.

    Raises:
        TypeError: a history is no dictionary.
        ValueError: no histories, a history that lacks a field or contradicts itself, an error that is not positive, or
            a path that does not end in .png.

    Example::

        record = pq_ao.calibrate(model, tokenizer, finetune=pq_ao.FinetuneConfig())
        plot_finetuning(record.finetuning, "finetuning.png")
    """
    path = png_path(path)
    if not len(histories):
        raise ValueError("histories: empty, so nothing was fine-tuned; give calibrate a finetune=FinetuneConfig().")
    return write_png(_draw([_checked(*item) for item in enumerate(histories)], title), path, {})


def _checked(index: int, history: Mapping[str, Any]) -> dict[str, Any]:
    """A history whose errors are floats, NaN where they were not finite."""
    name = f"histories[{index}]"
    if not isinstance(history, Mapping):
        raise TypeError(f"{name}: got {type(history).__name__}; give TrainingHistory.to_dict(), as records hold it.")
    missing = [field for field in ("before", "training", "validation", "kept", "stopped") if field not in history]
    if missing:
        raise ValueError(f"{name}: lacks {', '.join(missing)}; give TrainingHistory.to_dict(), as the record holds it.")
    courses = {
        part: [_error(f"{name}: {part}", value) for value in history[part]] for part in ("training", "validation")
    }
    before, kept = _error(f"{name}: before", history["before"]), history["kept"]
    epochs, others = (len(course) for course in courses.values())
    if epochs != others or not epochs:
        raise ValueError(
            f"{name}: has {epochs} epochs of training and {others} of validation; both need the same, at least 1."
        )
    if type(kept) is not int or not 0 <= kept <= epochs:
        raise ValueError(f"{name}: kept={kept!r}; one of its epochs is required, 0 to {epochs}.")
    after = (before, *courses["validation"])[kept]
    if math.isnan(before) or math.isnan(after):
        raise ValueError(f"{name}: the error before, or in the epoch that was kept ({kept}), is not finite.")
    return {"before": before, "after": after, "stopped": history["stopped"] is not None} | courses


def _error(name: str, value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise ValueError(f"{name} holds {value!r}; a logarithmic scale shows numbers above 0.")
    return float(value) if math.isfinite(value) else math.nan


def _relative(blocks: list[dict[str, Any]], part: str) -> Tensor:
    """Errors over that of before, float64 [blocks, epochs]; NaN where there is none."""
    epochs = max(len(block[part]) for block in blocks)
    rows = [block[part] + [math.nan] * (epochs - len(block[part])) for block in blocks]
    before = torch.tensor([block["before"] for block in blocks], dtype=torch.float64)
    return torch.tensor(rows, dtype=torch.float64).reshape(len(blocks), epochs) / before[:, None]


def _draw(blocks: list[dict[str, Any]], title: str):
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure = new_figure(title)
    left, right = figure.subplots(1, 2)
    colours = ScalarMappable(Normalize(0, max(1, len(blocks) - 1)), "viridis")
    _draw_blocks(left, blocks)
    _draw_course(right, blocks, colours)
    bar = figure.colorbar(colours, ax=right, pad=0.02)
    bar.set_label("block", fontsize=12)
    for axis in (left.xaxis, right.xaxis, bar.ax.yaxis):
        axis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    for axis in (left, right):
        axis.grid(axis="y", alpha=0.3)
        # below the panel: it has no corner that is always free
        axis.legend(fontsize=11, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
    for axis in (left, right, bar.ax):
        axis.tick_params(labelsize=11)
    return figure


def _draw_blocks(axis, blocks: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    places = range(len(blocks))
    before, after = ([block[name] for block in blocks] for name in ("before", "after"))
    axis.vlines(places, after, before, color="tab:grey", linewidth=1, alpha=0.6)
    axis.plot(places, before, "o", color="tab:red", markersize=9, markerfacecolor="white", label="before")
    axis.plot(places, after, "o", color="tab:blue", label="after")
    stopped = [place for place in places if blocks[place]["stopped"]]
    if stopped:
        heights = [after[place] for place in stopped]
        axis.plot(stopped, heights, "x", color="black", markersize=9, label=f"stopped early ({len(stopped)})")
    low, high = min(before + after) / 1.6, max(before + after) * 1.6
    axis.set_yscale("log")
    axis.set_ylim(low, high)
    axis.set_xlim(-0.75, len(blocks) - 0.25)
    axis.yaxis.set_major_locator(LogLocator(subs=_ticks(high / low)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    ratios = torch.tensor(after, dtype=torch.float64) / torch.tensor(before, dtype=torch.float64)
    axis.set_title(f"before and after: median ratio {float(ratios.quantile(0.5)):.2f}", fontsize=12)
    axis.set_xlabel("block", fontsize=12)
    axis.set_ylabel("validation error / power of the output", fontsize=12)


def _ticks(span: float) -> tuple[float, ...]:
    """What to label between two powers of ten where an axis spans the factor `span`: about four to twelve labels."""
    if span < 10:
        return (1, 1.5, 2, 3, 4, 5, 6, 8)
    return (1, 2, 5) if span < 1000 else (1,)


def _draw_course(axis, blocks: list[dict[str, Any]], colours) -> None:
    training, validation = _relative(blocks, "training"), _relative(blocks, "validation")
    epochs = torch.arange(validation.shape[1] + 1)
    start = torch.ones(len(blocks), 1, dtype=torch.float64)
    shown = {
        # the error of training is a mean over its epoch, so it stands in the middle
        "training": ("--", epochs[1:] - 0.5, training),
        "validation": ("-", epochs, torch.cat([start, validation], 1)),
    }
    for name, (style, places, values) in shown.items():
        for index, line in enumerate(values):
            axis.plot(places, line, style, color=colours.to_rgba(index), linewidth=0.8, alpha=0.6)
        median = values.nanquantile(0.5, dim=0)
        axis.plot(places, median, style, color="black", linewidth=2.5, label=f"{name} (median)", zorder=3)
    drawn = torch.cat([values.flatten() for _, _, values in shown.values()])
    highest = float(drawn[~drawn.isnan()].max())
    axis.axhline(1.0, color="tab:grey", linewidth=1)
    axis.set_ylim(0, 1.05 * min(highest, _HIGHEST_COURSE))
    axis.set_xlim(0, max(1, len(epochs) - 1))
    axis.set_title("over the epochs", fontsize=12)
    axis.set_xlabel("epoch", fontsize=12)
    axis.set_ylabel("error / validation error before", fontsize=12)
