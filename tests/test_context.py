"""The warning where a model is used at positions that its static keys were not calibrated for."""

import warnings

import pytest
import torch
from torchao.quantization import quantize_

import pq_ao
from pq_ao import ContextWarning, prefixquant_config

pytestmark = pytest.mark.usefixtures("one_thread")


def _quantized(make_tiny, tokenizer, english, scheme="w4a4kv4", mode="static"):
    config = prefixquant_config(scheme, mode=mode)
    model = make_tiny("llama")
    pq_ao.calibrate(
        model, tokenizer, config, data=english, num_sequences=4, sequence_length=32, context=64, prefix_ids=(5, 0),
        progress=False,
    )  # fmt: skip
    quantize_(model, config)
    return model


def test_longer_caches_and_windows_warn(make_tiny, tiny_tokenizer, english, tmp_path):
    model = _quantized(make_tiny, tiny_tokenizer, english)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pq_ao.PrefixStaticCache(model, 1, 64)
        pq_ao.GenerationEngine(model, 1, 64, compile=False)  # whose spare slots hold no tokens
    for kind in (pq_ao.PrefixStaticCache, pq_ao.GenerationEngine):
        with pytest.warns(ContextWarning, match="max_cache_len=65: .* calibrated for 64 positions"):
            kind(model, 1, 65)
    ids = torch.randint(3, 300, (200,))
    with pytest.warns(ContextWarning, match="sequence_length=100"):
        pq_ao.perplexity(model, tiny_tokenizer, ids, sequence_length=100, progress=False)
    pq_ao.save(model, tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    with pytest.warns(ContextWarning, match="max_cache_len=65"):
        pq_ao.PrefixStaticCache(loaded, 1, 65)


@pytest.mark.parametrize(("scheme", "mode"), [("w4a4kv4", "dynamic"), ("w4a4kv16", "static")])
def test_keys_without_static_scales_do_not(make_tiny, tiny_tokenizer, english, scheme, mode):
    model = _quantized(make_tiny, tiny_tokenizer, english, scheme, mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pq_ao.PrefixStaticCache(model, 1, 65)
