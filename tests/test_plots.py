"""The picture of outlier tokens: what it shows, that it is written whole, and what it refuses."""

import sys

import pytest
import torch
from matplotlib import image

from pq_ao import plots
from pq_ao.plots import plot_outliers, plot_speedups, plotted

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


SPEEDUPS = {
    "decode": {"static": {(1, 1024): 2.9, (32, 8192): 3.1, (8, 2048): 2.0}, "other": {(1, 1024): 1.2}},
    "prefill": {"static": {(4, 2048): 1.6}},
}


def test_speedups_are_drawn_by_batch(tmp_path):
    figure = plots._draw_speedups(SPEEDUPS, "the title", "bf16")
    decode, prefill = figure.axes
    assert figure.get_suptitle() == "the title" and decode.get_ylabel() == "speed-up over bf16"
    assert (decode.get_title(), prefill.get_title()) == ("decode", "prefill")
    assert [tick.get_text() for tick in decode.get_xticklabels()] == ["1\nx 1,024", "8\nx 2,048", "32\nx 8,192"]
    static, other, one = decode.get_lines()
    assert list(static.get_ydata()) == [2.9, 2.0, 3.1] and list(other.get_ydata()) == [1.2]
    assert static.get_color() == prefill.get_lines()[0].get_color() != other.get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["static", "other"]

    path = plot_speedups(SPEEDUPS, tmp_path / "new" / "speed.png", "the title")
    assert [file.name for file in path.parent.iterdir()] == ["speed.png"]
    assert image.imread(path).shape[1] >= 1200
    assert plotted(path, SPEEDUPS, "the title") and not plotted(path, SPEEDUPS, "another")
    assert not plotted(path, {"decode": SPEEDUPS["decode"]}, "the title")
    assert not plotted(tmp_path / "missing.png", SPEEDUPS, "the title")


@pytest.mark.parametrize(
    ("panels", "name", "message"),
    [
        ({}, "a.png", "panels"),
        ({"decode": {"a": {(1, 1): 0.0}}}, "a.png", "panels"),
        ({"decode": {"a": {(1, 1): float("nan")}}}, "a.png", "panels"),
        (SPEEDUPS, "a.pdf", "'a.pdf'"),
    ],
)
def test_speedups_refused(tmp_path, panels, name, message):
    with pytest.raises(ValueError, match=message):
        plot_speedups(panels, tmp_path / name, "")
    assert not list(tmp_path.iterdir())
