"""Pictures: what the method does to a model's activations, and how fast the quantized model is."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["plot_outliers", "plot_speedups", "plotted"]

_SIZE_INCHES, _DOTS_PER_INCH = (11.0, 5.0), 150


def plot_outliers(
    before: Tensor,
    after: Tensor,
    path: str | os.PathLike[str],
    title: str = "Largest activation of each token at the input of down_proj",
    label: str = "token's largest |activation| / layer's median",
    threshold: float | None = None,
) -> Path:
    """Draws outlier tokens, layers by tokens, without and with the prefix, on one logarithmic colour scale.

    The file appears whole or not at all, and folders above it are made.

    Args:
        before, after: positive [layers, T], such as `pq_ao.prefix.token_ratios(model, ids)` and
            `token_ratios(model, ids, prefix_ids)`; T may differ between the two.
        path: of the picture, a PNG.
        title: heading.
        label: of the colour scale.
        threshold: values above it are encircled, and counted over each panel; None for neither.

    Returns:
        The path.

    Raises:
        ValueError: a tensor that is not [layers, T], layers that differ, values that are not positive and finite, or
            a path that does not end in .png.

    Example::

        ids = torch.tensor(tokenizer(text).input_ids)
        ratios = token_ratios(model, ids), token_ratios(model, ids, prefix_ids)
        plot_outliers(*ratios, "outliers.png", threshold=OUTLIER_THRESHOLD)
    """
    path = _png(path)
    panels = {"without": _checked("before", before), "with": _checked("after", after)}
    if before.shape[0] != after.shape[0]:
        raise ValueError(f"before has {before.shape[0]} layers and after has {after.shape[0]}; both need the same.")
    return _write(_draw(panels, title, label, threshold), path, {})


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
    path = _png(path)
    factors = [factor for panel in panels.values() for line in panel.values() for factor in line.values()]
    if not factors or not all(0 < factor < float("inf") for factor in factors):
        raise ValueError("panels: factors that are positive and finite are needed, at least one of them.")
    return _write(_draw_speedups(panels, title, baseline), path, {"Description": _shown(panels, title, baseline)})


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


def _png(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"path={path.name!r}: the picture is a PNG; let the name end in .png.")
    return path


def _write(figure, path: Path, metadata: Mapping[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(temporary, format="png", dpi=_DOTS_PER_INCH, metadata=dict(metadata))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _checked(name: str, values: Tensor) -> Tensor:
    if values.ndim != 2 or values.numel() == 0:
        raise ValueError(f"{name}: shape {tuple(values.shape)}; a tensor [layers, tokens] that is not empty is needed.")
    values = values.detach().double().cpu()
    if not (torch.isfinite(values) & (values > 0)).all():
        raise ValueError(f"{name}: holds values that are not positive and finite; a logarithmic scale has no room.")
    return values


def _figure(title: str):
    # the object API: pyplot would choose a backend and keep figures for the whole process
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_INCHES, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14)
    return figure


def _draw(panels: dict[str, Tensor], title: str, label: str, threshold: float | None):
    from matplotlib.colors import LogNorm

    figure = _figure(title)
    # pale where a token is like the others: ratios below 1 tell nothing here
    scale = LogNorm(1.0, max(10.0, *(float(values.max()) for values in panels.values())), clip=True)
    axes = figure.subplots(1, 2, sharey=True)
    image = None
    for axis, (name, values) in zip(axes, panels.items(), strict=True):
        image = axis.imshow(
            values.numpy(), aspect="auto", origin="lower", interpolation="nearest", cmap="magma_r", norm=scale
        )
        heading = f"{name} the prefix: largest {float(values.max()):,.0f}"
        if threshold is not None:
            layers, tokens = (values > threshold).nonzero(as_tuple=True)
            heading += f", {len(layers)} above {threshold:.0f}"
            axis.scatter(tokens, layers, s=110, facecolors="none", edgecolors="tab:blue", linewidths=1.8, clip_on=False)
        axis.set_title(heading, fontsize=12)
        axis.set_xlabel("token", fontsize=12)
        axis.tick_params(labelsize=11)
    axes[0].set_ylabel("decoder layer", fontsize=12)
    bar = figure.colorbar(image, ax=axes, pad=0.02, format="{x:,g}")
    bar.set_label(label, fontsize=12)
    bar.ax.tick_params(labelsize=11)
    return figure


_MARKERS = "osD^vPX*"


def _draw_speedups(panels: Mapping[str, Speedups], title: str, baseline: str):
    figure = _figure(title)
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
