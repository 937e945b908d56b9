"""recipes/quantize.py from a floating-point model to a checkpoint, and that its flags are all options there are."""

import argparse
import inspect
import json
import re
import warnings
from dataclasses import asdict, fields

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pq_ao
from pq_ao.head import Int8Head
from recipes import quantize, terminal
from recipes.calibration_options import add_calibration_options, calibrate_arguments, config_of

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = "--num-sequences 2 --sequence-length 64 --device cpu".split()


@pytest.fixture(scope="module")
def original(make_tiny, tiny_tokenizer, tmp_path_factory):
    """A tiny random model and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny("llama", dtype=torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def options(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_calibration_options(parser)
    return parser.parse_args(flags)


@pytest.mark.filterwarnings("ignore::pq_ao.PrefixWarning")
def test_checkpoint_and_summary(original, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    output = quantize.main(["--model", str(original), *SMALL, "--scheme", "w4a8kv4", "--int8-head", "--seed", "3"])
    assert str(output) == "out/tiny-w4a8kv4"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    record = model.calibration_record
    assert (record.config.scheme, record.seed, record.num_sequences) == ("w4a8kv4", 3, 2)
    assert isinstance(model.lm_head, Int8Head) and model.dtype == torch.bfloat16

    printed = capsys.readouterr().out
    assert "tiny as w4a8kv4, static scales" in printed
    assert f"prefix: {[tokenizer.decode([token]) for token in record.prefix.prefix_ids]}" in printed
    assert pq_ao.explanation.totals(model) in printed
    assert f"{sum(file.stat().st_size for file in output.glob('*.safetensors')):,} bytes of weights" in printed
    for command in ("generate", "evaluate", "export"):
        assert f"python -m recipes.{command} out/tiny-w4a8kv4" in printed


@pytest.mark.filterwarnings("ignore::pq_ao.PrefixWarning")
def test_every_switch_reaches_the_record(original, tmp_path):
    flags = (
        "--scheme w4a4kv16 --mode dynamic --prefix-ids 5 0 --no-rotation --no-balance --search none --rounding gptq "
        "--finetune --epochs 1 --validation-sequences 1 --batch-size 2 --learning-rate 0.01 --no-compile "
        "--storage host --dtype float32"
    ).split()
    blocks, output = tmp_path / "blocks", tmp_path / "out"
    quantize.main(["--model", str(original), *SMALL, *flags, "--resume", str(blocks), "--output", str(output)])
    model = AutoModelForCausalLM.from_pretrained(output)
    record = model.calibration_record
    expected = pq_ao.prefixquant_config("w4a4kv16", mode="dynamic", rotation=False)
    assert record.config == expected and record.prefix.prefix_ids == (5, 0)
    assert (record.balance, record.search, record.rounding, model.dtype) == (False, "none", "gptq", torch.float32)
    assert record.finetune == pq_ao.FinetuneConfig(
        epochs=1, validation_sequences=1, batch_size=2, learning_rate=0.01, compile=False
    )
    assert list(blocks.iterdir())
    # once more: the blocks are there, and what stands in the folder is replaced
    quantize.main(["--model", str(original), *SMALL, *flags, "--resume", str(blocks), "--output", str(output)])
    again = AutoModelForCausalLM.from_pretrained(output)
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_all_options_of_the_library_are_flags():
    def keywords(function):
        parameters = inspect.signature(function).parameters.values()
        return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}

    plain = options()
    assert calibrate_arguments(plain).keys() == keywords(pq_ao.calibrate) - {"progress"}
    assert (
        keywords(pq_ao.prefixquant_config) | {field.name for field in fields(pq_ao.FinetuneConfig)}
        <= vars(plain).keys()
    )
    defaults = {name: parameter.default for name, parameter in inspect.signature(pq_ao.calibrate).parameters.items()}
    assert all(value == defaults[name] for name, value in calibrate_arguments(plain).items())
    assert config_of(plain) == pq_ao.prefixquant_config()
    assert asdict(calibrate_arguments(options("--finetune"))["finetune"]) == asdict(pq_ao.FinetuneConfig())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--num-sequences 0", "--num-sequences: 0: give a whole number of at least 1"),
        ("--seed -1", "--seed: -1: give a whole number"),
        ("--device tpu9", "--device: tpu9"),
        ("--device cuda:99", "cuda:99: . CUDA GPUs are here; give another device"),
        ("--epochs 3", "--epochs: without effect here; add --finetune"),
        ("--finetune --epochs 0", "epochs=0; a whole number of at least 1"),
        ("--no-prefix --prefix-ids 3", "--prefix-ids: without effect beside --no-prefix"),
        ("--data nowhere.txt", "--data='nowhere.txt' is neither"),
        ("--data pile c4", "--data pile c4: give one of embedded, wikitext2, pile, c4 alone"),
        ("--output {model}", "--output .*: holds another model, which is not overwritten"),
        ("--output {model}/config.json", "--output .*: is a file; give a folder"),
        ("--model {model}/nothing", "--model: source=.*nothing"),
    ],
)
def test_refused_before_the_work(original, flags, words, capsys, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *arguments, **options: pytest.fail("loaded"))
    with pytest.raises((SystemExit, ValueError)) as refused:
        quantize.main([*f"--model {original}".split(), *flags.format(model=original).split()])
    text = capsys.readouterr().err + str(refused.value)
    assert re.search(words, text), text


def test_a_checkpoint_is_no_original(original, tmp_path):
    config = json.loads((original / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "prefixquant"}}))
    with pytest.raises(ValueError, match="is quantized already; name the original"):
        quantize.main(["--model", str(tmp_path)])


def test_errors_of_ours_end_without_a_traceback(monkeypatch):
    def ours():
        pq_ao.prefixquant_config("w3")

    def theirs():
        json.loads("{")

    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with pytest.raises(SystemExit, match="error: prefixquant_config: scheme='w3' is unknown"):
        terminal.run(ours)
    with pytest.raises(json.JSONDecodeError):
        terminal.run(theirs)
    with pytest.raises(SystemExit, match="interrupted"):
        terminal.run(stopped)
