"""The picture of outlier tokens: what it shows, that it is written whole, and what it refuses."""

import sys

import pytest
import torch
from matplotlib import image

from pq_ao import plots
from pq_ao.plots import plot_outliers

LAYERS, TOKENS = 6, 20


@pytest.fixture
def ratios() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.rand(LAYERS, TOKENS, generator=generator) + 0.5 for _ in range(2))
    before[2, 0], before[4, 7] = 1770.0, 65.0
    return before, after


def test_writes_a_legible_png(ratios, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # its state belongs to the user
    path = plot_outliers(*ratios, tmp_path / "new" / "outliers.png", threshold=64)
    assert [file.name for file in path.parent.iterdir()] == ["outliers.png"]
    height, width, _ = image.imread(path).shape
    assert height >= 600 and width >= 1200
    assert path.read_bytes().startswith(b"\x89PNG") and 10_000 < path.stat().st_size < 1_000_000


def test_shows_both_panels_on_one_scale(ratios):
    before, after = ratios
    figure = plots._draw({"without": before, "with": after}, "the title", "the label", 64.0)
    left, right, bar = figure.axes
    assert figure.get_suptitle() == "the title"
    assert left.get_title() == "without the prefix: largest 1,770, 2 above 64"
    assert right.get_title() == "with the prefix: largest 1, 0 above 64"
    assert (left.get_xlabel(), left.get_ylabel(), bar.get_ylabel()) == ("token", "decoder layer", "the label")
    for axis, values in ((left, before), (right, after)):
        (shown,) = axis.get_images()
        assert torch.equal(torch.tensor(shown.get_array().tolist()), values)
        assert (shown.norm.vmin, shown.norm.vmax) == (1.0, 1770.0)
    assert left.collections[0].get_offsets().tolist() == [[0, 2], [7, 4]]


def test_without_a_threshold_nothing_is_encircled(ratios):
    figure = plots._draw(dict(zip(("without", "with"), ratios, strict=True)), "", "", None)
    assert not figure.axes[0].collections
    assert figure.axes[0].get_title() == "without the prefix: largest 1,770"


def test_a_picture_that_fails_leaves_the_old_one(ratios, tmp_path, monkeypatch):
    path = tmp_path / "outliers.png"
    path.write_bytes(b"old")

    class Unlucky:
        def savefig(self, target, **options):
            target.write_bytes(b"half")
            raise OSError("disk full")

    monkeypatch.setattr(plots, "_draw", lambda *arguments: Unlucky())
    with pytest.raises(OSError, match="disk full"):
        plot_outliers(*ratios, path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


def test_numbers_of_tokens_may_differ(ratios, tmp_path):
    before, after = ratios
    assert plot_outliers(before, after[:, :5].bfloat16(), str(tmp_path / "a.PNG")).is_file()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda b, a: (b[0], a, "a.png"), "before: shape"),
        (lambda b, a: (b, a[:, :0], "a.png"), "after: shape"),
        (lambda b, a: (b, a[1:], "a.png"), "6 layers and after has 5"),
        (lambda b, a: (b * float("nan"), a, "a.png"), "before: holds values"),
        (lambda b, a: (b, a * 0, "a.png"), "after: holds values"),
        (lambda b, a: (b, a, "a.pdf"), "'a.pdf'"),
    ],
)
def test_refusals(ratios, tmp_path, change, message):
    before, after, name = change(*ratios)
    with pytest.raises(ValueError, match=message):
        plot_outliers(before, after, tmp_path / name)
    assert not list(tmp_path.iterdir())
