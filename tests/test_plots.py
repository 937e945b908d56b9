"""The pictures: what they show, that they are written whole, and what they refuse."""

import math
import sys

import pytest
import torch
from matplotlib import image

from pq_ao.plots import finetuning, outliers, plot_finetuning, plot_outliers, plot_speedups, plotted, speedups
from pq_ao.training import TrainingHistory

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
    figure = outliers._draw({"without": before, "with": after}, "the title", "the label", 64.0)
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
    figure = outliers._draw(dict(zip(("without", "with"), ratios, strict=True)), "", "", None)
    assert not figure.axes[0].collections
    assert figure.axes[0].get_title() == "without the prefix: largest 1,770"


def test_a_picture_that_fails_leaves_the_old_one(ratios, tmp_path, monkeypatch):
    path = tmp_path / "outliers.png"
    path.write_bytes(b"old")

    class Unlucky:
        def savefig(self, target, **options):
            target.write_bytes(b"half")
            raise OSError("disk full")

    monkeypatch.setattr(outliers, "_draw", lambda *arguments: Unlucky())
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
    figure = speedups._draw_speedups(SPEEDUPS, "the title", "bf16")
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


NAN, INF = math.nan, math.inf


def _histories() -> list[dict]:
    """Two ordinary blocks, one that stopped in its second epoch, and one that stopped in its first."""
    return [
        TrainingHistory(0.1, [0.08, 0.06, 0.05], [0.07, 0.05, 0.06], kept=2).to_dict(),
        TrainingHistory(0.02, [0.02, 0.01, 0.01], [0.018, 0.016, 0.012], kept=3).to_dict(),
        TrainingHistory(0.04, [0.03, 1e20], [0.02, INF], kept=1, stopped="not finite").to_dict(),
        TrainingHistory(0.004, [NAN], [NAN], kept=0, stopped="not finite").to_dict(),
    ]


def _drawn_finetuning(histories, monkeypatch, path):
    """The figure that `plot_finetuning` writes."""
    figures, draw = [], finetuning._draw
    monkeypatch.setattr(finetuning, "_draw", lambda *arguments: figures.append(draw(*arguments)) or figures[0])
    plot_finetuning(histories, path, title="the title")
    return figures[0]


def test_finetuning_shows_each_block_before_and_after(tmp_path, monkeypatch):
    figure = _drawn_finetuning(_histories(), monkeypatch, tmp_path / "a.png")
    left, right, bar = figure.axes
    assert figure.get_suptitle() == "the title" and left.get_yscale() == "log"
    assert (left.get_xlabel(), right.get_xlabel(), bar.get_ylabel()) == ("block", "epoch", "block")
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in left.get_lines()}
    assert lines == {
        "before": ([0, 1, 2, 3], [0.1, 0.02, 0.04, 0.004]),
        "after": ([0, 1, 2, 3], [0.05, 0.012, 0.02, 0.004]),
        "stopped early (2)": ([2, 3], [0.02, 0.004]),
    }
    assert [text.get_text() for text in left.get_legend().get_texts()] == list(lines)
    assert left.get_title().endswith("median ratio 0.55")  # of 0.5, 0.6, 0.5 and 1


def test_finetuning_shows_the_course_and_its_median(tmp_path, monkeypatch):
    figure = _drawn_finetuning(_histories(), monkeypatch, tmp_path / "a.png")
    right = figure.axes[1]
    *lines, _ = right.get_lines()
    training, validation = lines[:5], lines[5:]
    expected = [[1, 0.7, 0.5, 0.6], [1, 0.9, 0.8, 0.6], [1, 0.5, NAN, NAN], [1, NAN, NAN, NAN], [1, 0.7, 0.65, 0.6]]
    for line, values in zip(validation, expected, strict=True):
        assert list(line.get_xdata()) == [0, 1, 2, 3]
        assert list(line.get_ydata()) == pytest.approx(values, nan_ok=True)
    assert list(training[1].get_xdata()) == [0.5, 1.5, 2.5]
    assert list(training[1].get_ydata()) == pytest.approx([1, 0.5, 0.5])
    assert len({line.get_color() for line in lines[:4]}) == 4
    assert [line.get_color() for line in training[:4]] == [line.get_color() for line in validation[:4]]
    widths = {line.get_linewidth() for line in training[:4] + validation[:4]}
    assert max(widths) < min(training[4].get_linewidth(), validation[4].get_linewidth())
    # 1e20 does not flatten the others
    assert right.get_ylim()[0] == 0 and right.get_ylim()[1] < 2.5


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "histories",
    [
        _histories(),
        _histories()[:1],
        _histories()[3:],
        # as JSON has it
        [{"before": 0.1, "training": [None], "validation": [None], "kept": 0, "stopped": "not finite"}],
        [TrainingHistory(10.0**-block, [1e-9], [1e-9], kept=1).to_dict() for block in range(8)],
    ],
    ids=["all", "one block", "nothing finite", "json", "eight decades"],
)
def test_finetuning_is_written_legibly_and_whole(histories, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    path = tmp_path / "new" / "finetuning.png"
    figure = _drawn_finetuning(histories, monkeypatch, path)
    assert [file.name for file in path.parent.iterdir()] == ["finetuning.png"]
    height, width, _ = image.imread(path).shape
    assert height >= 600 and width >= 1200
    left, right, bar = figure.axes
    for scale in (left.xaxis, left.yaxis, right.xaxis, right.yaxis, bar.yaxis):
        _assert_labels_apart(scale)
    for axis in (left, right):
        legend, label = axis.get_legend().get_window_extent(), axis.xaxis.label.get_window_extent()
        assert not legend.overlaps(axis.get_window_extent()) and not legend.overlaps(label)
        assert legend.y0 >= 0


def _assert_labels_apart(scale) -> None:
    low, high = sorted(scale.get_view_interval())
    ticks = [tick for tick in scale.get_major_ticks() if low <= tick.get_loc() <= high]
    labels = [label for tick in ticks for label in (tick.label1, tick.label2) if label.get_visible()]
    boxes = [label.get_window_extent() for label in labels]
    assert boxes and all(box.width > 0 for box in boxes)
    assert not any(first.overlaps(second) for i, first in enumerate(boxes) for second in boxes[:i])


def test_a_picture_of_finetuning_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "finetuning.png"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="lacks kept"):
        plot_finetuning([{"before": 1.0, "training": [], "validation": [], "stopped": None}], path)
    monkeypatch.setattr("os.replace", lambda *arguments: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        plot_finetuning(_histories(), path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"before": NAN}, r"histories\[1\]: the error before"),
        ({"before": 0.0}, r"histories\[1\]: before holds 0.0"),
        ({"before": True}, r"histories\[1\]: before holds True"),
        ({"training": [1.0, -1.0, 1.0]}, r"histories\[1\]: training holds -1.0"),
        ({"training": ["0.1", 1.0, 1.0]}, r"histories\[1\]: training holds '0.1'"),
        ({"training": [1.0]}, r"histories\[1\]: has 1 epochs of training and 3 of validation"),
        ({"training": [], "validation": [], "kept": 0}, r"histories\[1\]: has 0 epochs of training and 0 of"),
        ({"validation": [1.0, 1.0, INF]}, r"histories\[1\]: .* epoch that was kept \(3\), is not finite"),
        ({"kept": 4}, r"histories\[1\]: kept=4; .* 0 to 3"),
        ({"kept": -1}, r"histories\[1\]: kept=-1"),
    ],
)
def test_finetuning_refused(tmp_path, change, message):
    histories = _histories()
    histories[1] |= change
    with pytest.raises(ValueError, match=message):
        plot_finetuning(histories, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_finetuning_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="histories: empty"):
        plot_finetuning([], tmp_path / "a.png")
    with pytest.raises(TypeError, match=r"histories\[0\]: got TrainingHistory"):
        plot_finetuning([TrainingHistory(1.0)], tmp_path / "a.png")
    with pytest.raises(ValueError, match="'a.pdf'"):
        plot_finetuning(_histories(), tmp_path / "a.pdf")
    assert not list(tmp_path.iterdir())
