"""Block-wise fine-tuning: what it gains, what it keeps, how it stops, and that it goes on where it was killed."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchao.quantization import quantize_

import pq_ao
from pq_ao import FinetuneConfig, prefixquant_config
from pq_ao.block_calibration import block_tensors
from pq_ao.finetune import FinetuneWarning
from pq_ao.linears import CalibratedLinear
from pq_ao.trained_block import BlockFrame

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"num_sequences": 24, "sequence_length": 64, "prefix_ids": (5, 0), "progress": False}
CONFIG = FinetuneConfig(epochs=3, validation_sequences=8, learning_rate=3e-3, weight_learning_rate=0.02)


def _calibrate(model, tokenizer, english, config=None, **kwargs):
    return pq_ao.calibrate(model, tokenizer, config, data=english, **(SMALL | kwargs))


def _tensors(model):
    return [block_tensors(layer) for layer in model.model.layers]


def _same(first, second):
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_block_comes_nearer_to_the_floating_point_one(make_tiny, tiny_tokenizer, english, family, mode):
    model = make_tiny(family)
    record = _calibrate(model, tiny_tokenizer, english, prefixquant_config(mode=mode), finetune=CONFIG)
    assert len(record.finetuning) == 2
    for history in record.finetuning:
        assert history["stopped"] is None and len(history["training"]) == len(history["validation"]) == 3
        assert history["validation"][history["kept"] - 1] < 0.97 * history["before"]
    quantize_(model, prefixquant_config(mode=mode))
    ids = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(model(ids).logits).all()


def test_everything_that_is_said_to_be_trained_is(make_tiny, tiny_tokenizer, english):
    changed = {}
    for mode in ("static", "dynamic"):
        plain, tuned = make_tiny("llama"), make_tiny("llama")
        _calibrate(plain, tiny_tokenizer, english, prefixquant_config(mode=mode))
        _calibrate(tuned, tiny_tokenizer, english, prefixquant_config(mode=mode), finetune=CONFIG)
        before, after = _tensors(plain)[0], _tensors(tuned)[0]
        changed[mode] = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    shared = {"codes", "scale", "bias"}  # of linears; "scale" is also that of a static activation site
    assert changed["static"] == shared | {"key_scale", "value_scale"}
    assert changed["dynamic"] == shared | {"clip", "key_clip", "value_clip"}


def test_static_activation_scales_are_trained(make_tiny, tiny_tokenizer, english):
    plain, tuned = make_tiny("llama"), make_tiny("llama")
    _calibrate(plain, tiny_tokenizer, english)
    _calibrate(tuned, tiny_tokenizer, english, finetune=CONFIG)
    for site in ("input_layernorm.quantizer", "self_attn.o_in", "post_attention_layernorm.quantizer", "mlp.down_in"):
        first, second = (model.model.layers[0].get_submodule(site) for model in (plain, tuned))
        assert first.scale != second.scale and torch.equal(first.shift, second.shift)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "smollm3"])
def test_untrained_tensors_compute_the_rounded_block(make_tiny, tiny_tokenizer, english, monkeypatch, family):
    """The frame that training computes in is the block on the reference path, and storing gives its codes back.

    It is made of the first block; SmolLM3's second one has no RoPE.
    """
    seen = []
    tensors_of = BlockFrame.tensors

    def watch(frame, block, rounded):
        tensors = tensors_of(frame, block, rounded)
        seen.append((frame, tensors, copy.deepcopy(block)))
        return tensors

    monkeypatch.setattr(BlockFrame, "tensors", watch)
    _calibrate(make_tiny(family), tiny_tokenizer, english, finetune=FinetuneConfig(epochs=1, validation_sequences=2))
    frame, tensors, block = seen[1]
    untrained = frame.tensors(block, {name: _as_rounded(linear) for name, linear in _linears(block).items()})
    hidden = torch.randn(2, 9, 96, generator=torch.Generator().manual_seed(0))
    angles = torch.rand(2, 1, 9, 24, generator=torch.Generator().manual_seed(1)).unbind()
    with pq_ao.reference_path(block):
        expected = block(hidden, attention_mask=None, position_embeddings=angles)
    actual = frame.outputs(untrained, hidden, angles)
    error = (actual - expected).square().sum() / (expected - hidden).square().sum()
    assert float(error) < 1e-8
    stored = copy.deepcopy(block)
    frame.store(untrained, stored)
    assert _same([block_tensors(stored)], [block_tensors(block)])


def _linears(block):
    return {name: module for name, module in block.named_modules() if isinstance(module, CalibratedLinear)}


def _as_rounded(linear):
    from pq_ao.rounding import RoundedWeight

    packed = linear.packed
    return RoundedWeight(packed.codes(), packed.scale, packed.dequantize(), torch.ones_like(packed.scale))


def test_a_rate_far_too_high_stops_the_block_and_keeps_its_last_good_state(
    make_tiny, tiny_tokenizer, english, tmp_path
):
    plain, wild = make_tiny("llama"), make_tiny("llama")
    _calibrate(plain, tiny_tokenizer, english)
    config = FinetuneConfig(epochs=3, validation_sequences=4, learning_rate=1e4, weight_learning_rate=1e4)
    with pytest.warns(FinetuneWarning, match="block 0: the error was not finite in epoch 1; kept the state of epoch 0"):
        record = _calibrate(wild, tiny_tokenizer, english, finetune=config, resume=tmp_path / "journal")
    assert all(history["kept"] == 0 and history["stopped"] for history in record.finetuning)
    assert all(history["training"] == [None] for history in record.finetuning)
    assert _same(_tensors(plain)[:1], _tensors(wild)[:1])


@pytest.mark.parametrize("storage", ["host", "disk"])
def test_storage_of_hidden_states_changes_nothing(make_tiny, tiny_tokenizer, english, storage):
    models = [make_tiny("llama") for _ in range(2)]
    for model, where in zip(models, ("device", storage), strict=True):
        _calibrate(model, tiny_tokenizer, english, finetune=CONFIG, storage=where)
    assert _same(*map(_tensors, models))


@pytest.mark.parametrize("seed", [0, 2**60])
def test_same_seed_same_bytes(make_tiny, tiny_tokenizer, english, seed):
    models = [make_tiny("llama") for _ in range(2)]
    for model in models:
        _calibrate(model, tiny_tokenizer, english, finetune=CONFIG, seed=seed)
    assert _same(*map(_tensors, models))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 1.5}, "batch_size=1.5"),
        ({"validation_sequences": True}, "validation_sequences=True"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"learning_rate": True}, "learning_rate=True"),
        ({"weight_learning_rate": -1.0}, "weight_learning_rate=-1.0"),
        ({"end_to_end_epochs": -1}, "end_to_end_epochs=-1; a whole number of at least 0"),
        ({"end_to_end_rate": float("inf")}, "end_to_end_rate=inf"),
        ({"end_to_end_weight_rate": -0.1}, "end_to_end_weight_rate=-0.1"),
        ({"end_to_end_prefix_rate": -0.1}, "end_to_end_prefix_rate=-0.1"),
        ({"compile": "yes"}, "compile='yes'"),
    ],
)
def test_wrong_settings_are_named(fields, words):
    with pytest.raises(ValueError, match=words):
        FinetuneConfig(**fields)


_SCRIPT = """
import json, sys
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
import pq_ao
model = AutoModelForCausalLM.from_pretrained({folder!r})
tokenizer = PreTrainedTokenizerFast.from_pretrained({folder!r})
english = json.load(open({english!r}))
finetune = pq_ao.FinetuneConfig(**{config!r})
pq_ao.calibrate(model, tokenizer, data=english, finetune=finetune, resume={resume!r}, **{small!r})
"""


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(make_tiny, tiny_tokenizer, english, tmp_path):
    folder, resume = tmp_path / "model", tmp_path / "resume"
    make_tiny("llama", num_hidden_layers=4).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    (tmp_path / "english.json").write_text(json.dumps(english))
    config = {"epochs": 8, "validation_sequences": 8, "end_to_end_epochs": 1}
    script = _SCRIPT.format(
        path=[str(Path(pq_ao.__file__).parents[1])], folder=str(folder), english=str(tmp_path / "english.json"),
        config=config, resume=str(resume), small=SMALL,
    )  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", script])
    while not (resume / "block-00001.safetensors").exists():
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()

    load = type(make_tiny("llama")).from_pretrained
    resumed, whole = load(folder), load(folder)
    finished = len(json.loads((resume / "manifest.json").read_text())["blocks"])
    assert 1 <= finished < 4
    options = {"finetune": FinetuneConfig(**config)}
    record = _calibrate(resumed, tiny_tokenizer, english, resume=resume, **options)
    expected = _calibrate(whole, tiny_tokenizer, english, **options)
    assert _same(_tensors(resumed), _tensors(whole))
    assert record.finetuning == expected.finetuning and record.scales == expected.scales
    assert record.end_to_end == expected.end_to_end

    before = {path.name: path.read_bytes() for path in resume.iterdir()}
    with pytest.raises(ValueError, match="rounding"):
        _calibrate(load(folder), tiny_tokenizer, english, resume=resume, rounding="gptq", **options)
    with pytest.raises(ValueError, match="model_config"):  # the same weights, another function
        _calibrate(load(folder, rms_norm_eps=1e-3), tiny_tokenizer, english, resume=resume, **options)
    assert {path.name: path.read_bytes() for path in resume.iterdir()} == before
    alone = load(folder)  # blocks do not depend on what comes behind them
    record = _calibrate(
        alone, tiny_tokenizer, english, resume=resume, finetune=replace(options["finetune"], end_to_end_epochs=0)
    )
    assert record.end_to_end is None and record.finetuning == expected.finetuning and not record.finetuning_seconds

    block = resume / "block-00002.safetensors"
    block.write_bytes(block.read_bytes()[:-5])
    with pytest.raises(ValueError, match="block-00002.safetensors"):
        _calibrate(load(folder), tiny_tokenizer, english, resume=resume, **options)
