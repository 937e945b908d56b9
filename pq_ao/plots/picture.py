"""What all pictures share: their size, their heading, and how they get to the disk."""

import os
from collections.abc import Mapping
from pathlib import Path

_SIZE_INCHES, _DOTS_PER_INCH = (11.0, 5.0), 150


def png_path(path: str | os.PathLike[str]) -> Path:
    """`path` as a Path; ValueError if it does not end in .png."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"path={path.name!r}: the picture is a PNG; let the name end in .png.")
    return path


def new_figure(title: str):
    """An empty matplotlib figure with a heading."""
    # the object API: pyplot would choose a backend and keep figures for the whole process
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_INCHES, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14)
    return figure


def write_png(figure, path: Path, metadata: Mapping[str, str]) -> Path:
    """Writes a figure with `metadata` as text of the PNG, whole or not at all; makes folders; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(temporary, format="png", dpi=_DOTS_PER_INCH, metadata=dict(metadata))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
