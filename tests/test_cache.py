"""The packed static cache: what it stores, what it refuses, and that every way of feeding it gives the same result."""

import pytest
import torch
from torchao.quantization import quantize_
from transformers import DynamicCache, StaticCache

import pq_ao
from pq_ao.ops import unpack_int4

pytestmark = pytest.mark.usefixtures("one_thread")


def _quantized(make_tiny, tokenizer, english, scheme="w4a4kv4", family="llama", **kwargs):
    model = make_tiny(family)
    config = pq_ao.prefixquant_config(scheme, **kwargs)
    pq_ao.calibrate(model, tokenizer, config, data=english, num_sequences=4, sequence_length=64, progress=False)
    quantize_(model, config)
    return model


@pytest.fixture(scope="module")
def model(make_tiny, tiny_tokenizer, english):
    return _quantized(make_tiny, tiny_tokenizer, english)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


@pytest.mark.parametrize(
    ("scheme", "kwargs"),
    [
        ("w4a4kv4", {}),
        ("w8a8kv8", {}),
        ("w4a4kv16", {}),
        ("w4a4kv4", {"mode": "dynamic"}),
        ("w4a4kv4", {"prefix": False}),
        ("w4a4kv4", {"rotation": False}),
    ],
)
def test_plain_call_stock_caches_and_packed_cache_agree_bit_for_bit(
    make_tiny, tiny_tokenizer, english, ids, scheme, kwargs
):
    model = _quantized(make_tiny, tiny_tokenizer, english, scheme, **kwargs)
    plain = _logits(model, ids, use_cache=False)
    packed = pq_ao.PrefixStaticCache(model, 2, 24)
    assert torch.equal(_logits(model, ids, past_key_values=packed), plain)
    for stock in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=24)):
        if scheme == "w4a4kv16":
            assert torch.equal(_logits(model, ids, past_key_values=stock), plain)
            continue
        with pytest.warns(pq_ao.UnpackedCacheWarning, match="PrefixStaticCache"):
            assert torch.equal(_logits(model, ids, past_key_values=stock), plain)


def test_cache_holds_the_codes_two_a_byte(model, ids):
    packed, dynamic = pq_ao.PrefixStaticCache(model, 2, 32), DynamicCache(config=model.config)
    _logits(model, ids, past_key_values=packed)
    with pytest.warns(pq_ao.UnpackedCacheWarning):
        _logits(model, ids, past_key_values=dynamic)
    for ours, stock in zip(packed.layers, dynamic.layers, strict=True):
        assert ours.keys.dtype == torch.uint8 and ours.keys.shape == (2, 2, 32, 12)
        for name in ("keys", "values"):
            codes = unpack_int4(getattr(ours, name), 24)[:, :, : ids.shape[1]]
            assert torch.equal(codes, getattr(stock, name))
            assert codes.unique().numel() > 8  # scales of a sane size use most of the 16 codes


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_chunks_and_single_steps_equal_one_call(make_tiny, tiny_tokenizer, english, ids, mode):
    model = _quantized(make_tiny, tiny_tokenizer, english, mode=mode)
    whole = _logits(model, ids, use_cache=False)
    for cuts in ([24], [7, 9, 8], [1] * 24):
        cache = pq_ao.PrefixStaticCache(model, 2, 24)
        parts = [_logits(model, part, past_key_values=cache) for part in ids.split(cuts, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-4)
        assert int(cache.get_seq_length()) == 24


def test_left_padded_batch_equals_single_rows(model, ids):
    long, short = ids[0], ids[1, :9]
    batch = torch.full((2, 24), 2)
    batch[0], batch[1, -9:] = long, short
    mask = torch.ones_like(batch)
    mask[1, :-9] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    cache = pq_ao.PrefixStaticCache(model, 2, 40)
    both = _logits(model, batch, attention_mask=mask, position_ids=positions, past_key_values=cache)
    torch.testing.assert_close(both[:1], _logits(model, long[None], use_cache=False), rtol=0, atol=1e-4)
    torch.testing.assert_close(both[1:, -9:], _logits(model, short[None], use_cache=False), rtol=0, atol=1e-4)


def _generate(model, ids, cache=None, **kwargs):
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 2} | kwargs
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, past_key_values=cache, **options)


def test_generate_greedy_chunked_batched_and_padded_give_the_same_tokens(model, ids):
    alone = [_generate(model, row[None], pq_ao.PrefixStaticCache(model, 1, 64)) for row in ids]
    together = _generate(model, ids, pq_ao.PrefixStaticCache(model, 2, 64))
    assert torch.equal(together, torch.cat(alone))
    chunked = _generate(model, ids, pq_ao.PrefixStaticCache(model, 2, 64), prefill_chunk_size=5)
    assert torch.equal(chunked, together)
    with pytest.warns(pq_ao.UnpackedCacheWarning):
        assert torch.equal(_generate(model, ids), together)
    padded = torch.cat((torch.full((2, 4), 2), ids), dim=1)
    mask = torch.ones_like(padded)
    mask[:, :4] = 0
    out = _generate(model, padded, pq_ao.PrefixStaticCache(model, 2, 64), attention_mask=mask)
    assert torch.equal(out[:, 4:], together)


def test_generate_sampling_is_reproducible_and_varies(model, ids):
    def sample(seed):
        torch.manual_seed(seed)
        return _generate(model, ids, pq_ao.PrefixStaticCache(model, 2, 64), do_sample=True, temperature=1.5)

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))


def test_second_turn_on_the_same_cache_equals_the_whole_conversation(model, ids):
    ids = ids[:1]
    cache = pq_ao.PrefixStaticCache(model, 1, 128)
    first = _generate(model, ids, cache)
    conversation = torch.cat((first, ids.flip(1)), dim=1)
    second = _generate(model, conversation, cache)
    assert torch.equal(second, _generate(model, conversation, pq_ao.PrefixStaticCache(model, 1, 128)))


def test_beam_search_equals_that_of_a_stock_cache(model, ids):
    ours = _generate(model, ids, pq_ao.PrefixStaticCache(model, 6, 64), num_beams=3)
    with pytest.warns(pq_ao.UnpackedCacheWarning):
        assert torch.equal(ours, _generate(model, ids, num_beams=3))


def test_reset_forgets_the_body_and_keeps_the_prefix(model, ids):
    cache = pq_ao.PrefixStaticCache(model, 2, 64)
    expected = _logits(model, ids, past_key_values=cache)
    prefixes = [layer.self_attn.prefix_k.clone() for layer in model.model.layers]
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    assert torch.equal(_logits(model, ids, past_key_values=cache), expected)
    for layer, prefix in zip(model.model.layers, prefixes, strict=True):
        assert prefix.shape[1] > 0 and torch.equal(layer.self_attn.prefix_k, prefix)


def test_crop_forgets_the_last_tokens(model, ids):
    cache = pq_ao.PrefixStaticCache(model, 2, 64)
    _logits(model, ids, past_key_values=cache)
    other = ids.flip(1)[:, :5]
    cache.crop(-10)
    assert int(cache.get_seq_length()) == 14
    after = _logits(model, other, past_key_values=cache)
    whole = _logits(model, torch.cat((ids[:, :14], other), dim=1), use_cache=False)
    torch.testing.assert_close(after, whole[:, 14:], rtol=0, atol=1e-4)
    for wrong in (0, 3, -100):
        with pytest.raises(ValueError, match=f"tokens_to_remove={wrong}"):
            cache.crop(wrong)


def test_prompt_longer_than_the_cache_says_how_long_it_must_be(model, ids):
    cache = pq_ao.PrefixStaticCache(model, 2, 20)
    with pytest.raises(ValueError, match="max_cache_len of at least 24"):
        _logits(model, ids, past_key_values=cache)
    assert int(cache.get_seq_length()) == 0  # nothing was written
    _logits(model, ids[:, :18], past_key_values=cache)
    with pytest.raises(ValueError, match="holds 18 of at most 20 tokens and 6 more"):
        _logits(model, ids[:, 18:], past_key_values=cache)


@pytest.mark.parametrize("batch", [1, 3])
def test_another_batch_than_the_cache_is_refused(model, ids, batch):
    cache = pq_ao.PrefixStaticCache(model, 2, 64)
    with pytest.raises(ValueError, match=f"make one with batch_size={batch}"):
        _logits(model, ids[:1].expand(batch, -1), past_key_values=cache)


@pytest.mark.parametrize(
    ("name", "value"), [("batch_size", 0), ("batch_size", True), ("max_cache_len", 1.5), ("spare_slots", -1)]
)
def test_sizes_are_checked(model, name, value):
    sizes = {"batch_size": 1, "max_cache_len": 8} | {name: value}
    with pytest.raises(ValueError, match=f"{name}={value}"):
        pq_ao.PrefixStaticCache(model, **sizes)


def test_uncalibrated_model_is_told_to_calibrate(make_tiny):
    with pytest.raises(ValueError, match="pq_ao.calibrate"):
        pq_ao.PrefixStaticCache(make_tiny("llama"), 1, 8)
