"""Recipes from end to end on a tiny random model."""

import json
import math

import pytest
import torch
from matplotlib import image
from transformers import AutoModelForCausalLM

from pq_ao.finetune import Finetuner
from recipes import finetune, plot_outliers, quantize, quickstart, terminal

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny_folder(make_tiny, tiny_tokenizer, tmp_path_factory):
    """A tiny random model and its tokenizer, as from_pretrained loads them."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = make_tiny("llama", tied=True, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.1)  # it is the head as well: logits of order one
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_quickstart(tiny_folder, tmp_path, capsys):
    settings = "--sequences 2 --length 64 --windows 2 --eval-length 64 --new-tokens 8 --threads 1".split()
    rows = quickstart.main(["--model", str(tiny_folder), "--output", str(tmp_path / "out"), *settings])

    assert set(rows) == set(quickstart.ORDER)
    assert all(math.isfinite(row.ppl) and row.ppl > 1 for row in rows.values())
    dense, rotated = rows[quickstart.FLOAT], rows[quickstart.FLOAT_PREFIX]
    # the same function but for the prefix; a random model cares little for that
    assert rotated.ppl == pytest.approx(dense.ppl, rel=0.1)
    assert rotated.weight_bytes == dense.weight_bytes
    assert dense.kv_bytes < rotated.kv_bytes < 1.01 * dense.kv_bytes
    for name in (quickstart.STATIC, quickstart.DYNAMIC, quickstart.PREFIXQUANT, quickstart.PREFIXQUANT_A8):
        assert dense.weight_bytes / 4 < rows[name].weight_bytes < dense.weight_bytes / 2
        assert dense.kv_bytes / 4 < rows[name].kv_bytes < dense.kv_bytes / 2

    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if line.startswith(quickstart.ORDER)]
    assert [line[:30].rstrip() for line in lines] == list(quickstart.ORDER)
    assert f"{dense.ppl:.2f}" in lines[0]
    assert any(quickstart.QUESTION in line for line in printed)
    assert any(line.startswith("Reply after") and "Tensors alive" in line for line in printed)

    (picture,) = (tmp_path / "out").iterdir()
    assert picture.name == "outliers.png"
    height, width, _ = image.imread(picture).shape
    assert height >= 600 and width >= 1200


@pytest.mark.parametrize("flags", ["--sequences 0", "--new-tokens -1", "--seed x", "--threads 0"])
def test_quickstart_refuses_at_once(flags, capsys):
    with pytest.raises(SystemExit):
        quickstart.main(flags.split())
    assert f"{flags.split()[0]}: {flags.split()[1]}: give a whole number" in capsys.readouterr().err


def test_quickstart_says_where_weights_come_from(tmp_path):
    assert quickstart.origin(tmp_path) == tmp_path.name
    (tmp_path / "source.json").write_text('{"kind": "gguf", "quantization": "Q4_1, dequantized"}')
    assert quickstart.origin(tmp_path) == f"{tmp_path.name} (Q4_1, dequantized)"
    (tmp_path / "source.json").write_text('{"kind": "hub", "hub_id": "someone/something"}')
    assert quickstart.origin(tmp_path) == f"{tmp_path.name} (someone/something)"


FINETUNE = (
    "--num-sequences 48 --sequence-length 64 --validation-sequences 8 --epochs 3 --learning-rate 3e-3 "
    "--weight-learning-rate 0.02 --windows 2 --eval-length 64 --device cpu"
).split()


def _without_times(results: dict) -> dict:
    """`results` without what two runs may differ in."""
    calibration = {name: value for name, value in results["calibration"].items() if not name.endswith("seconds")}
    perplexity = {name: measured | {"seconds": None} for name, measured in results["perplexity"].items()}
    return results | {"calibration": calibration, "perplexity": perplexity}


@pytest.mark.filterwarnings("ignore::pq_ao.PrefixWarning")
def test_finetune_goes_on_to_the_same_results(tiny_folder, tmp_path, capsys, monkeypatch):
    whole, resumed, blocks = tmp_path / "whole", tmp_path / "resumed", tmp_path / "blocks"
    # on so little data, error-compensating rounding leaves nothing to gain
    settings = ["--model", str(tiny_folder), *FINETUNE, "--rounding", "nearest"]
    returned = finetune.main([*settings, "--output", str(whole)])
    printed = capsys.readouterr()
    assert "--resume FOLDER" in printed.err

    assert {file.name for file in whole.iterdir()} == {"finetuning.json", "finetuning.png", "checkpoint"}
    results = json.loads((whole / "finetuning.json").read_text())
    assert results == json.loads(json.dumps(returned))
    histories = results["calibration"]["finetuning"]
    assert len(histories) == 2 and all(history["before"] > finetune.kept_error(history) for history in histories)
    assert results["calibration"]["rounding"] == "nearest" and results["calibration"]["finetune"]["epochs"] == 3
    dense, quantized = (results["perplexity"][name] for name in ("as loaded", "quantized"))
    assert 1 < dense["ppl"] != quantized["ppl"] < 10 * dense["ppl"] and dense["windows"] == quantized["windows"] == 2
    lines = printed.out.splitlines()
    for block, history in enumerate(histories):
        expected = [str(block), f"{history['before']:.3e}", f"{finetune.kept_error(history):.3e}"]
        assert lines[1 + block].split()[:3] == expected
    checkpoint = AutoModelForCausalLM.from_pretrained(whole / "checkpoint")
    assert checkpoint.calibration_record.finetune.epochs == 3
    assert any(f"{dense['ppl']:.2f} as loaded, {quantized['ppl']:.2f} as w4a4kv4 static" in line for line in lines)

    train, trained = Finetuner.train, []

    def interrupted(self, block, index, *arguments):
        trained.append(index)
        if trained == [0, 1]:
            raise KeyboardInterrupt
        return train(self, block, index, *arguments)

    monkeypatch.setattr(Finetuner, "train", interrupted)
    settings += ["--output", str(resumed), "--resume", str(blocks)]
    with pytest.raises(KeyboardInterrupt):
        finetune.main(settings)
    assert str(blocks) in capsys.readouterr().err and not list(resumed.iterdir())
    finetune.main(settings)
    assert trained == [0, 1, 1]
    assert _without_times(json.loads((resumed / "finetuning.json").read_text())) == _without_times(results)


def test_finetune_keeps_the_record_where_the_quantized_model_fails(tiny_folder, tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(quantize, "quantize_", fail)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    monkeypatch.chdir(tiny_folder)
    settings = ["--model", ".", *FINETUNE, "--output", str(tmp_path / "out"), "--epochs", "1"]
    with pytest.raises(RuntimeError, match="out of memory"):
        finetune.main([*settings, "--data", str(text), str(text), "--corpus", "embedded"])
    results = json.loads((tmp_path / "out" / "finetuning.json").read_text())
    assert results["model"] == "tiny" and results["data"] == ["text.txt", "text.txt"]
    assert results["calibration"]["rounding"] == "gptq"
    assert len(results["calibration"]["finetuning"]) == 2 and list(results["perplexity"]) == ["as loaded"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--data train.txt", "add --corpus"),
        ("--data train.txt --corpus train.txt", "--corpus train.txt"),
        ("--data wikitext2 train.txt", "--data wikitext2 train.txt"),
        ("--scheme w3", "w4a4kv4"),
        ("--rounding up", "gptq"),
    ],
)
def test_finetune_refuses_at_once(arguments, words, capsys):
    with pytest.raises((SystemExit, ValueError)) as refused:
        finetune.main(arguments.split())
    assert words in capsys.readouterr().err + str(refused.value)


def test_finetune_checks_its_settings_before_it_loads_a_model(tmp_path):
    missing = ["--model", str(tmp_path / "missing"), "--output", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="epochs=0"):
        finetune.main([*missing, "--epochs", "0"])
    with pytest.raises(ValueError, match="--corpus='nowhere.txt' is neither"):
        finetune.main([*missing, "--corpus", "nowhere.txt"])
    with pytest.raises(ValueError, match="a.txt"):
        finetune.main([*missing, "--data", str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), "--corpus", "embedded"])
    assert not list(tmp_path.iterdir())


def test_finetune_writes_json_that_every_reader_takes(tmp_path):
    """A block that stopped has errors that are not finite, and JSON has no such numbers."""
    history = {
        "before": 0.5,
        "training": [0.4, math.inf],
        "validation": (0.3, math.nan),
        "kept": 1,
        "stopped": "epoch 2",
    }
    terminal.write_json({"finetuning": [history]}, tmp_path / "finetuning.json")
    text = (tmp_path / "finetuning.json").read_text()
    (read,) = json.loads(text, parse_constant=pytest.fail)["finetuning"]
    assert read == history | {"training": [0.4, None], "validation": [0.3, None]}
    assert "stopped: epoch 2" in finetune.table([history])
    with pytest.raises(TypeError):
        terminal.write_json({"wrong": object()}, tmp_path / "finetuning.json")
    assert (tmp_path / "finetuning.json").read_text() == text and len(list(tmp_path.iterdir())) == 1


def test_plot_outliers(tiny_folder, tmp_path, capsys):
    settings = "--num-sequences 2 --sequence-length 64 --tokens 40 --prefix-ids 5 0 --device cpu".split()
    pictures = plot_outliers.main(["--model", str(tiny_folder), "--output", str(tmp_path / "out"), *settings])
    assert [picture.name for picture in pictures] == ["outliers.png", "outliers-rotated.png"]
    assert sorted((tmp_path / "out").iterdir()) == sorted(pictures)
    pixels = [image.imread(picture) for picture in pictures]
    assert pixels[0].shape == pixels[1].shape and not (pixels[0] == pixels[1]).all()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    loaded, rotated = (next(line for line in lines if line[:1] == [kind]) for kind in ("as", "rotated"))
    ratios = [float(cell) for cell in (loaded[2], loaded[4], rotated[1], rotated[3])]
    assert all(1 <= ratio < 64 for ratio in ratios) and ratios[0] != ratios[2]
    assert loaded[3] == loaded[5] == rotated[2] == rotated[4] == "0"


def test_plot_outliers_refuses_a_missing_text(tmp_path):
    with pytest.raises(ValueError, match="--text.*nowhere.txt"):
        plot_outliers.main(["--text", str(tmp_path / "nowhere.txt")])
