"""`calibrate`: determinism, what it finds, and what it refuses before it touches the model."""

import copy
import re

import pytest
import torch

import pq_ao
from pq_ao.block_sites import SITES
from pq_ao.linears import CalibratedLinear
from pq_ao.ops import dequantize, quantize
from pq_ao.quantizers import ActivationQuantizer, KVQuantizer

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"num_sequences": 4, "sequence_length": 64, "progress": False}


def _calibrate(model, tokenizer, english, config=None, **kwargs):
    return pq_ao.calibrate(model, tokenizer, config, data=english, **(SMALL | kwargs))


def _state(model):
    tensors = {f"{name}.packed": m.packed.qdata for name, m in model.named_modules() if isinstance(m, CalibratedLinear)}
    return model.state_dict() | tensors


@pytest.mark.parametrize("search", ["tensor", "block"])
def test_same_seed_gives_the_same_bytes_and_another_seed_others(make_tiny, tiny_tokenizer, english, search):
    states = []
    for seed in (0, 0, 1):
        model = make_tiny("qwen2")
        _calibrate(model, tiny_tokenizer, english, seed=seed, search=search)
        states.append(_state(model))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_number_of_sequences_at_once_changes_no_scale(make_tiny, tiny_tokenizer, english, monkeypatch):
    found = []
    for tokens in (64, 8192):
        monkeypatch.setattr("pq_ao.streams._TOKENS_AT_ONCE", tokens)
        # sums in another order may flip a code, and an outer one moves the scales of the next block
        record = _calibrate(make_tiny("llama"), tiny_tokenizer, english, pq_ao.prefixquant_config(act_codes="even"))
        found.append([[scales[f"{site}_factor"] for site in SITES] for scales in record.scales])
    assert found[0] == found[1]


@pytest.mark.parametrize("search", ["tensor", "block"])
@pytest.mark.parametrize("codes, share", [("even", 0.7), ("spread", 0.95)])  # spread ones suit a wide range anyway
def test_searched_scales_have_less_error_than_min_max(make_tiny, tiny_tokenizer, english, search, codes, share):
    errors = {}
    for name in ("none", search):
        model = make_tiny("llama")
        config = pq_ao.prefixquant_config(act_codes=codes)
        _calibrate(model, tiny_tokenizer, english, config, search=name, seed=3)
        ids = torch.randint(3, 300, (4, 64), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            exact = model(ids).logits
            with pq_ao.reference_path(model):
                errors[name] = float((model(ids).logits - exact).square().mean())
    assert errors[search] < share * errors["none"]


@pytest.mark.parametrize("site", ["attn_in", "o_in"])
def test_tensor_search_is_the_best_of_a_direct_scan(make_tiny, tiny_tokenizer, english, site):
    model = make_tiny("llama")
    _calibrate(model, tiny_tokenizer, english)
    layer = model.model.layers[0]
    quantizer: ActivationQuantizer = layer.input_layernorm.quantizer if site == "attn_in" else layer.self_attn.o_in
    assert quantizer.code_set == {"attn_in": "spread", "o_in": "wide"}[site]
    seen = []
    quantizer.observer = lambda x: seen.append(x - quantizer.shift)
    from pq_ao.data import calibration_windows

    with torch.no_grad():
        model(calibration_windows(tiny_tokenizer, english, 4, 64, 0))
    x = torch.cat(seen).flatten(0, -2)
    x = x - x.mean(dim=0)
    start = x.abs().max() * 2 / 15

    def error(scale) -> float:
        shifted = x - scale / 2
        codes = quantize(shifted, scale, 4, codes=quantizer.code_set)
        return float((dequantize(codes, scale) - shifted).square().sum())

    assert error(quantizer.scale) <= 1.01 * min(error(start * f) for f in torch.linspace(0.05, 1, 96))


def test_record_tells_what_was_done(make_tiny, tiny_tokenizer, english):
    model = make_tiny("llama")
    record = _calibrate(model, tiny_tokenizer, english)
    assert model.calibration_record is record
    assert tiny_tokenizer.bos_token_id in record.prefix.prefix_ids
    assert len(record.scales) == 2 and record.seconds > 0 and record.search == "tensor"
    for scales in record.scales:
        for site in SITES:
            assert 0.1 <= scales[f"{site}_factor"] <= 1 and scales[site] > 0
        assert len(scales["key"]) == len(scales["value"]) == 2
    import json

    assert json.loads(json.dumps(record.to_dict()))["config"]["act_bits"] == 4


def test_key_and_value_scales_reach_the_module(make_tiny, tiny_tokenizer, english):
    model = make_tiny("llama")
    record = _calibrate(model, tiny_tokenizer, english)
    for layer, scales in zip(model.model.layers, record.scales, strict=True):
        kv: KVQuantizer = layer.self_attn.kv
        assert kv.key_scale.tolist() == scales["key"] and kv.value_scale.tolist() == scales["value"]


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"search": "grid"}, "search='grid'.*'none', 'tensor', 'block'"),
        ({"rounding": "gptq2"}, "rounding='gptq2'"),
        ({"data": ["too short"]}, "too short|tokens"),
        ({"data": []}, "data|source|empty"),
        ({"data": ["  "]}, "empty|text"),
        ({"num_sequences": 0}, "num_sequences=0"),
        # the windows that fine-tuning holds out do not make up for them
        ({"num_sequences": 0, "finetune": pq_ao.FinetuneConfig()}, "num_sequences=0"),
        ({"num_sequences": -2, "finetune": pq_ao.FinetuneConfig()}, "num_sequences=-2"),
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"seed": -1}, "seed=-1"),
        ({"prefix_ids": (999,)}, "999"),
        ({"prefix_ids": (1,), "config": pq_ao.prefixquant_config(prefix=False)}, "prefix_ids"),
    ],
)
def test_wrong_arguments_leave_the_model_untouched(make_tiny, tiny_tokenizer, english, kwargs, words):
    model = make_tiny("llama")
    before = copy.deepcopy(model.state_dict())
    kwargs = {"data": english} | SMALL | kwargs
    config = kwargs.pop("config", None)
    with pytest.raises(ValueError, match=words):
        pq_ao.calibrate(model, tiny_tokenizer, config, **kwargs)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not any(isinstance(module, CalibratedLinear) for module in model.modules())


def test_advice_on_too_little_text_holds_with_windows_held_out(make_tiny, tiny_tokenizer):
    options = SMALL | {"finetune": pq_ao.FinetuneConfig(epochs=1, validation_sequences=2), "search": "none"}
    words = ["The quick brown fox jumps over the lazy dog. " * 40]
    with pytest.raises(ValueError, match="needed, but the text") as raised:
        pq_ao.calibrate(make_tiny("llama"), tiny_tokenizer, data=words, **(options | {"num_sequences": 50}))
    fewer = 50 - int(re.search(r"lower num_sequences by (\d+)", str(raised.value))[1])
    record = pq_ao.calibrate(make_tiny("llama"), tiny_tokenizer, data=words, **(options | {"num_sequences": fewer}))
    assert record.num_sequences == fewer > 0


@pytest.mark.parametrize(
    "kwargs", [{"num_sequences": "4"}, {"sequence_length": 64.0}, {"seed": None}, {"balance": 1}, {"balance": "no"}]
)
def test_arguments_of_a_wrong_type_are_named(make_tiny, tiny_tokenizer, english, kwargs):
    ((name, value),) = kwargs.items()
    with pytest.raises(TypeError, match=f"^{name}={value!r} is a {type(value).__name__}"):
        _calibrate(make_tiny("llama"), tiny_tokenizer, english, **kwargs)


def test_record_names_a_file_without_its_folder(make_tiny, tiny_tokenizer, english, tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("\n\n".join(english), encoding="utf-8")
    for data in (path, str(path)):
        record = pq_ao.calibrate(make_tiny("llama"), tiny_tokenizer, data=data, search="none", **SMALL)
        assert record.data == "train.txt"


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_default_dtype_of_torch_changes_nothing(make_tiny, tiny_tokenizer, english, mode):
    models = [make_tiny("qwen2", dtype=torch.bfloat16) for _ in range(3)]
    options = {"rounding": "gptq", "finetune": pq_ao.FinetuneConfig(epochs=1, validation_sequences=2)}
    for model, dtype in zip(models, (torch.float32, torch.float64, torch.bfloat16), strict=True):
        torch.set_default_dtype(dtype)
        try:
            _calibrate(model, tiny_tokenizer, english, pq_ao.prefixquant_config(mode=mode), **options)
        finally:
            torch.set_default_dtype(torch.float32)
    first, *others = map(_state, models)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_named(make_tiny, tiny_tokenizer, english, value):
    model = make_tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight holds NaN or Inf"):
        _calibrate(model, tiny_tokenizer, english)
    assert not any(isinstance(module, CalibratedLinear) for module in model.modules())


def test_calibrating_twice_and_foreign_configs_are_refused(make_tiny, tiny_tokenizer, english):
    model = make_tiny("llama")
    with pytest.raises(TypeError, match="prefixquant_config"):
        _calibrate(model, tiny_tokenizer, english, "w4a4kv4")
    _calibrate(model, tiny_tokenizer, english)
    with pytest.raises(ValueError, match="calibrated already"):
        _calibrate(model, tiny_tokenizer, english)
