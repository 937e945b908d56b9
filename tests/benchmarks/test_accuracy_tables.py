"""The README's tables of accuracy from made-up rows: order, medians, ratios, errors, and which rows they take."""

import math
from itertools import groupby, islice

import pytest

from benchmarks.accuracy_rows import label
from benchmarks.accuracy_settings import CALIBRATIONS
from benchmarks.accuracy_table import accuracy
from benchmarks.results_file import RESULTS, Results, load_results

CALIBRATED = {"calibration_corpus": "train", "calibration_sequences": 16, "calibration_length": 1024}
TRAINED = {"finetuned": True, "epochs": 20, "learning_rate": 1e-3, "calibration_sequences": 128}


def results_of(date: str, rows: list[dict]) -> Results:
    versions = {"torch": "2.13.0", "triton": None}
    return Results("accuracy", date, "abc1234", "NVIDIA H200", versions, "python -m benchmarks.accuracy", rows)


def one_run(*rows: dict) -> str:
    return accuracy([results_of("2026-01-01T00:00:00Z", list(rows))])


def row(ppl: float | None, **changes) -> dict:
    row = {"model": "m", "scheme": "w4a4kv4", "mode": "static", "path": "integer", "prefix": True, "rotation": True}
    row |= {"balance": True, "search": "tensor", "rounding": "nearest", "finetuned": False, "corpus": "text"}
    return row | {"seqlen": 2048, "windows": 10, "ppl": ppl, "seed": 0} | CALIBRATED | changes


def floating(ppl: float, **changes) -> dict:
    keys = {"scheme": "bf16", "mode": "none", "path": None, "prefix": False, "rotation": False, "seed": None}
    return row(ppl, **keys | {"balance": None, "search": None, "rounding": None} | dict.fromkeys(CALIBRATED) | changes)


def lines_of(text: str, table: int = 0) -> list[list[str]]:
    """Cells of one table, without its header."""
    blocks = (list(lines) for is_table, lines in groupby(text.splitlines(), lambda x: x.startswith("|")) if is_table)
    header, rule, *lines = next(islice(blocks, table, None))
    assert set(rule) <= set("|- ") and header.count("|") == rule.count("|")
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


class TestPerplexity:
    def test_median_range_and_ratio(self):
        rows = [row(ppl, seed=seed) for seed, ppl in enumerate((30.0, 36.0, 33.0))]
        rows += [row(None, prefix=False, error="x"), floating(20.0), row(5.0, windows=2)]
        rows += [floating(19.0, prefix=True, rotation=True, seed=0, prefix_ids=[7, 1], **CALIBRATED)]
        rows += [row(31.0, path="reference", windows=2, integer_ppl=31.5)]
        text = one_run(*rows)
        assert [[line[0], line[2], *line[9:11]] for line in lines_of(text)] == [
            ["bf16", "no", "20.00", "1.000"],
            ["bf16", "yes", "19.00", "0.950"],
            ["w4a4kv4", "no", "failed", "-"],
            ["w4a4kv4", "yes", "33.00 (30.00 to 36.00, 3 seeds)", "1.650"],
        ]
        assert "10 windows of 2,048 tokens; calibrated on `train`." in text and "| 16 x 1,024 |" in text
        assert "2026-01-01 on NVIDIA H200 (torch 2.13.0), commit abc1234" in text
        assert "w4a4kv4 static, on the first 2 windows: 31.500 with integers, 31.000 with" in text
        assert "Prefix found (token ids): 7 1." in text

    def test_ladder_reads_as_in_the_paper(self):
        names = ("scheme", "mode", "prefix", "rotation", "balance", "search", "rounding", "finetuned")
        rows = [row(9.0, **{key: getattr(c, key) for key in names}) for c in reversed(CALIBRATIONS.values())]
        together = [
            {"end_to_end_epochs": 3, "end_to_end_prefix_rate": 0.01} if c.end_to_end else {}
            for c in reversed(CALIBRATIONS.values())
        ]
        rows = [a | (TRAINED if a["finetuned"] else {}) | b for a, b in zip(rows, together, strict=True)]
        yes = {True: "yes", False: "no"}
        expected = [
            [
                *(c.scheme, c.mode, yes[c.prefix], yes[c.rotation], yes[c.balance], c.search, c.rounding),
                ("20 epochs" * c.finetuned or "no") + (", 3 end to end" + ", prefix too" * c.prefix) * c.end_to_end,
            ]
            for c in CALIBRATIONS.values()
        ]
        assert [line[:8] for line in lines_of(one_run(*rows, floating(8.0)))[1:]] == expected

    def test_cost_of_calibrations(self):
        costs = [(10, 3.25, 0), (30, 3.0, 0), (26, 2.0, 29), (None, 9.0, 30)]
        rows = [
            row(9.0, seed=seed, calibration_seconds=seconds, calibration_peak_gib=peak, restored_blocks=restored)
            for seed, (seconds, peak, restored) in enumerate(costs)
        ]
        cells = [lines_of(one_run(*some))[0][-1] for some in (rows[:2], rows, rows[3:])]
        assert cells == ["20 s, 3.2 GiB", "about 26 s, 3.2 GiB", "-"]  # the last one had nothing left to calibrate

    def test_ratio_is_over_bf16_of_the_same_file(self):
        runs = [
            results_of("2026-01-01T00:00:00Z", [floating(10.0), row(15.0)]),
            results_of("2026-01-02T00:00:00Z", [floating(20.0)]),
        ]
        text = accuracy(runs)
        assert "| 20.00 | 1.000 |" in text and "| 15.00 | 1.500 |" in text
        runs.append(results_of("2026-01-02T00:00:01Z", [row(25.0, seed=1)]))
        assert "| 20.00 (15.00 to 25.00, 2 seeds) | 1.375 |" in accuracy(runs)  # 1.5, and 25 / 20
        runs.append(results_of("2026-01-03T00:00:00Z", [floating(12.0), row(18.0), row(18.0, seed=1)]))
        text = accuracy(runs)
        assert "| 18.00 (18.00 to 18.00, 2 seeds) | 1.500 |" in text and "2026-01-01" not in text

    def test_one_table_for_each_calibration_text(self):
        text = one_run(floating(10.0), row(15.0), row(16.0, calibration_corpus="c4"))
        assert text.count("| 10.00 | 1.000 |") == 2
        assert text.count("calibrated on `train`") == text.count("calibrated on `c4`") == 1

    def test_newest_training_alone_is_shown(self):
        """Its rates stand in no column, so seeds of other rates must not slip into the median."""
        old = [row(20.0, seed=seed, **TRAINED) for seed in range(2)] + [row(18.0, **TRAINED | {"epochs": 5})]
        new = [row(12.0, seed=0, **TRAINED | {"learning_rate": 2e-3})]
        text = accuracy([results_of("2026-01-01T00:00:00Z", old), results_of("2026-01-02T00:00:00Z", new)])
        assert [line[7:10] for line in lines_of(text)] == [
            ["5 epochs", "128 x 1,024", "18.00"],
            ["20 epochs", "128 x 1,024", "12.00"],
        ]

    def test_row_without_newer_keys_gives_way_to_a_newer_one(self):
        """Keys that came later are None in rows that do not need them."""
        later = dict.fromkeys(("epochs", "learning_rate", "weight_learning_rate", "batch_size_training"))
        runs = [results_of("2026-01-01T00:00:00Z", [row(15.0)])]
        runs.append(results_of("2026-01-02T00:00:00Z", [row(14.0, **later, validation_sequences=None, task=None)]))
        assert [line[9] for line in lines_of(accuracy(runs))] == ["14.00"]

    def test_committed_results_are_read(self):
        text = accuracy(load_results("accuracy", RESULTS))
        assert text.startswith("**") and "| bf16 |" in text

    def test_no_results(self):
        assert "No results yet" in accuracy([])


def test_long_context_is_set_against_the_short_one():
    long = {"seqlen": 8192, "windows": 2}
    rows = [floating(20.0), row(30.0), row(40.0, mode="dynamic"), row(36.0, rounding="gptq")]
    rows += [floating(16.0, **long), row(24.72, **long), row(32.0, mode="dynamic", **long)]
    text = one_run(*rows)
    assert "Longer contexts: `text` in 2 windows of 8,192 tokens." in text
    assert "|  | perplexity | over bf16 at 2,048 | over bf16 at 8,192 | change |" in text
    assert lines_of(text, 1) == [
        ["bf16", "16.00", "1.000", "1.000", "+0.0 %"],
        ["w4a4kv4 dynamic", "32.00", "2.000", "2.000", "+0.0 %"],
        ["w4a4kv4 static", "24.72", "1.500", "1.545", "+3.0 %"],
    ]
    assert len(lines_of(text)) == 4 and lines_of(one_run(*rows[:4], rows[5]), 1)[0][2:] == ["1.500", "-", "-"]


class TestTasks:
    SCORES = {"piqa_local": (0.8, 0.7, 900), "winogrande_local": (0.6, None, 600)}

    def rows(self, share: float, like: dict, **changes) -> list[dict]:
        rows = []
        for task, (acc, acc_norm, records) in self.SCORES.items():
            norm = (None, None) if acc_norm is None else (acc_norm * share, 0.03)
            scores = {"acc": acc * share, "stderr": 0.04, "acc_norm": norm[0], "acc_norm_stderr": norm[1]}
            setting = {key: value for key, value in like.items() if key not in ("corpus", "seqlen", "windows", "ppl")}
            rows.append(setting | {"task": task, "records": records} | scores | changes)
        return rows

    def test_average_and_ratio_with_standard_errors(self):
        text = one_run(*self.rows(1.0, floating(0)), *self.rows(0.9, row(0, rounding="gptq", **TRAINED)))
        assert "|  | piqa (900) | winogrande (600) | average | over bf16 |" in text
        error = math.hypot(0.03, 0.04) / 2
        ratio = math.hypot(error, 0.9 * error) / 0.65
        assert lines_of(text) == [
            ["bf16", "70.0 ± 3.0", "60.0 ± 4.0", f"65.0 ± {100 * error:.1f}", "1.000"],
            [
                "w4a4kv4 static, gptq, fine-tuned",
                *("63.0 ± 3.0", "54.0 ± 4.0", f"58.5 ± {100 * error:.1f}", f"0.900 ± {ratio:.3f}"),
            ],
        ]
        assert text.startswith("**m**: zero-shot accuracy") and "commit abc1234" in text

    def test_no_ratio_of_what_cannot_be_compared(self):
        base, tuned = self.rows(1.0, floating(0)), self.rows(0.9, row(0))
        assert lines_of(one_run(*base, *tuned[:1]))[-1][1:] == ["63.0 ± 3.0", "-", "-", "-"]
        failed = [tuned[0], {**tuned[1], "error": "x"}]
        assert lines_of(one_run(*base, *failed))[-1][1:] == ["63.0 ± 3.0", "failed", "-", "-"]
        fewer = [tuned[0] | {"records": 10}, tuned[1]]
        text = one_run(*base, *fewer)
        assert lines_of(text)[-1][-1] == "-" and "piqa (10 or 900)" in text
        assert lines_of(one_run(*tuned))[-1][-1] == "-"  # without bf16
        alone = self.rows(0.9, row(0), stderr=None, acc_norm_stderr=None, records=1)
        assert lines_of(one_run(*self.rows(1.0, floating(0), records=1), *alone))[-1][1:] == [
            *("63.0", "54.0", "58.5", "0.900")
        ]

    def test_beside_perplexity(self):
        text = one_run(floating(20.0), row(30.0), *self.rows(1.0, floating(0)), *self.rows(0.9, row(0)))
        assert len(lines_of(text)) == 2 and text.index("perplexity on") < text.index("zero-shot") < text.index("commit")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "w4a4kv4 static"),
        ({"prefix": False, "rotation": False, "search": "none"}, "w4a4kv4 static, no rotation, no prefix, search none"),
        ({"balance": False}, "w4a4kv4 static, no balance"),
        ({"rounding": "gptq", "finetuned": True}, "w4a4kv4 static, gptq, fine-tuned"),
    ],
)
def test_label(changes, expected):
    assert label(row(1.0, **changes)) == expected
    assert label(floating(1.0)) == "bf16" and label(floating(1.0, prefix=True)) == "bf16, prefix"
