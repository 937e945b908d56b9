"""Results files, and the README's sections that are made from them."""

import json
import os
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks import results_file, tables
from benchmarks.command import command_line
from benchmarks.results_file import Results, ResultsFile, load_results, newest_rows

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

    def test_both_of_one_second_begun_before_either_wrote(self, tmp_path):
        files = [ResultsFile(results_of("2026-01-02T03:04:05Z", []), tmp_path) for _ in range(3)]
        for seed in (0, 1):
            for file in reversed(files):
                file.append({"seed": seed})
        assert len({file.path for file in files}) == 3
        assert [len(results.rows) for results in load_results("accuracy", tmp_path)] == [2, 2, 2]
        assert len(os.listdir(tmp_path)) == 3

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

    def test_goes_on_with_the_newest_file_of_the_same_run(self, tmp_path, caplog):
        rows = [{"seed": 0, "ppl": 1.0}, {"seed": 1, "error": "OutOfMemoryError"}]
        paths = [write(results_of(f"2026-01-0{day}T00:00:00Z", rows[:day]), tmp_path).path for day in (1, 2)]
        now = results_of("2026-02-01T00:00:00Z", [])
        others = [replace(now, **change) for change in ({"command": "c"}, {"commit": "c"}, {"device": "cpu"})]
        for other in others:
            assert ResultsFile.go_on(other, tmp_path).path not in paths
        assert "of another commit" in caplog.text and "of another device" in caplog.text
        file = ResultsFile.go_on(now, tmp_path)
        assert file.path == paths[1] and file.results.date == "2026-01-02T00:00:00Z" and file.results.rows == rows[:1]
        assert load_results("accuracy", tmp_path)[1].rows == rows  # the failure stands until there is something better
        file.append({"seed": 1, "ppl": 2.0})
        assert load_results("accuracy", tmp_path)[1].rows == [rows[0], {"seed": 1, "ppl": 2.0}]
        assert len(os.listdir(tmp_path)) == 2
        assert ResultsFile.go_on(now, tmp_path / "empty").results.rows == []

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

    @pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}', "[1]", "{}"])
    def test_broken_file_is_named(self, tmp_path, text):
        if text in ("[1]", "{}"):  # as rows
            whole = asdict(results_of("2026-01-02T03:04:05Z", []))
            text = json.dumps(whole | {"rows": json.loads(text)})
        (tmp_path / "accuracy-x.json").write_text(text)
        with pytest.raises(ValueError, match="accuracy-x.json is not a results file"):
            load_results("accuracy", tmp_path)

    def test_command_names_no_folders(self, tmp_path):
        arguments = ["--model", str(tmp_path / "m"), f"--corpus={tmp_path}/t.gz", "--output", "../x/y", "--rows", "w4*"]
        expected = "python -m benchmarks.accuracy --model m --corpus=t.gz --output y --rows 'w4*'"
        assert command_line("benchmarks.accuracy", arguments) == expected
        assert command_line("b", ["--model", "owner/name"]).endswith("--model owner/name")


def floating_row(ppl: float) -> dict:
    row = {"model": "m", "scheme": "bf16", "mode": "none", "path": None, "prefix": False, "rotation": False}
    row |= {"search": None, "rounding": None, "finetuned": False, "corpus": "text", "seqlen": 2048, "windows": 10}
    return row | {"ppl": ppl, "seed": None}


def readme_in(folder: Path) -> Path:
    path = folder / "README.md"
    sections = [section.name for section in tables.SECTIONS[1:]]
    others = "".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->\n" for name in sections)
    text = f"before\n<!-- accuracy:begin -->\nold\n<!-- accuracy:end -->\nafter\n{others}"
    path.write_text(text, encoding="utf-8")
    return path


class TestTables:
    def test_rewrites_between_the_markers_and_checks(self, tmp_path, capsys):
        readme, results = readme_in(tmp_path), tmp_path / "results"
        arguments = ["--readme", str(readme), "--results", str(results)]
        assert tables.main([*arguments, "--check"]) == 1 and "out of date" in capsys.readouterr().err
        assert tables.main(arguments) == 0
        assert readme.read_text().count("No results yet") == len(tables.SECTIONS) and "old" not in readme.read_text()
        assert tables.main([*arguments, "--check"]) == 0
        write(results_of("2026-01-01T00:00:00Z", [floating_row(10.0)]), results)
        assert tables.main([*arguments, "--check"]) == 1
        assert tables.main(arguments) == tables.main([*arguments, "--check"]) == 0
        text = readme.read_text()
        assert text.startswith("before\n<!-- accuracy:begin -->\n**m**") and "accuracy:end -->\nafter\n<!-- cal" in text
        assert "| 10.00 | 1.000 |" in text and text.count("No results yet") == len(tables.SECTIONS) - 1

    @pytest.mark.parametrize("text", ["no markers", "<!-- accuracy:end -->\n<!-- accuracy:begin -->\n"])
    def test_readme_without_markers(self, tmp_path, text):
        with pytest.raises(ValueError, match="accuracy:begin"):
            tables.updated(text, tmp_path)

    def test_this_readme_is_up_to_date(self):
        assert tables.main(["--check"]) == 0
