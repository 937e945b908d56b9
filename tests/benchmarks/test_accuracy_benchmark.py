"""The accuracy benchmark from end to end on a tiny model: its rows, its resuming, and what it refuses."""

import json
import os
from pathlib import Path

import pytest

from benchmarks import accuracy, accuracy_run, model_source
from benchmarks.accuracy_settings import CALIBRATIONS, HEADLINE, SETTINGS, jobs, longest_first
from benchmarks.accuracy_texts import refuse_overlap
from benchmarks.results_file import COMMIT_VARIABLE, Results, ResultsFile, Row, load_results
from benchmarks.run_lock import run_lock
from pq_ao.data import BLANK_LINE, load_text
from pq_ao.journal import CalibrationJournal

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::pq_ao.prefix.PrefixWarning"),
]

UNTRAINED = "w4a4kv4-static"
# what two runs of the same command may differ in
TIMES = ("calibration_seconds", "finetuning_seconds", "evaluation_seconds", "restored_blocks")


@pytest.fixture(scope="module")
def files(tmp_path_factory, make_tiny, tiny_tokenizer, english) -> Path:
    """A folder with a tiny model, a text to measure on, two to calibrate on, and records of tasks."""
    folder = tmp_path_factory.mktemp("accuracy")
    make_tiny("llama").save_pretrained(folder / "tiny")
    tiny_tokenizer.save_pretrained(folder / "tiny")
    (folder / "test.txt").write_text(load_text("embedded", "test")[:4000], encoding="utf-8")
    (folder / "train.txt").write_text(BLANK_LINE.join(english)[:12000], encoding="utf-8")
    (folder / "more.txt").write_text(BLANK_LINE.join(english)[12000:20000], encoding="utf-8")
    (folder / "tasks").mkdir()
    arc = {"question": {"stem": "What is hot?", "choices": [{"text": t, "label": t[0]} for t in ("Ice", "Fire")]}}
    records = {
        "piqa": {"goal": "To open a door", "sol1": "turn the knob.", "sol2": "eat the knob.", "label": 0},
        "arc_easy": arc | {"answerKey": "F"},
        "arc_challenge": arc | {"answerKey": "I"},
        "hellaswag": {"query": "Cooking: A man", "endings": ["cooks an egg.", "flies.", "is blue."], "label": 0},
        "winogrande": {"sentence": "The _ barked.", "option1": "dog", "option2": "stone", "answer": "1"},
    }
    for name, record in records.items():
        (folder / "tasks" / f"{name}.jsonl").write_text(f"{json.dumps(record)}\n" * 2, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def commit(monkeypatch):
    """The same for all runs of a test, whoever commits meanwhile."""
    monkeypatch.setenv(COMMIT_VARIABLE, "abc1234")


def options(files: Path, output: Path, *more: str) -> list[str]:
    texts = ["--corpus", str(files / "test.txt"), "--calibration", str(files / "train.txt"), str(files / "more.txt")]
    sizes = ["--sequence-length", "64", "--windows", "3", "--num-sequences", "2", "--calibration-length", "64"]
    training = ["--finetune-sequences", "4", "--finetune-length", "32", "--validation-sequences", "2", "--epochs", "1"]
    where = ["--model", str(files / "tiny"), "--device", "cpu", "--output", str(output)]
    return [*where, *texts, *sizes, *training, *more]


def rows_in(folder: Path) -> list[Row]:
    (results,) = load_results("accuracy", folder)
    return results.rows


def untimed(rows: list[Row]) -> list[Row]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def chosen(row: Row, *keys: str) -> tuple:
    return tuple(row[key] for key in keys)


class TestRows:
    def test_from_end_to_end(self, files, tmp_path, capsys):
        rows = ["--rows", "bf16*", UNTRAINED, HEADLINE, f"{HEADLINE}-reference", "--seeds", "5", "1"]
        lengths = ["--reference-windows", "2", "--long-context", "96", "--long-context-rows", "*"]
        assert accuracy.main(options(files, tmp_path, *rows, *lengths)) == 0
        assert str(files) not in (tmp_path / os.listdir(tmp_path)[0]).read_text()
        found = rows_in(tmp_path)
        keys = ("scheme", "path", "prefix", "rounding", "finetuned", "seed", "seqlen", "windows")
        both = ((64, 3), (96, 2))
        assert [chosen(row, *keys) for row in found] == [
            *(("bf16", None, False, None, False, None, *text) for text in both),
            *(("bf16", None, True, None, False, 5, *text) for text in both),
            *(("w4a4kv4", "integer", True, "nearest", False, 5, *text) for text in both),
            *(("w4a4kv4", "integer", True, "nearest", False, 1, *text) for text in both),
            *(("w4a4kv4", "integer", True, "gptq", True, 5, *text) for text in both),
            ("w4a4kv4", "reference", True, "gptq", True, 5, 64, 2),
            *(("w4a4kv4", "integer", True, "gptq", True, 1, *text) for text in both),
        ]
        plain, _, prefix, _, static, *_ = found
        headline, reference = found[8], found[10]
        assert {"model": "tiny", "corpus": "test.txt", "mode": "none"}.items() <= plain.items()
        assert static["calibration_corpus"] == "train.txt + more.txt" and static["prefix_ids"] == prefix["prefix_ids"]
        sizes = ("calibration_sequences", "calibration_length", "epochs", "validation_sequences", "learning_rate")
        assert chosen(static, *sizes) == (2, 64, None, None, None)
        assert chosen(headline, *sizes) == (4, 32, 1, 2, 3e-3) and headline["stopped_blocks"] == []
        assert static["calibration_seconds"] > 0 and static["evaluation_seconds"] > 0
        assert static["finetuning_seconds"] is None
        assert 0 < headline["finetuning_seconds"] < headline["calibration_seconds"]
        assert static["peak_gib"] is None and static["calibration_peak_gib"] is None  # there is no GPU
        # a random model is as bad in any arithmetic; the same windows in two of them differ by flipped codes only
        assert all(row["ppl"] > 10 for row in found)
        assert reference["ppl"] == pytest.approx(reference["integer_ppl"], rel=0.05)
        printed = capsys.readouterr().out
        assert f"{UNTRAINED}, seed 1, 3 x 64 tokens: {found[6]['ppl']:.4f}" in printed
        line = "| w4a4kv4 | static | yes | yes | yes | tensor | gptq | 1 epoch, 3 end to end | 4 x 32 |"
        assert line in printed and "2 seeds" in printed
        assert "| w4a4kv4 static, gptq, fine-tuned, end to end |" in printed

    @pytest.mark.slow
    def test_every_row_can_be_measured(self, files, tmp_path):
        assert accuracy.main(options(files, tmp_path, "--seeds", "0", "--tasks", str(files / "tasks"))) == 0
        found = rows_in(tmp_path)
        texts = [row for row in found if "task" not in row]
        assert len(texts) == len(SETTINGS)
        switches = ("scheme", "mode", "prefix", "rotation", "balance", "search", "rounding", "finetuned")
        measured = {chosen(row, *switches) for row in texts if row["path"] == "integer"}
        assert measured == {tuple(getattr(c, name) for name in switches) for c in CALIBRATIONS.values()}
        assert all((row["prefix_ids"] != []) == row["prefix"] for row in texts if row["scheme"] != "bf16")

    def test_tasks(self, files, tmp_path, capsys):
        arguments = ["--tasks", str(files / "tasks"), "--rows", "bf16", UNTRAINED, "--task-rows", "bf16", "w4a4*"]
        assert accuracy.main(options(files, tmp_path, *arguments, "--seeds", "3", "4")) == 0
        found = rows_in(tmp_path)
        names = ["piqa_local", "arc_easy_local", "arc_challenge_local", "hellaswag_local", "winogrande_local"]
        expected = [(None, None), *((name, None) for name in names), (None, 3), *((name, 3) for name in names)]
        assert [(row.get("task"), row["seed"]) for row in found] == [*expected, (None, 4)]  # tasks: the first seed
        for row in found:
            if "task" in row:
                assert row["acc"] in (0.0, 0.5, 1.0) and row["records"] == 2 and "ppl" not in row
                assert (row["acc_norm"] is None) == (row["task"] == "winogrande_local")
        assert "|  | piqa (2) | arc_easy (2) |" in capsys.readouterr().out

    def test_no_tasks_on_the_reference_path(self, files, tmp_path):
        name = f"{HEADLINE}-reference"
        more = ["--tasks", str(files / "tasks"), "--rows", name, "bf16", "--task-rows", "*"]
        arguments = accuracy.parse(options(files, tmp_path, *more))
        todo = jobs(arguments.rows, arguments.seeds)
        run = accuracy_run.AccuracyRun(arguments, todo, ResultsFile(Results.begin("accuracy", "command"), tmp_path))
        found = [measurement for job in todo for measurement in run._measurements(job)]
        assert {"task" in measurement.facts for measurement in found if measurement.name == "bf16"} == {True, False}
        assert ["task" in measurement.facts for measurement in found if measurement.name == name] == [False]

    def test_failing_row_does_not_stop_the_others(self, files, tmp_path, monkeypatch, capsys):
        calibrate = accuracy_run.pq_ao.calibrate

        def fails_once(model, tokenizer, config, **kwargs):
            if config.scheme == "w4a8kv4":
                raise RuntimeError("no luck\nand a long story")
            return calibrate(model, tokenizer, config, **kwargs)

        monkeypatch.setattr(accuracy_run.pq_ao, "calibrate", fails_once, raising=False)
        assert (
            accuracy.main(options(files, tmp_path, "--rows", "w4a8kv4-static", "w8a8kv8-static", "--seeds", "0")) == 1
        )
        failed, good = rows_in(tmp_path)
        assert failed["error"] == "RuntimeError: no luck" and "ppl" not in failed and failed["scheme"] == "w4a8kv4"
        assert "error" not in good and good["ppl"] > 1
        assert "| w4a8kv4 | static | yes | yes | yes | tensor | nearest | no | 2 x 64 | failed | - | - |" in (
            capsys.readouterr().out
        )


class Stopped(BaseException):
    """As good as a kill: nothing of ours handles it."""


def stop_after(monkeypatch, owner, method: str, calls: int) -> None:
    """Ends the process, so to say, right after so many calls of a method."""
    original, left = getattr(owner, method), [calls]

    def counted(self, *args):
        original(self, *args)
        left[0] -= 1
        if left[0] == 0:
            raise Stopped

    monkeypatch.setattr(owner, method, counted)


THREE_ROWS = ("--rows", "bf16", UNTRAINED, f"{UNTRAINED}-tuned", "--seeds", "0")


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory) -> list[Row]:
    """Rows of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    assert accuracy.main(options(files, folder, *THREE_ROWS)) == 0
    return rows_in(folder)


class TestResume:
    # the first block of the tuned row, its last one, a row that was measured, the last row
    @pytest.mark.parametrize(
        ("owner", "method", "calls"),
        [(CalibrationJournal, "keep", 3), (CalibrationJournal, "keep", 4), (ResultsFile, "append", 2)],
    )
    def test_goes_on_where_it_was_stopped(self, files, tmp_path, monkeypatch, whole, capsys, owner, method, calls):
        journals, output = tmp_path / "journals", tmp_path / "output"
        arguments = options(files, output, *THREE_ROWS, "--resume", str(journals))
        with monkeypatch.context() as patch:
            stop_after(patch, owner, method, calls)
            with pytest.raises(Stopped):
                accuracy.main(arguments)
        before = (output / os.listdir(output)[0]).read_text()
        assert len(json.loads(before)["rows"]) == 2
        assert accuracy.main(arguments) == 0
        assert untimed(rows_in(output)) == untimed(whole)
        assert rows_in(output)[:2] == json.loads(before)["rows"]  # not measured again
        restored = calls - 2 if owner is CalibrationJournal else 0
        last = rows_in(output)[2]
        assert last["restored_blocks"] == restored
        # extrapolated from the blocks that were calibrated now, unless all of them were restored
        assert [last[f"{what}_seconds"] is None for what in ("calibration", "finetuning")] == [restored == 2] * 2
        assert "which has 2 rows" in capsys.readouterr().out
        left = [f"{UNTRAINED}-seed0"] if owner is ResultsFile else []  # stopped before it could be deleted
        assert sorted(os.listdir(journals)) == sorted(["run.lock", *left])

    def test_whole_run_is_not_measured_again(self, files, tmp_path, monkeypatch):
        arguments = options(files, tmp_path, "--rows", "bf16", "--resume", str(tmp_path / "journals"))
        assert accuracy.main(arguments) == 0
        (path,) = tmp_path.glob("*.json")
        before = path.read_bytes()
        monkeypatch.setattr(ResultsFile, "append", None)
        assert accuracy.main(arguments) == 0 and path.read_bytes() == before

    def test_failed_row_is_tried_again(self, files, tmp_path, monkeypatch):
        arguments = options(files, tmp_path, "--rows", "bf16", UNTRAINED, "--seeds", "0")
        arguments += ["--resume", str(tmp_path / "journals")]
        with monkeypatch.context() as patch:
            patch.setattr(accuracy_run, "quantize_", None)
            assert accuracy.main(arguments) == 1
        assert ["error" in row for row in rows_in(tmp_path)] == [False, True]
        assert (tmp_path / "journals" / f"{UNTRAINED}-seed0").is_dir()  # so that calibrating is not to be repeated
        assert accuracy.main(arguments) == 0
        assert ["error" in row for row in rows_in(tmp_path)] == [False, False]
        assert rows_in(tmp_path)[1]["restored_blocks"] == 2

    def test_journal_of_another_run(self, files, tmp_path, monkeypatch, caplog):
        journals, row = tmp_path / "journals", ("--rows", UNTRAINED, "--seeds", "0")
        arguments = options(files, tmp_path / "one", *row, "--resume", str(journals))
        stop_after(monkeypatch, CalibrationJournal, "keep", 1)
        with pytest.raises(Stopped):
            accuracy.main(arguments)
        monkeypatch.undo()
        folder = journals / f"{UNTRAINED}-seed0"
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        other = options(files, tmp_path / "two", *row, "--resume", str(journals), "--num-sequences", "3")
        assert accuracy.main(other) == 1
        (failed,) = rows_in(tmp_path / "two")
        assert "holds the journal of another run" in failed["error"] and str(tmp_path) not in failed["error"]
        assert "num_sequences: 2 in the journal, 3 now" in caplog.text
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    def test_results_of_another_run_are_left_alone(self, files, tmp_path, monkeypatch, caplog):
        resume = ("--resume", str(tmp_path / "journals"))
        assert accuracy.main(options(files, tmp_path, "--rows", "bf16", *resume)) == 0
        (first,) = tmp_path.glob("*.json")
        before = first.read_bytes()
        monkeypatch.setenv(COMMIT_VARIABLE, "another")
        assert accuracy.main(options(files, tmp_path, "--rows", "bf16", *resume)) == 0
        assert f"{first.name} is of the same command, but of another commit" in caplog.text
        assert accuracy.main(options(files, tmp_path, "--rows", "bf16*", *resume, "--seeds", "0")) == 0
        assert [len(results.rows) for results in load_results("accuracy", tmp_path)] == [1, 1, 2]
        assert first.read_bytes() == before

    @pytest.mark.parametrize("text", ["{", '{"benchmark": "accuracy"}', "broken rows"])
    def test_results_that_are_none(self, files, tmp_path, capsys, text):
        if text == "broken rows":
            text = json.dumps(vars(Results.begin("accuracy", "command")) | {"rows": [1]})
        (tmp_path / "accuracy-x.json").write_text(text)
        arguments = options(files, tmp_path, "--rows", "bf16", "--resume", str(tmp_path / "journals"))
        assert accuracy.main(arguments) == 2
        assert "accuracy-x.json is not a results file" in capsys.readouterr().err
        assert (tmp_path / "accuracy-x.json").read_text() == text

    def test_one_run_at_a_time(self, files, tmp_path, capsys):
        arguments = options(files, tmp_path, "--rows", "bf16", "--resume", str(tmp_path / "journals"))
        with run_lock(tmp_path / "journals"):
            assert accuracy.main(arguments) == 2
        assert "another run has this folder" in capsys.readouterr().err and not list(tmp_path.glob("*.json"))
        assert accuracy.main(arguments) == accuracy.main(arguments) == 0  # each gives it back


class TestArguments:
    def test_test_text_is_no_calibration_text(self, files, tmp_path, capsys):
        arguments = options(files, tmp_path, "--calibration", str(files / "train.txt"), str(files / "test.txt"))
        assert accuracy.main(arguments) == 2
        assert "--calibration test.txt" in capsys.readouterr().err and not os.listdir(tmp_path)

    def test_overlap(self):
        with pytest.raises(ValueError, match="the whole of one"):
            refuse_overlap("one two three", " two ", "name")
        line = "A sentence of the test text, which is long enough that no other text holds it by chance. " * 2
        with pytest.raises(ValueError, match='1 long lines, one begins "A sentence'):
            refuse_overlap(f"before\n{line}\nafter", f"other\n {line} \nmore", "name")
        refuse_overlap("== Title ==\nthis", "== Title ==\nthat", "name")

    @pytest.mark.parametrize(
        "more",
        [
            ["--rows", "bf16", "w2*"],
            ["--seeds", "0", "0"],
            ["--windows", "100000"],
            ["--long-context", "64"],
            ["--long-context", "2048"],
            ["--long-context-rows", "w9*", "--long-context", "96"],
            ["--num-sequences", "100000", "--rows", UNTRAINED],
            ["--finetune-sequences", "100000", "--rows", HEADLINE],
            ["--learning-rate", "nan"],
            ["--tasks", "missing"],
            ["--task-rows", "w9*", "--tasks", "missing"],
            ["--corpus", "missing.txt"],
        ],
        ids=" ".join,
    )
    def test_that_do_not_fit(self, files, tmp_path, capsys, more):
        assert accuracy.main(options(files, tmp_path, *more)) == 2
        message = capsys.readouterr().err
        named = {"--learning-rate": "learning_rate", "--tasks": "missing", "--corpus": "missing.txt"}
        assert named.get(more[0], more[0]) in message and not os.listdir(tmp_path)

    def test_all_rows_by_default(self):
        found = jobs(["*"], [0, 1, 2])
        names = [name for job in found for name in job.settings]
        assert {name: names.count(name) for name in SETTINGS} == {name: s.seeds for name, s in SETTINGS.items()}
        assert SETTINGS[UNTRAINED].seeds == 3 and SETTINGS[HEADLINE].seeds == 2 and SETTINGS["bf16-prefix"].seeds == 1
        assert len({(job.calibration, job.seed) for job in found}) == len(found)
        trained = [job.calibration is not None and CALIBRATIONS[job.calibration].finetuned for job in found]
        assert trained == sorted(trained)  # what takes long comes last

    def test_name_of_a_model(self, tmp_path):
        assert model_source.model_name("owner/name") == "owner/name"
        assert model_source.model_name(tmp_path / "folder") == "folder"
        (tmp_path / "source.json").write_text('{"kind": "gguf", "file": "Some-Model.Q4_1.gguf"}')
        assert model_source.model_name(tmp_path) == "Some-Model.Q4_1"


class TestProcesses:
    def test_same_rows_as_one_process_and_not_measured_again(self, files, tmp_path, whole):
        more = (*THREE_ROWS, "--processes", "2", "--resume", str(tmp_path / "journals"))
        assert accuracy.main(options(files, tmp_path, *more)) == 0
        found = {row["calibration_sequences"]: row for row in rows_in(tmp_path)}
        assert len(found) == len(whole) == 3
        for row in whole:
            other = found[row["calibration_sequences"]]
            assert other["ppl"] == pytest.approx(row["ppl"], rel=1e-3)
            if row["calibration_sequences"]:
                assert (row["calibrations_at_once"], other["calibrations_at_once"]) == (1, 2)
        (path,) = tmp_path.glob("*.json")
        before = path.read_bytes()
        assert accuracy.main(options(files, tmp_path, *more)) == 0 and path.read_bytes() == before

    def test_longest_begin_first(self):
        order = [CALIBRATIONS[job.calibration] for job in longest_first(jobs(["w4*"], [0, 1]))]
        effort = [(calibration.finetuned, calibration.end_to_end) for calibration in order]
        assert effort == sorted(effort, reverse=True) and effort[0] == (True, True)
