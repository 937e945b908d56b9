"""The quantizers between ops, by mode: what they hold, their codes against the formula, and what is restored."""

import pytest
import torch
from torch import Tensor

from pq_ao import prefixquant_config
from pq_ao.ops import quantize
from pq_ao.quantizers import ActivationQuantizer, KVQuantizer, Path

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
GROUPS, HEAD_DIM, WIDTH = 2, 24, 40


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def make_site(mode: str, **fields) -> ActivationQuantizer:
    """Scale 0.3 or clip 0.8, and a mean a channel."""
    site = ActivationQuantizer(prefixquant_config(mode=mode, **fields), WIDTH, CPU)
    (site.clip if mode == "dynamic" else site.scale).fill_(0.8 if mode == "dynamic" else 0.3)
    site.shift.copy_(3 * random(WIDTH))
    return site


def make_kv(mode: str, scheme: str = "w4a4kv4") -> KVQuantizer:
    kv = KVQuantizer(prefixquant_config(scheme, mode=mode), GROUPS, HEAD_DIM, CPU)
    for i, name in enumerate(("key", "value")):
        factor = kv.get_buffer(f"{name}_clip" if mode == "dynamic" else f"{name}_scale")
        factor.copy_(torch.tensor([0.9, 0.6]) - 0.1 * i)
        kv.get_buffer(f"{name}_shift").copy_((3 + i) * random(GROUPS, 1, HEAD_DIM))
    return kv


def absmax_scale(x: Tensor, clip: float, bits: int = 4) -> Tensor:
    """The dynamic scale to the bit, factors in the order that is documented."""
    return x.abs().amax(dim=-1, keepdim=True) * (1 - 2**-12) * clip * (2 / (2**bits - 1))


def test_each_mode_holds_what_it_needs():
    for mode, factor in (("static", "scale"), ("dynamic", "clip")):
        site = ActivationQuantizer(prefixquant_config(mode=mode), WIDTH, CPU)
        assert set(site.state_dict()) == {factor, "shift"}
        assert torch.equal(site.get_buffer(factor), torch.ones(1)) and torch.equal(site.shift, torch.zeros(WIDTH))
        kv = KVQuantizer(prefixquant_config(mode=mode), GROUPS, HEAD_DIM, CPU)
        names = {f"{tensor}_{kind}" for tensor in ("key", "value") for kind in (factor, "shift")}
        assert set(kv.state_dict()) == names
        for tensor in ("key", "value"):
            assert torch.equal(kv.get_buffer(f"{tensor}_{factor}"), torch.ones(GROUPS))
            assert torch.equal(kv.get_buffer(f"{tensor}_shift"), torch.zeros(GROUPS, 1, HEAD_DIM))
        assert not KVQuantizer(prefixquant_config("w4a4kv16", mode=mode), GROUPS, HEAD_DIM, CPU).state_dict()


def test_a_new_dynamic_quantizer_is_plain_absmax():
    x = random(5, 7, WIDTH)
    site = ActivationQuantizer(prefixquant_config(mode="dynamic"), WIDTH, CPU)
    codes, scale = site.codes(x)
    assert torch.equal(scale, absmax_scale(x, 1)) and torch.equal(codes, quantize(x, scale, 4))
    kv = KVQuantizer(prefixquant_config(mode="dynamic"), GROUPS, HEAD_DIM, CPU)
    kv.path = Path.INTEGER
    x = random(3, GROUPS, 5, HEAD_DIM)
    key, value, key_scale, value_scale = kv(x, 2 * x, torch.float32)
    assert torch.equal(key_scale, absmax_scale(x, 1).squeeze(-1)) and torch.equal(value_scale, 2 * key_scale)
    assert torch.equal(key, quantize(x, key_scale.unsqueeze(-1), 4)) and torch.equal(value, key)


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_codes_of_a_site_are_of_what_is_left_without_the_shift(mode):
    site, x = make_site(mode), random(6, WIDTH)
    left = x - site.shift
    codes, scale = site.codes(x)
    assert torch.equal(scale, absmax_scale(left, 0.8) if mode == "dynamic" else torch.tensor([0.3]))
    assert torch.equal(codes, quantize(left, scale, 4))
    assert (codes == 7).sum() > 6  # clamped, more than one a row

    site.path = Path.REFERENCE
    assert torch.equal(site(x, torch.bfloat16), codes * scale + site.shift)
    site.path = Path.INTEGER
    out = site(x, torch.bfloat16)
    assert torch.equal(out.qdata, codes) and torch.equal(out.scale, scale)
    site.path = Path.FLOAT
    assert torch.equal(site(x, torch.bfloat16), x.bfloat16())


@pytest.mark.parametrize("scheme", ["w4a4kv4", "w8a8kv8"])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_keys_and_values_have_factors_and_shifts_of_each_head(mode, scheme):
    kv, key, value = make_kv(mode, scheme), random(3, GROUPS, 5, HEAD_DIM), 2 * random(3, GROUPS, 5, HEAD_DIM)
    kv.path = Path.INTEGER
    codes = kv(key, value, torch.bfloat16)
    kv.path = Path.REFERENCE
    restored = kv(key, value, torch.bfloat16)
    assert restored[2] is None and restored[3] is None
    for i, (x, name) in enumerate(((key, "key"), (value, "value"))):
        assert codes[i].dtype == torch.int8
        assert codes[2 + i].shape == ((3, GROUPS, 5) if mode == "dynamic" else (GROUPS,))
        for head in range(GROUPS):
            shift = kv.get_buffer(f"{name}_shift")[head]
            left = x[:, head] - shift
            if mode == "dynamic":
                scale = absmax_scale(left, kv.get_buffer(f"{name}_clip")[head], kv.bits)
                assert torch.equal(codes[2 + i][:, head], scale.squeeze(-1))
            else:
                scale = kv.get_buffer(f"{name}_scale")[head]
            assert torch.equal(codes[i][:, head], quantize(left, scale, kv.bits))
            assert torch.equal(restored[i][:, head], codes[i][:, head] * scale + shift)
