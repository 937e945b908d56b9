"""Channel balance: the function stays, the error of quantization shrinks."""

import copy

import pytest
import torch

import pq_ao
from pq_ao import prefixquant_config
from pq_ao.balance import balance_block
from tests.blocks import first_block

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.randint(3, 300, (8, 48), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _with_outlier_channels(model):
    """Channels of up_proj and v_proj far larger than the others, undone behind: the function stays."""
    for layer in model.model.layers:
        mlp, attention = layer.mlp, layer.self_attn
        for channel, factor in ((3, 30.0), (77, 80.0)):
            mlp.up_proj.weight[channel] *= factor
            mlp.down_proj.weight[:, channel] /= factor
        attention.v_proj.weight[5] *= 20  # channel 5 of the first KV head, which query heads 0 and 1 read
        for head in (0, 1):
            attention.o_proj.weight[:, head * attention.head_dim + 5] /= 20
    return model


@pytest.mark.parametrize("rotation", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_block_stays_the_same_function_of_text_behind_the_same_prefix(make_tiny, family, rotation):
    model = _with_outlier_channels(make_tiny(family))
    sites, found_rotation = first_block(model, prefixquant_config(rotation=rotation), IDS)
    before = copy.deepcopy(sites.layer)
    found = balance_block(sites, found_rotation)
    assert found["down_in_balance"] and found["o_in_balance"]
    after = sites.layer
    assert not torch.equal(before.mlp.down_proj.weight, after.mlp.down_proj.weight)
    assert not torch.equal(before.self_attn.prefix_v, after.self_attn.prefix_v)
    normed = family == "qwen3"  # its heads are normalised behind the projection
    assert torch.equal(before.self_attn.prefix_k, after.self_attn.prefix_k) == normed
    assert ("key_balance" in found) != normed
    two = sites.body.sequences(slice(2))
    expected, actual = (sites.body.run(layer, two) for layer in (before, after))
    assert float((actual - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


@torch.no_grad()
def test_outlier_channels_are_taken_back(make_tiny):
    """Behind it, what is quantized is spread as if those channels had never been made."""
    spread = {}
    for name, prepare in (("plain", lambda model: model), ("outliers", _with_outlier_channels)):
        sites, rotation = first_block(prepare(make_tiny("llama")), prefixquant_config(), IDS)
        if name == "outliers":
            spread["unbalanced"] = _spread(sites)
        balance_block(sites, rotation)
        spread[name] = _spread(sites)
    for site in ("o_in", "down_in"):
        assert spread["outliers"][site] < 1.2 * spread["plain"][site]
        assert spread["outliers"][site] < 0.8 * spread["unbalanced"][site]


def _spread(sites):
    """Largest token over the mean one, root mean squares."""
    inputs, _ = sites.float_sample(("o_in", "down_in"), 4096)
    sizes = {site: x.square().mean(dim=1).sqrt() for site, x in inputs.items()}
    return {site: float(size.max() / size.mean()) for site, size in sizes.items()}


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_quantized_model_comes_nearer_to_floating_point(make_tiny, tiny_tokenizer, english, mode):
    errors = {}
    for balance in (False, True):
        model = _with_outlier_channels(make_tiny("llama"))
        record = pq_ao.calibrate(
            model, tiny_tokenizer, prefixquant_config(mode=mode), data=english, num_sequences=8, sequence_length=64,
            balance=balance, prefix_ids=(5, 0), progress=False,
        )  # fmt: skip
        assert all(("down_in_balance" in scales) == balance for scales in record.scales)
        with torch.no_grad():
            exact = model(IDS).logits
            with pq_ao.reference_path(model):
                errors[balance] = float((model(IDS).logits - exact).square().mean())
    assert errors[True] < 0.7 * errors[False]


@torch.no_grad()
def test_dead_channels_and_dead_weights_stay_finite(make_tiny):
    model = make_tiny("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj.weight[4] = 0
        layer.mlp.down_proj.weight[:, 9] = 0
        layer.self_attn.v_proj.weight[:24] = 0  # a whole KV head
    sites, rotation = first_block(model, prefixquant_config(), IDS)
    balance_block(sites, rotation)
    assert all(torch.isfinite(tensor).all() for tensor in sites.layer.state_dict().values() if tensor is not None)
