"""The hidden prefix against real prefix tokens, and what our attention refuses."""

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

import pq_ao
from pq_ao.calibration import calibrate
from pq_ao.modules import attention_modules
from tests.decoders import FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")
PREFIX = (7, 11, 0)


def _calibrated(original, tokenizer, english, **kwargs):
    model = copy.deepcopy(original)
    settings = {"data": english, "num_sequences": 2, "sequence_length": 32, "progress": False, "prefix_ids": PREFIX}
    calibrate(model, tokenizer, pq_ao.prefixquant_config(), **(settings | kwargs))
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_prefix_equals_real_prefix_tokens(make_tiny, tiny_tokenizer, english, ids, family):
    original = make_tiny(family)
    model = _calibrated(original, tiny_tokenizer, english)
    real = torch.cat((torch.tensor([PREFIX, PREFIX]), ids), dim=1)
    expected = original(real).logits[:, len(PREFIX) :]
    limit = 1e-4 * expected.abs().max()
    assert (model(ids).logits - expected).abs().max() <= limit
    cache = pq_ao.PrefixStaticCache(model, 2, 20)
    assert (model(ids, past_key_values=cache).logits - expected).abs().max() <= limit
    # the prefix matters: without it the logits are others
    assert (original(ids).logits - expected).abs().max() > 100 * limit


@torch.no_grad()
def test_float_model_padded_chunked_and_stepwise_runs_equal_single_ones(make_tiny, tiny_tokenizer, english, ids):
    model = _calibrated(make_tiny("llama"), tiny_tokenizer, english)
    expected = model(ids, use_cache=False).logits
    limit = 1e-4 * expected.abs().max()
    for cuts in ([5, 15], [1] * 20):
        cache = pq_ao.PrefixStaticCache(model, 2, 20)
        out = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(cuts, dim=1)], dim=1)
        assert (out - expected).abs().max() <= limit
    padded = torch.cat((torch.full((2, 6), 2), ids), dim=1)
    mask = torch.ones_like(padded)
    mask[:, :6] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    out = model(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 6:]
    assert (out - expected).abs().max() <= limit


def test_gradients_pass_through_attention_with_and_without_padding(make_tiny, tiny_tokenizer, english, ids):
    model = _calibrated(make_tiny("qwen2"), tiny_tokenizer, english)
    alone = model.get_input_embeddings()(ids).detach().requires_grad_()
    padded = torch.cat((torch.ones(2, 6, alone.shape[2]), alone.detach()), dim=1).requires_grad_()
    mask = torch.arange(26).expand(2, 26) >= 6
    positions = (mask.long().cumsum(dim=1) - 1).clamp_min(0)
    model(inputs_embeds=alone, use_cache=False).logits.square().sum().backward()
    out = model(inputs_embeds=padded, attention_mask=mask.long(), position_ids=positions, use_cache=False)
    out.logits[:, 6:].square().sum().backward()
    assert alone.grad.abs().max() > 0 and not padded.grad[:, :6].any()
    assert (padded.grad[:, 6:] - alone.grad).abs().max() <= 1e-4 * alone.grad.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_every_way_to_attend_makes_up_for_the_shifts(mode, ids):
    """With and without a cache, ours or a stock one, fused or with a mask of the caller's own."""
    config = LlamaConfig(
        vocab_size=300, hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    scheme = pq_ao.prefixquant_config(mode=mode)
    model = pq_ao.random_quantized_decoder(config, scheme, prefix_tokens=3, device="cpu", dtype=torch.float32)
    for kv in (attention.kv for attention in attention_modules(model)):  # what is not made up for is seen
        kv.key_shift.normal_(0, 2, generator=torch.Generator().manual_seed(3))
        kv.value_shift.normal_(0, 2, generator=torch.Generator().manual_seed(4))
    with pq_ao.reference_path(model):
        expected = model(ids, use_cache=False).logits
    packed = [pq_ao.PrefixStaticCache(model, 2, 24) for _ in range(2)]
    mask = torch.ones(20, 20, dtype=torch.bool).tril().expand(2, 1, 20, 20)
    fused = model(ids, use_cache=False).logits
    assert (fused - expected).square().mean() < 1e-4 * expected.square().mean()  # codes at an edge may differ
    assert torch.equal(model(ids, past_key_values=packed[0]).logits, fused)
    assert torch.equal(model(ids, use_cache=False, attention_mask=mask).logits, fused)
    padded = torch.nn.functional.pad(mask, (0, 4))
    assert torch.equal(model(ids, past_key_values=packed[1], attention_mask=padded).logits, fused)
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(packed[0].layers, packed[1].layers, strict=True))
    with pytest.warns(pq_ao.UnpackedCacheWarning):
        assert torch.equal(model(ids, past_key_values=DynamicCache(config=model.config)).logits, fused)


def test_another_attention_implementation_is_refused(make_tiny, tiny_tokenizer, english, ids):
    model = _calibrated(make_tiny("llama"), tiny_tokenizer, english)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation='sdpa'.*set_attn_implementation\\('prefixquant'\\)"):
        model(ids)
    model.set_attn_implementation("prefixquant")
    model(ids)


def test_our_attention_on_a_foreign_model_is_refused(make_tiny, ids):
    model = make_tiny("llama")
    model.set_attn_implementation("prefixquant")
    with pytest.raises(RuntimeError, match="pq_ao.calibrate"):
        model(ids)


def test_additive_mask_is_refused(make_tiny, tiny_tokenizer, english, ids):
    model = _calibrated(make_tiny("llama"), tiny_tokenizer, english)
    with pytest.raises(TypeError, match="boolean mask"):
        model(ids, attention_mask=torch.zeros(2, 1, 20, 20))
