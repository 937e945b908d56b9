"""The picture of how fast the quantized model is."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from pq_ao.plots.picture import new_figure, png_path, write_png

# what one panel shows: of each system the factors by (batch, context)
Speedups = Mapping[str, Mapping[tuple[int, int], float]]


def plot_speedups(
    panels: Mapping[str, Speedups], path: str | os.PathLike[str], title: str, baseline: str = "compiled bf16"
) -> Path:
    """Draws speed-up against batch size, a panel for each phase and a line for each system.

    The file appears whole or not at all, and remembers what it shows, see `plotted`.

    Args:
        panels: by heading; factors must be positive.
        path: of the picture, a PNG.
        title: heading of the whole.
        baseline: what 1 stands for.

    Returns:
        The path.

    Raises:
        ValueError: nothing to show, a factor that is not positive, or a path that does not end in .png.

    Example::

        plot_speedups({"decode": {"pq_ao-static": {(1, 1024): 2.9, (32, 8192): 3.1}}}, "speed.png", "Llama-3-8B")
    """
    path = png_path(path)
    factors = [factor for panel in panels.values() for line in panel.values() for factor in line.values()]
    if not factors or not all(0 < factor < float("inf") for factor in factors):
        raise ValueError("panels: factors that are positive and finite are needed, at least one of them.")
    return write_png(_draw_speedups(panels, title, baseline), path, {"Description": _shown(panels, title, baseline)})


def plotted(path: str | os.PathLike[str], panels: Mapping[str, Speedups], title: str, baseline: str = "compiled bf16"):
    """Whether `path` is a picture that `plot_speedups` made of just this, whatever drew it."""
    from PIL import Image

    if not Path(path).is_file():
        return False
    with Image.open(path) as image:
        return image.info.get("Description") == _shown(panels, title, baseline)


def _shown(panels: Mapping[str, Speedups], title: str, baseline: str) -> str:
    points = {
        heading: {name: [[*shape, factor] for shape, factor in sorted(line.items())] for name, line in panel.items()}
        for heading, panel in panels.items()
    }
    return json.dumps({"title": title, "baseline": baseline, "points": points})


_MARKERS = "osD^vPX*"


def _draw_speedups(panels: Mapping[str, Speedups], title: str, baseline: str):
    figure = new_figure(title)
    names = sorted({name for panel in panels.values() for name in panel})
    styles = {name: {"color": f"C{i}", "marker": _MARKERS[i % len(_MARKERS)]} for i, name in enumerate(names)}
    widths = [max(1, len({shape for line in panel.values() for shape in line})) for panel in panels.values()]
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False, width_ratios=widths)[0]
    for axis, (heading, panel) in zip(axes, panels.items(), strict=True):
        # evenly spaced: batch and context change together, so no scale would be true
        shapes = sorted({shape for line in panel.values() for shape in line})
        for name, line in panel.items():
            places = [place for place, shape in enumerate(shapes) if shape in line]
            axis.plot(places, [line[shapes[place]] for place in places], label=name, linewidth=1.5, **styles[name])
        axis.axhline(1.0, color="black", linewidth=1, linestyle="--")
        axis.set_xticks(range(len(shapes)), [f"{batch}\nx {context:,}" for batch, context in shapes])
        axis.margins(x=0.12)
        axis.set_ylim(bottom=0)
        axis.grid(axis="y", alpha=0.3)
        axis.set_title(heading, fontsize=12)
        axis.set_xlabel("batch x context", fontsize=12)
        axis.tick_params(labelsize=11)
    axes[0].set_ylabel(f"speed-up over {baseline}", fontsize=12)
    handles = {}
    for axis in axes:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=11)
    return figure
