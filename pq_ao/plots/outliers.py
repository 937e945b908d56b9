"""The picture of a model's outlier tokens."""

import os
from pathlib import Path

import torch
from torch import Tensor

from pq_ao.plots.picture import new_figure, png_path, write_png


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
        before, after: positive [layers, T], such as `pq_ao.outliers.token_ratios(model, ids)` and
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
    path = png_path(path)
    panels = {"without": _checked("before", before), "with": _checked("after", after)}
    if before.shape[0] != after.shape[0]:
        raise ValueError(f"before has {before.shape[0]} layers and after has {after.shape[0]}; both need the same.")
    return write_png(_draw(panels, title, label, threshold), path, {})


def _checked(name: str, values: Tensor) -> Tensor:
    if values.ndim != 2 or values.numel() == 0:
        raise ValueError(f"{name}: shape {tuple(values.shape)}; a tensor [layers, tokens] that is not empty is needed.")
    values = values.detach().double().cpu()
    if not (torch.isfinite(values) & (values > 0)).all():
        raise ValueError(f"{name}: holds values that are not positive and finite; a logarithmic scale has no room.")
    return values


def _draw(panels: dict[str, Tensor], title: str, label: str, threshold: float | None):
    from matplotlib.colors import LogNorm

    figure = new_figure(title)
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
