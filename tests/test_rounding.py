"""Weight codes by nearest rounding with searched clipping, and the bias that goes with them."""

import pytest
import torch

from pq_ao.ops import dequantize, quantize
from pq_ao.rounding import LayerInputs, corrected_bias, round_nearest


def _inputs(x, z=None, shift=0.0):
    z = x if z is None else z
    return LayerInputs(z.T @ z, z.T @ x, x.mean(dim=0) + shift, z.mean(dim=0))


def _error(weight, codes, scale, x, z=None):
    z = x if z is None else z
    return (x @ weight.T - z @ dequantize(codes, scale[:, None]).T).square().sum(dim=0)


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 64, generator=generator)
    weight[:, 3] *= 6  # an outlier channel: clipping pays
    x = torch.randn(400, 64, generator=generator)
    x[:, 3] *= 0.05
    return weight, x


def test_codes_are_those_of_the_scale_and_in_range(case):
    weight, x = case
    for bits, low, high in ((4, -8, 7), (8, -128, 127)):
        codes, scale = round_nearest(weight, bits, _inputs(x))
        assert codes.dtype == torch.int8 and scale.dtype == torch.float32
        assert codes.min() >= low and codes.max() <= high
        assert torch.equal(codes, quantize(weight, scale[:, None], bits))


def test_search_beats_absmax_on_every_row_and_is_near_the_best_of_a_fine_scan(case):
    weight, x = case
    start = weight.abs().amax(dim=1) * 2 / 15
    found = _error(weight, *round_nearest(weight, 4, _inputs(x)), x)
    plain = _error(weight, quantize(weight, start[:, None], 4), start, x)
    assert (found <= plain * 1.0001).all() and found.sum() < 0.5 * plain.sum()
    scan = torch.stack(
        [
            _error(weight, quantize(weight, (start * f)[:, None], 4), start * f, x)
            for f in torch.linspace(0.35, 1.05, 141)
        ]
    )
    assert found.sum() <= 1.1 * scan.amin(dim=0).sum()


def test_search_sees_the_inputs_as_they_will_be_quantized(case):
    weight, x = case
    z = dequantize(quantize(x, torch.tensor(0.9), 4), torch.tensor(0.9))
    aware = _error(weight, *round_nearest(weight, 4, _inputs(x, z)), x, z)
    unaware = _error(weight, *round_nearest(weight, 4, _inputs(x)), x, z)
    assert aware.sum() <= unaware.sum()


def test_zero_row_and_tiny_rows_keep_finite_positive_scales():
    weight = torch.zeros(3, 16)
    weight[1] = 1e-6 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    weight[2] = torch.linspace(-1, 1, 16)
    codes, scale = round_nearest(weight, 4, _inputs(torch.randn(50, 16)))
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert (codes[0] == 0).all() and codes[1].abs().max() >= 4


def test_corrected_bias_keeps_the_mean_output(case):
    weight, x = case
    shift, bias = torch.linspace(-1, 1, 64), torch.linspace(0, 3, 24)
    z = dequantize(quantize(x, torch.tensor(0.7), 4), torch.tensor(0.7))
    inputs = _inputs(x, z, shift)
    codes, scale = round_nearest(weight, 4, inputs)
    corrected = corrected_bias(weight, bias, codes, scale, inputs)
    expected = ((x + shift) @ weight.T + bias).mean(dim=0)
    actual = (z @ dequantize(codes, scale[:, None]).T + corrected).mean(dim=0)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
