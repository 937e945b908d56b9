"""Balance of keys against queries: the function stays, scores lose less by quantization."""

import copy

import pytest
import torch

from pq_ao import prefixquant_config
from pq_ao.key_balance import balance_keys
from pq_ao.scale_search import search_keys
from tests.blocks import first_block

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.randint(3, 300, (8, 48), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _with_large_pairs(model):
    """Pairs of key channels far larger than the others, those of the queries smaller: the scores stay."""
    for layer in model.model.layers:
        attention = layer.self_attn
        dim = attention.head_dim
        for channel, factor in ((1, 12.0), (4, 30.0)):
            for pair in (channel, channel + dim // 2):
                for projection, by in ((attention.k_proj, factor), (attention.q_proj, 1 / factor)):
                    for rows in (projection.weight, projection.bias):
                        if rows is not None:
                            rows[pair::dim] *= by
    return model


@pytest.mark.parametrize("rotation", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_block_stays_the_same_function(make_tiny, family, rotation):
    sites = first_block(_with_large_pairs(make_tiny(family)), prefixquant_config(rotation=rotation), IDS)[0]
    before = copy.deepcopy(sites.layer)
    found = balance_keys(sites)
    assert len(found["key_balance"]) == sites.attention.kv_heads and max(found["key_balance"]) > 0
    after = sites.layer
    assert not torch.equal(before.self_attn.prefix_k, after.self_attn.prefix_k)
    two = sites.body.sequences(slice(2))
    expected, actual = (sites.body.run(layer, two) for layer in (before, after))
    assert float((actual - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@torch.no_grad()
def test_attention_loses_less(make_tiny, mode):
    """By the objective of the key search, which knows nothing of the balance's own."""
    errors = {}
    for balanced in (False, True):
        sites = first_block(_with_large_pairs(make_tiny("llama")), prefixquant_config(mode=mode), IDS)[0]
        if balanced:
            balance_keys(sites)
        exact = _attention(sites)
        search_keys(sites, 4, "tensor")
        errors[balanced] = float((_attention(sites, quantized=True) - exact).square().sum())
    assert errors[True] < 0.5 * errors[False]


def _attention(sites, quantized=False):
    from pq_ao.quantizers import Path

    kv = sites.attention.kv
    kv.path = Path.REFERENCE if quantized else Path.FLOAT
    seen = []
    sites.attention.o_in.observer = seen.append
    sites.body.run(sites.layer, sites.body.sequences(slice(4)))
    sites.attention.o_in.observer, kv.path = None, Path.FLOAT
    return seen[0]


@torch.no_grad()
def test_left_out_for_normalised_heads_and_keys_of_16_bits(make_tiny):
    for family, scheme in (("qwen3", "w4a4kv4"), ("llama", "w4a4kv16")):
        sites = first_block(make_tiny(family), prefixquant_config(scheme), IDS)[0]
        before = copy.deepcopy(sites.layer.state_dict())
        assert balance_keys(sites) == {}
        after = sites.layer.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before if before[name] is not None)


@torch.no_grad()
def test_dead_heads_stay_finite(make_tiny):
    model = make_tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight[: layer.self_attn.head_dim] = 0
        layer.self_attn.q_proj.weight[-layer.self_attn.head_dim :] = 0
    sites = first_block(model, prefixquant_config(), IDS)[0]
    balance_keys(sites)
    assert torch.isfinite(sites.attention.qkv_proj.weight).all() and torch.isfinite(sites.attention.prefix_k).all()
