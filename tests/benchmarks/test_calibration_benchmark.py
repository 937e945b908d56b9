"""The benchmark of calibration time, on a tiny shape."""

import json

import pytest

from benchmarks import calibration
from benchmarks.calibration_table import calibration as table
from benchmarks.results_file import load_results

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tiny(monkeypatch, tiny_tokenizer, english, tmp_path):
    """Arguments for a shape, a tokenizer and a text that are tiny."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setattr(calibration, "_LLAMA_3_8B", shape)
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("\n\n".join(english))
    sizes = "--num-sequences 4 --calibration-length 32 --finetune-sequences 4 --finetune-length 32"
    places = ["--tokenizer", str(tmp_path / "tokenizer"), "--calibration", str(tmp_path / "text.txt")]
    others = ["--validation-sequences", "2", "--output", str(tmp_path / "out"), "--device", "cpu"]
    return [*sizes.split(), *places, *others]


def test_every_step_is_measured_and_extrapolated(tiny, tmp_path):
    assert calibration.main([*tiny, "--layers", "2", "--epochs", "5", "--measured-epochs", "1"]) == 0
    (run,) = load_results("calibration", tmp_path / "out")
    assert [row["step"] for row in run.rows] == list(calibration.STEPS)
    for row in run.rows:
        assert row["seconds_per_block"] > 0
        assert row["minutes"] == pytest.approx(row["seconds_per_block"] * 32 / 60)
    text = table([run])
    assert "| fine-tuning | 4 x 32 | 5 (1 run) |" in text and run.command in text


def test_what_fails_is_recorded_and_the_rest_goes_on(tiny, tmp_path):
    options = ["--layers", "1", "--finetune-sequences", "100000", "--steps", "finetune", "gptq"]
    assert calibration.main([*tiny, *options]) == 1
    (run,) = load_results("calibration", tmp_path / "out")
    assert "num_sequences" in run.rows[0]["error"] and run.rows[1]["seconds_per_block"] > 0
    assert "failed" in table([run])
    json.dumps(run.rows)


def test_without_results_the_table_says_how_to_make_them():
    assert "python -m benchmarks.calibration" in table([])
