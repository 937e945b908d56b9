"""Quantize-dequantize with gradients: the bits of the integers, the gradients of LSQ."""

import pytest
import torch

from pq_ao.fake_quantize import fake_quantize
from pq_ao.ops import code_range, dequantize, quantize


@pytest.mark.parametrize("bits, codes", [(4, "even"), (8, "even"), (4, "spread"), (4, "wide")])
def test_values_are_bit_for_bit_those_of_the_integers(bits, codes):
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(1000, 40, generator=generator) * 9
    scale = torch.rand(40, generator=generator) * 2 + 0.05
    expected = dequantize(quantize(x, scale, bits, codes=codes), scale)
    assert torch.equal(fake_quantize(x, scale, bits, codes), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_are_straight_through_and_lsq(bits):
    low, high = code_range(bits)
    scale = torch.tensor(0.37, requires_grad=True)
    x = (torch.linspace(low * 1.5, high * 1.5, 101) * 0.37).requires_grad_()
    weights = torch.linspace(1, 2, 101)
    (fake_quantize(x, scale, bits) * weights).sum().backward()
    ratio = x.detach() / 0.37
    inside = (ratio.round() >= low) & (ratio.round() <= high)
    assert inside.any() and not inside.all()
    assert not x.grad[~inside].any()
    torch.testing.assert_close(x.grad[inside], weights[inside])
    expected = torch.where(inside, ratio.round() - ratio, ratio.clamp(low, high))
    torch.testing.assert_close(scale.grad, (expected * weights).sum(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("codes, low, high", [("spread", -12.5, 11.5), ("wide", -17, 16)])
def test_gradients_of_uneven_codes_are_straight_through_and_lsq(codes, low, high):
    """As far as halfway between the last code and one that would follow."""
    scale = torch.tensor(0.37, requires_grad=True)
    x = (torch.linspace(-20, 20, 102) * 0.37).requires_grad_()
    out = fake_quantize(x, scale, 4, codes)
    out.sum().backward()
    ratio, nearest = x.detach() / 0.37, quantize(x.detach(), scale.detach(), 4, codes=codes)
    inside = (ratio > low) & (ratio < high)
    assert torch.equal(x.grad, inside.float())
    expected = torch.where(inside, nearest - ratio, nearest.float())
    torch.testing.assert_close(scale.grad, expected.sum(), rtol=1e-4, atol=1e-3)


def test_half_precision_input_is_divided_in_float32():
    x = torch.full((1,), 100.0, dtype=torch.bfloat16)
    assert fake_quantize(x, torch.tensor([1.01]), 8).item() == pytest.approx(99 * 1.01)
