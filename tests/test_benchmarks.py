"""Results files, the accuracy benchmark from end to end on a tiny model, and the tables made from it."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import accuracy, results_file, tables
from benchmarks.command import command_line
from benchmarks.results_file import Results, ResultsFile, load_results, newest_rows
from pq_ao.data import BLANK_LINE, load_text

KEYS = ("model", "seed")


def results_of(date: str, rows: list[dict], benchmark: str = "accuracy") -> Results:
    versions = {"torch": "2.13.0", "triton": None}
    return Results(benchmark, date, "abc1234", "NVIDIA H200", versions, "python -m benchmarks.accuracy", rows)


def write(results: Results, folder: Path) -> ResultsFile:
    file = ResultsFile(replace(results, rows=[]), folder)
    for row in results.rows:
        file.append(row)
    return file


class TestResultsFile:
    def test_round_trip(self, tmp_path):
        written = results_of("2026-01-02T03:04:05Z", [{"model": "a", "ppl": 1.25, "error": None}, {"model": "\u00e9"}])
        path = write(written, tmp_path / "new" / "folder").path
        assert path.name == "accuracy-2026-01-02-030405-nvidia-h200.json"
        assert load_results("accuracy", path.parent) == [written]
        assert list(json.loads(path.read_text())) == [
            "benchmark",
            "date",
            "commit",
            "device",
            "versions",
            "command",
            "rows",
        ]

    def test_begin_on_the_cpu(self, tmp_path, monkeypatch):
        monkeypatch.setenv(results_file.COMMIT_VARIABLE, "fedcba9")
        results = Results.begin("kernels", "python -m benchmarks.kernels")
        assert results.commit == "fedcba9" and results.device.startswith("cpu ")
        assert set(results.versions) == {"torch", "torchao", "transformers", "triton", "cuda", "python"}
        assert results.date.endswith("Z") and results.rows == []
        assert ResultsFile(results, tmp_path).path.name.endswith("-cpu.json")

    def test_commit_of_git_or_unknown(self, tmp_path, monkeypatch):
        monkeypatch.delenv(results_file.COMMIT_VARIABLE, raising=False)
        monkeypatch.setattr(results_file, "ROOT", tmp_path)
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        assert results_file.commit() == "unknown"
        subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", *identity, "commit", "-q", "--allow-empty", "--no-verify", "-m", "x"]
        subprocess.run(command, cwd=tmp_path, check=True)
        assert 7 <= len(results_file.commit()) <= 40

    def test_same_second_takes_another_name(self, tmp_path):
        first, second = (write(results_of("2026-01-02T03:04:05Z", [{"seed": i}]), tmp_path) for i in range(2))
        assert first.path != second.path
        assert [results.rows for results in load_results("accuracy", tmp_path)] == [[{"seed": 0}], [{"seed": 1}]]

    def test_interrupted_run_keeps_its_rows(self, tmp_path, monkeypatch):
        file = write(results_of("2026-01-02T03:04:05Z", [{"seed": 0}, {"seed": 1}]), tmp_path)

        def interrupted(source, target):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            file.append({"seed": 2})
        monkeypatch.undo()
        assert load_results("accuracy", tmp_path)[0].rows == [{"seed": 0}, {"seed": 1}]
        assert os.listdir(tmp_path) == [file.path.name]

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
    def test_row_that_json_cannot_hold(self, tmp_path, value):
        file = write(results_of("2026-01-02T03:04:05Z", [{"seed": 0}]), tmp_path)
        with pytest.raises((TypeError, ValueError)):
            file.append({"ppl": value})
        file.append({"seed": 1})
        assert load_results("accuracy", tmp_path)[0].rows == [{"seed": 0}, {"seed": 1}]

    def test_newest_row_wins(self, tmp_path):
        new = results_of("2026-02-01T00:00:00Z", [{"model": "a", "seed": 0, "ppl": 2.0}])
        old = results_of(
            "2026-01-01T00:00:00Z", [{"model": "a", "seed": 0, "ppl": 1.0}, {"model": "a", "seed": 1, "ppl": 3.0}]
        )
        again = results_of("2026-03-01T00:00:00Z", [{"model": "b", "ppl": 4.0}, {"model": "b", "ppl": 5.0}])
        other = results_of("2026-04-01T00:00:00Z", [{"model": "a", "seed": 0, "ppl": 9.0}], "accuracy-of-others")
        for results in (new, old, again, other):
            write(results, tmp_path)
        found = newest_rows(load_results("accuracy", tmp_path), KEYS)
        assert [(row["ppl"], run.date[:7]) for row, run in found] == [
            (2.0, "2026-02"),
            (3.0, "2026-01"),
            (5.0, "2026-03"),
        ]

    def test_no_results(self, tmp_path):
        assert load_results("accuracy", tmp_path / "missing") == []

    @pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}'])
    def test_broken_file_is_named(self, tmp_path, text):
        (tmp_path / "accuracy-x.json").write_text(text)
        with pytest.raises(ValueError, match="accuracy-x.json is not a results file"):
            load_results("accuracy", tmp_path)

    def test_command_names_no_folders(self, tmp_path):
        arguments = ["--model", str(tmp_path / "m"), f"--corpus={tmp_path}/t.gz", "--output", "../x/y", "--rows", "w4*"]
        expected = "python -m benchmarks.accuracy --model m --corpus=t.gz --output y --rows 'w4*'"
        assert command_line("benchmarks.accuracy", arguments) == expected
        assert command_line("b", ["--model", "owner/name"]).endswith("--model owner/name")


@pytest.fixture(scope="module")
def files(tmp_path_factory, make_tiny, tiny_tokenizer, english) -> Path:
    """A folder with a tiny model, a text to measure on and one to calibrate on."""
    folder = tmp_path_factory.mktemp("accuracy")
    model = make_tiny("llama")
    model.save_pretrained(folder / "tiny")
    tiny_tokenizer.save_pretrained(folder / "tiny")
    (folder / "test.txt").write_text(load_text("embedded", "test")[:4000], encoding="utf-8")
    (folder / "train.txt").write_text(BLANK_LINE.join(english)[:20000], encoding="utf-8")
    return folder


def options(files: Path, output: Path, *more: str) -> list[str]:
    texts = ["--corpus", str(files / "test.txt"), "--calibration", str(files / "train.txt")]
    sizes = ["--sequence-length", "64", "--windows", "3", "--num-sequences", "2", "--calibration-length", "64"]
    where = ["--model", str(files / "tiny"), "--device", "cpu", "--output", str(output)]
    return [*where, *texts, *sizes, *more]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore::pq_ao.prefix.PrefixWarning")
class TestAccuracy:
    def test_from_end_to_end(self, files, tmp_path, capsys):
        rows = ["--rows", "bf16*", "w4a4kv4-static", "*-reference", "*-dynamic", "--seeds", "0", "1"]
        assert accuracy.main(options(files, tmp_path, *rows, "--reference-windows", "2")) == 0
        (results,) = load_results("accuracy", tmp_path)
        assert str(files) not in (tmp_path / os.listdir(tmp_path)[0]).read_text()
        found = [(r["scheme"], r["mode"], r["path"], r["prefix"], r["seed"], r["windows"]) for r in results.rows]
        assert found == [
            ("bf16", "none", None, False, None, 3),
            ("bf16", "none", None, True, 0, 3),
            ("w4a4kv4", "static", "integer", True, 0, 3),
            ("w4a4kv4", "static", "reference", True, 0, 2),
            ("w4a4kv4", "static", "integer", True, 1, 3),
            ("w4a4kv4", "dynamic", "integer", True, 0, 3),
        ]
        plain, behind_prefix, static, reference, _, dynamic = results.rows
        assert {"model": "tiny", "corpus": "test.txt", "seqlen": 64}.items() <= plain.items()
        assert plain["prefix_ids"] == [] and plain["calibration_corpus"] is None
        assert static["calibration_corpus"] == "train.txt" and static["prefix_ids"] == behind_prefix["prefix_ids"] != []
        assert (static["search"], dynamic["search"], static["rounding"]) == ("tensor", "none", "nearest")
        assert static["calibration_seconds"] > 0 and static["evaluation_seconds"] > 0 and static["peak_gib"] is None
        # a random model is as bad in any arithmetic; the same windows in two of them differ by flipped codes only
        assert all(row["ppl"] > 10 for row in results.rows)
        assert reference["ppl"] == pytest.approx(reference["integer_ppl"], rel=0.05)
        printed = capsys.readouterr().out
        assert f"w4a4kv4-static, seed 1: {results.rows[4]['ppl']:.4f}" in printed
        assert "| w4a4kv4 | static | yes | tensor | nearest |" in printed and "2 seeds" in printed

    def test_failing_row_does_not_stop_the_others(self, files, tmp_path, monkeypatch, capsys):
        calibrate = accuracy.pq_ao.calibrate

        def fails_once(model, tokenizer, config, **kwargs):
            if config.scheme == "w4a8kv4":
                raise RuntimeError("no luck\nand a long story")
            return calibrate(model, tokenizer, config, **kwargs)

        monkeypatch.setattr(accuracy.pq_ao, "calibrate", fails_once, raising=False)
        assert accuracy.main(options(files, tmp_path, "--rows", "w4a8kv4-static", "w8a8kv8-static")) == 1
        failed, good = load_results("accuracy", tmp_path)[0].rows
        assert failed["error"] == "RuntimeError: no luck" and failed["ppl"] is None and failed["scheme"] == "w4a8kv4"
        assert "error" not in good and good["ppl"] > 1
        assert "| w4a8kv4 | static | yes | tensor | nearest | failed | - |" in capsys.readouterr().out

    def test_test_text_is_no_calibration_text(self, files, tmp_path, capsys):
        arguments = options(files, tmp_path, "--calibration", str(files / "test.txt"))
        assert accuracy.main(arguments) == 2
        assert "--calibration" in capsys.readouterr().err and not os.listdir(tmp_path)
        with pytest.raises(ValueError, match="--calibration"):
            accuracy.refuse_overlap("one two three", " two ")

    @pytest.mark.parametrize("more", [["--rows", "w2*"], ["--windows", "100000"]])
    def test_arguments_that_do_not_fit(self, files, tmp_path, capsys, more):
        assert accuracy.main(options(files, tmp_path, *more)) == 2
        assert more[0] in capsys.readouterr().err

    def test_all_rows_by_default(self):
        jobs = accuracy.jobs(["*"], [0, 1, 2])
        names = [name for _, _, settings in jobs for name in settings]
        assert set(names) == set(accuracy.SETTINGS) and names.count("w4a4kv4-static") == 3
        assert len(names) == len(accuracy.SETTINGS) + 2  # the other rows once
        assert len({(calibration, seed) for calibration, seed, _ in jobs}) == len(jobs)

    def test_name_of_a_model(self, tmp_path):
        assert accuracy.model_name("owner/name") == "owner/name"
        assert accuracy.model_name(tmp_path / "folder") == "folder"
        (tmp_path / "source.json").write_text('{"kind": "gguf", "file": "Some-Model.Q4_1.gguf"}')
        assert accuracy.model_name(tmp_path) == "Some-Model.Q4_1"


CALIBRATED = {"calibration_corpus": "train", "calibration_sequences": 16, "calibration_length": 1024}


def accuracy_row(ppl: float | None, **changes) -> dict:
    row = {"model": "m", "scheme": "w4a4kv4", "mode": "static", "path": "integer", "prefix": True, "rotation": True}
    row |= {"search": "tensor", "rounding": "nearest", "finetuned": False, "corpus": "text", "seqlen": 2048}
    return row | {"windows": 10, "ppl": ppl, "seed": 0} | CALIBRATED | changes


def floating_row(ppl: float, **changes) -> dict:
    row = {"scheme": "bf16", "mode": "none", "path": None, "prefix": False, "rotation": False, "seed": None}
    row |= {"search": None, "rounding": None} | dict.fromkeys(CALIBRATED)
    return accuracy_row(ppl, **row | changes)


def readme_in(folder: Path) -> Path:
    path = folder / "README.md"
    sections = ("generation", "kernels")
    others = "".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->\n" for name in sections)
    text = f"before\n<!-- accuracy:begin -->\nold\n<!-- accuracy:end -->\nafter\n{others}"
    path.write_text(text, encoding="utf-8")
    return path


class TestTables:
    def test_median_range_and_ratio(self):
        rows = [accuracy_row(ppl, seed=seed) for seed, ppl in enumerate((30.0, 36.0, 33.0))]
        rows += [accuracy_row(None, prefix=False, error="x"), floating_row(20.0), accuracy_row(5.0, windows=2)]
        rows += [floating_row(19.0, prefix=True, rotation=True, seed=0, **CALIBRATED)]
        rows += [accuracy_row(31.0, path="reference", windows=2, integer_ppl=31.5)]
        text = tables.accuracy([results_of("2026-01-01T00:00:00Z", rows)])
        lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
        assert lines == [
            "| bf16 |  | no |  |  | 20.00 | 1.000 |",
            "| bf16 |  | yes |  |  | 19.00 | 0.950 |",
            "| w4a4kv4 | static | yes | tensor | nearest | 33.00 (30.00 to 36.00, 3 seeds) | 1.650 |",
            "| w4a4kv4 | static | no | tensor | nearest | failed | - |",
        ]
        assert "10 windows of 2,048 tokens; calibrated on 16 x 1,024 tokens of `train`" in text
        assert "2026-01-01 on NVIDIA H200 (torch 2.13.0), commit abc1234" in text
        assert "first 2 windows: 31.500 with integers, 31.000 with" in text

    def test_ratio_is_over_bf16_of_the_same_file(self):
        runs = [
            results_of("2026-01-01T00:00:00Z", [floating_row(10.0), accuracy_row(15.0)]),
            results_of("2026-01-02T00:00:00Z", [floating_row(20.0)]),
        ]
        text = tables.accuracy(runs)
        assert "| 20.00 | 1.000 |" in text and "| 15.00 | 1.500 |" in text
        runs.append(results_of("2026-01-02T00:00:01Z", [accuracy_row(25.0, seed=1)]))
        assert "| 20.00 (15.00 to 25.00, 2 seeds) | 1.375 |" in tables.accuracy(runs)  # 1.5, and 25 / 20
        runs.append(
            results_of("2026-01-03T00:00:00Z", [floating_row(12.0), accuracy_row(18.0), accuracy_row(18.0, seed=1)])
        )
        text = tables.accuracy(runs)
        assert "| 18.00 (18.00 to 18.00, 2 seeds) | 1.500 |" in text and "2026-01-01" not in text

    def test_one_table_for_each_calibration(self):
        rows = [floating_row(10.0), accuracy_row(15.0), accuracy_row(16.0, calibration_corpus="c4")]
        text = tables.accuracy([results_of("2026-01-01T00:00:00Z", rows)])
        assert text.count("| 10.00 | 1.000 |") == 2
        assert text.count("tokens of `train`") == text.count("tokens of `c4`") == 1

    def test_rewrites_between_the_markers_and_checks(self, tmp_path, capsys):
        readme, results = readme_in(tmp_path), tmp_path / "results"
        arguments = ["--readme", str(readme), "--results", str(results)]
        assert tables.main([*arguments, "--check"]) == 1 and "out of date" in capsys.readouterr().err
        assert tables.main(arguments) == 0
        assert readme.read_text().count("No results yet") == 3 and "old" not in readme.read_text()
        assert tables.main([*arguments, "--check"]) == 0
        write(results_of("2026-01-01T00:00:00Z", [floating_row(10.0)]), results)
        assert tables.main([*arguments, "--check"]) == 1
        assert tables.main(arguments) == tables.main([*arguments, "--check"]) == 0
        text = readme.read_text()
        assert text.startswith("before\n<!-- accuracy:begin -->\n**m**") and "accuracy:end -->\nafter\n<!-- gen" in text
        assert "| 10.00 | 1.000 |" in text and text.count("No results yet") == 2

    @pytest.mark.parametrize("text", ["no markers", "<!-- accuracy:end -->\n<!-- accuracy:begin -->\n"])
    def test_readme_without_markers(self, tmp_path, text):
        with pytest.raises(ValueError, match="accuracy:begin"):
            tables.updated(text, tmp_path)

    def test_this_readme_is_up_to_date(self):
        assert tables.main(["--check"]) == 0
