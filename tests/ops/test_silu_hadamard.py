"""The reference of silu_hadamard: what the MLP did with separate operators, and a schema that compilers can trust."""

import pytest
import torch
from transformers.activations import ACT2FN

from pq_ao import prefixquant_config
from pq_ao.hadamard import hadamard_base, hadamard_transform
from pq_ao.ops import hadamard, silu_hadamard
from pq_ao.quantizers import ActivationQuantizer

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTHS = (160, 64, 18)
ONE = torch.ones(1)


def random_gate_up(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def make_quantizer(width: int, mode: str, codes: str = "even") -> ActivationQuantizer:
    quantizer = ActivationQuantizer(prefixquant_config(mode=mode), width, torch.device("cpu"), codes)
    (quantizer.clip if quantizer.dynamic else quantizer.scale).fill_(0.7 if quantizer.dynamic else 0.3)
    quantizer.shift.copy_(torch.linspace(-1, 1, width))
    return quantizer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mode, codes", [("static", "even"), ("static", "spread"), ("dynamic", "even")])
@pytest.mark.parametrize("rotation", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
def test_equals_separate_operators(width, rotation, mode, codes, dtype):
    gate_up = random_gate_up(2, 3, 2 * width, dtype=dtype)
    base = hadamard_base(width) if rotation else None
    quantizer = make_quantizer(width, mode, codes)
    gate, up = gate_up.float().chunk(2, dim=-1)
    h = ACT2FN["silu"](gate) * up
    expected, expected_scale = quantizer.codes(hadamard(h, base) if rotation else h)
    site = (quantizer.scale, quantizer.clip, quantizer.shift)
    found, row_scale = silu_hadamard(gate_up, base, *site, 4, torch.int8, codes=codes)
    assert found.dtype == torch.int8 and torch.equal(found, expected)
    if mode == "dynamic":
        assert torch.equal(row_scale, expected_scale)
    else:
        assert row_scale.shape == (0,)


@pytest.mark.parametrize("width", WIDTHS)
def test_against_float64(width):
    gate_up = random_gate_up(4, 2 * width)
    gate, up = gate_up.double().chunk(2, dim=-1)
    h = hadamard_transform(gate * torch.sigmoid(gate) * up)
    scale = torch.tensor([0.3])
    codes, _ = silu_hadamard(gate_up, hadamard_base(width), scale, None, None, 4, torch.int8)
    inside = (h / scale).clamp(-8, 7)
    assert ((codes - inside).abs() <= 0.5 + 1e-5).all()


def test_float8_holds_the_same_integers():
    gate_up, base = random_gate_up(3, 320), hadamard_base(160)
    scale, shift = torch.tensor([0.1]), torch.zeros(160)
    codes, _ = silu_hadamard(gate_up, base, scale, None, shift, 4, torch.int8)
    float8, _ = silu_hadamard(gate_up, base, scale, None, shift, 4, torch.float8_e4m3fn)
    assert codes.min() == -8 and codes.max() == 7
    assert float8.dtype == torch.float8_e4m3fn and torch.equal(float8.float(), codes.float())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_accumulators_equal_scaling_first(bias, bits):
    raw, base = (1000 * random_gate_up(3, 320, dtype=torch.float32)).bfloat16(), hadamard_base(160)
    in_scale, in_bias = torch.linspace(5e-4, 2e-3, 320), torch.linspace(-1, 1, 320) if bias else None
    y = raw * in_scale + in_bias if bias else raw * in_scale
    scale = torch.tensor([0.02])
    expected, _ = silu_hadamard(y, base, scale, None, None, bits, torch.int8)
    codes, _ = silu_hadamard(raw, base, scale, None, None, bits, torch.int8, in_scale, in_bias)
    assert y.dtype == torch.float32 and torch.equal(codes, expected)


@pytest.mark.parametrize("rotation", [True, False])
def test_dynamic_scales_are_those_of_what_is_left_without_the_shift(rotation):
    """A mean far larger than what varies around it, which would otherwise take the whole range."""
    gate_up, base = random_gate_up(6, 320, dtype=torch.float32), hadamard_base(160) if rotation else None
    gate, up = gate_up.double().chunk(2, dim=-1)
    h = gate * torch.sigmoid(gate) * up
    h = hadamard_transform(h) if rotation else h
    shift = h.mean(dim=0).float() - 50
    clip = torch.tensor([0.8])
    codes, row_scale = silu_hadamard(gate_up, base, None, clip, shift, 4, torch.int8)
    left = h - shift
    absmax = left.abs().amax(dim=-1, keepdim=True)
    torch.testing.assert_close(row_scale, (0.8 * (1 - 2**-12) * absmax / 7.5).float(), rtol=1e-6, atol=0)
    assert ((codes - (left / row_scale).clamp(-8, 7)).abs() <= 0.5 + 1e-4).all() and codes.max() == 7


def test_hostile_values():
    """Saturated gates, an outlier beyond the range, a row of zeros (whose dynamic scale must not divide by zero)."""
    gate_up = random_gate_up(2, 320, dtype=torch.float32)
    gate_up[0, :4] = torch.tensor([-1e30, 1e4, -200.0, 200.0])
    gate_up[1] = 0
    for scale, clip in ((None, torch.tensor([0.9])), (torch.tensor([0.1]), None)):
        codes, row_scale = silu_hadamard(gate_up, hadamard_base(160), scale, clip, None, 4, torch.int8)
        assert torch.equal(codes[1], torch.zeros_like(codes[1]))
        assert row_scale.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 24), (24,), (2, 0, 24)])
def test_empty_and_flat_inputs(shape):
    codes, row_scale = silu_hadamard(random_gate_up(*shape), hadamard_base(12), None, ONE, None, 4, torch.int8)
    assert codes.shape == (*shape[:-1], 12) and row_scale.shape == (*shape[:-1], 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gate_up": torch.ones(2, 24, dtype=torch.int8)}, TypeError, "gate_up has dtype"),
        ({"gate_up": torch.ones(2, 23)}, ValueError, "2F"),
        ({"base": hadamard_base(20)}, ValueError, "hadamard_base"),
        ({"shift": torch.ones(11)}, ValueError, "shift has shape"),
        ({"scale": None}, ValueError, "neither scale nor clip"),
        ({"clip": ONE}, ValueError, "both given"),
        ({"scale": None, "clip": torch.ones(2)}, ValueError, r"clip is torch.float32 \[2\]"),
        ({"scale": None, "clip": torch.ones(())}, ValueError, r"clip is torch.float32 \[\]"),
        ({"scale": None, "clip": torch.ones(1).half()}, ValueError, "clip is torch.float16"),
        ({"scale": None, "clip": torch.tensor([-0.5])}, ValueError, r"clip is \[-0.5\]; factors above 0"),
        ({"scale": None, "clip": torch.zeros(1)}, ValueError, "factors above 0"),
        ({"scale": torch.ones(2)}, ValueError, "scale has shape"),
        ({"bits": 3}, ValueError, "bits=3"),
        ({"bits": 8, "encoding": torch.float8_e4m3fn}, ValueError, "bits=8"),
        ({"encoding": torch.int32}, TypeError, "encoding"),
        ({"in_bias": torch.ones(24)}, ValueError, "in_bias goes with in_scale"),
        ({"gate_up": torch.ones(2, 24).bfloat16(), "in_scale": torch.ones(12)}, ValueError, "in_scale is"),
        ({"in_scale": torch.ones(24)}, TypeError, "accumulators in torch.bfloat16"),
        (
            {"gate_up": torch.ones(2, 24).bfloat16(), "in_scale": torch.ones(24), "scale": None, "clip": ONE},
            ValueError,
            "clip is given with in_scale",
        ),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {
        "gate_up": torch.ones(2, 24), "base": hadamard_base(12), "scale": ONE, "clip": None, "shift": torch.zeros(12),
        "bits": 4, "encoding": torch.int8,
    } | change  # fmt: skip
    with pytest.raises(error, match=message):
        silu_hadamard(**arguments)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("encoding", [torch.int8, torch.float8_e4m3fn])
def test_opcheck(dynamic, encoding):
    scale, clip = (None, ONE) if dynamic else (ONE, None)
    arguments = (random_gate_up(2, 3, 24), hadamard_base(12), scale, clip, torch.zeros(12), 4, encoding)
    torch.library.opcheck(torch.ops.pq_ao.silu_hadamard.default, arguments)
    if not dynamic:
        torch.library.opcheck(torch.ops.pq_ao.silu_hadamard.default, (*arguments, torch.ones(24), None))
