"""recipes/evaluate.py: its numbers are those of `pq_ao.perplexity` and `pq_ao.evaluate_tasks`."""

import json

import pytest
from transformers import AutoModelForCausalLM

import pq_ao
from recipes import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")


def test_perplexity_of_texts_and_lengths(checkpoint, tiny_tokenizer, tmp_path, capsys):
    text, path = tmp_path / "text.txt", tmp_path / "results" / "run.json"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    flags = "--sequence-length 64 32 --windows 2 --batch-size 2 --device cpu".split()
    returned = evaluate.main([str(checkpoint), "--corpus", "embedded", str(text), *flags, "--json", str(path)])
    assert json.loads(path.read_text()) == returned and list(path.parent.iterdir()) == [path]

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    shapes = [(row["corpus"], row["sequence_length"], row["windows"]) for row in returned["perplexity"]]
    assert shapes == [("embedded", 64, 2), ("embedded", 32, 2), ("text.txt", 64, 2), ("text.txt", 32, 2)]
    for row, corpus in zip(returned["perplexity"], ("embedded", "embedded", str(text), str(text)), strict=True):
        length = row["sequence_length"]
        found = pq_ao.perplexity(
            model, tiny_tokenizer, corpus, sequence_length=length, windows=2, batch_size=2, progress=False
        )
        assert row["ppl"] == found.ppl
        assert [row["corpus"], str(length), "2", f"{found.ppl:.3f}"] in [line[:4] for line in lines]


def test_tasks(checkpoint, tiny_tokenizer, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    record = {"goal": "Open a jar", "sol1": "Turn the lid", "sol2": "Turn the table", "label": 0}
    (tmp_path / "piqa.jsonl").write_text((json.dumps(record) + "\n") * 3)
    flags = ["--tasks", "piqa_local", "--task-data", str(tmp_path), "--limit", "2", "--device", "cpu"]
    returned = evaluate.main([str(checkpoint), *flags])
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    expected = pq_ao.evaluate_tasks(model, tiny_tokenizer, pq_ao.local_tasks(tmp_path, ["piqa_local"]), 1, 2)
    assert returned["tasks"] == expected and returned["perplexity"] == []
    (line,) = (line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("piqa_local"))
    assert line[1] == f"{expected[0]['acc']:.3f}" and line[-1] == "2"


def test_what_is_measured_is_kept_where_the_rest_fails(checkpoint, tmp_path):
    short, path = tmp_path / "short.txt", tmp_path / "results.json"
    short.write_text("Too short.")
    flags = ["--sequence-length", "64", "--windows", "1", "--device", "cpu", "--json", str(path)]
    with pytest.raises(ValueError, match="text has only"):
        evaluate.main([str(checkpoint), "--corpus", "embedded", str(short), *flags])
    assert [row["corpus"] for row in json.loads(path.read_text())["perplexity"]] == ["embedded"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--corpus nowhere.txt", "--corpus='nowhere.txt' is neither"),
        ("--corpus embedded --sequence-length 32 4096", "--sequence-length 4096: the model's context is 512 tokens"),
        ("--windows 0", "--windows: 0: give a whole number of at least 1"),
        ("--tasks piqa_local", "--tasks piqa_local: its records are local; add --task-data FOLDER"),
        ("--task-data data", "--task-data: without effect here; add --tasks"),
        ("--limit 3", "--limit: without effect here; add --tasks"),
        ("--tasks piqa --task-data data", "--task-data: is for the tasks called *_local"),
    ],
)
def test_refused(checkpoint, flags, words, capsys):
    with pytest.raises((SystemExit, ValueError)) as refused:
        evaluate.main([str(checkpoint), "--device", "cpu", *flags.split()])
    assert words in capsys.readouterr().err + str(refused.value)
