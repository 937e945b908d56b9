"""Weight codes: nearest with searched clipping, GPTQ, and the bias that goes with them."""

import pytest
import torch

from pq_ao.ops import dequantize, quantize
from pq_ao.rounding import ROUNDINGS, LayerInputs, RoundedWeight, corrected_bias, round_gptq, round_nearest


def _inputs(x, z=None, shift=0.0):
    """Of inputs x [T, K] without their shift, and what they are quantized to."""
    z = x if z is None else z
    mean, quantized_mean = x.mean(dim=0), z.mean(dim=0)
    z = z - quantized_mean
    return LayerInputs(z.T @ z, z.T @ (x - mean), mean + shift, quantized_mean, len(x))


def _error(weight, rounded: RoundedWeight, x, z=None):
    """By row, the squared error of the output; its mean error taken off, as the bias does."""
    z = x if z is None else z
    error = x @ weight.T - z @ dequantize(rounded.codes, rounded.scale[:, None]).T
    return (error - error.mean(dim=0)).square().sum(dim=0)


def _plain(weight, factor=1.0):
    scale = weight.abs().amax(dim=1) * 2 / 15 * factor
    return RoundedWeight(quantize(weight, scale[:, None], 4), scale, weight, torch.zeros(len(weight)))


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 64, generator=generator)
    weight[:, 3] *= 6  # an outlier channel: clipping pays
    x = torch.randn(400, 64, generator=generator)
    x[:, 3] *= 0.05
    return weight, x


@pytest.fixture
def correlated():
    """Inputs of which a few directions hold most, as a decoder's do."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(64, 64, generator=generator) * torch.logspace(0, -1.5, 64)[:, None]
    weight = torch.randn(24, 64, generator=generator)
    return weight, torch.randn(2000, 64, generator=generator) @ mixing


@pytest.mark.parametrize("method", ROUNDINGS)
@pytest.mark.parametrize(("bits", "low", "high"), [(4, -8, 7), (8, -128, 127)])
def test_codes_are_the_nearest_of_the_weight_that_is_returned(case, method, bits, low, high):
    weight, x = case
    rounded = ROUNDINGS[method](weight, bits, _inputs(x))
    assert rounded.codes.dtype == torch.int8 and rounded.scale.dtype == rounded.weight.dtype == torch.float32
    assert rounded.codes.min() >= low and rounded.codes.max() <= high
    assert torch.equal(rounded.codes, quantize(rounded.weight, rounded.scale[:, None], bits))


@pytest.mark.parametrize("method", ROUNDINGS)
def test_output_rms_is_that_of_the_quantized_output(case, method):
    weight, x = case
    rounded = ROUNDINGS[method](weight, 4, _inputs(x))
    output = x @ dequantize(rounded.codes, rounded.scale[:, None]).T
    torch.testing.assert_close(rounded.output_rms, output.std(dim=0, correction=0), rtol=1e-4, atol=1e-5)


def test_search_beats_absmax_on_every_row_and_is_near_the_best_of_a_fine_scan(case):
    weight, x = case
    found, plain = _error(weight, round_nearest(weight, 4, _inputs(x)), x), _error(weight, _plain(weight), x)
    assert (found <= plain * 1.0001).all() and found.sum() < 0.5 * plain.sum()
    scan = torch.stack([_error(weight, _plain(weight, f), x) for f in torch.linspace(0.35, 1.05, 141)])
    assert found.sum() <= 1.1 * scan.amin(dim=0).sum()


def test_search_sees_the_inputs_as_they_will_be_quantized(case):
    weight, x = case
    z = dequantize(quantize(x, torch.tensor(0.9), 4), torch.tensor(0.9))
    aware = _error(weight, round_nearest(weight, 4, _inputs(x, z)), x, z)
    unaware = _error(weight, round_nearest(weight, 4, _inputs(x)), x, z)
    assert aware.sum() < 0.98 * unaware.sum()


def test_gptq_makes_up_for_its_errors(correlated):
    weight, x = correlated
    nearest = _error(weight, round_nearest(weight, 4, _inputs(x)), x).sum()
    gptq = _error(weight, round_gptq(weight, 4, _inputs(x)), x).sum()
    assert gptq < 0.5 * nearest


def test_gptq_finds_the_best_codes_of_two_columns():
    """With K = 2 all codes can be tried; one correction is then nearly the whole story."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(16, 2, generator=generator)
    x = torch.randn(500, 2, generator=generator) @ torch.tensor([[1.0, 0.9], [0.0, 0.3]])
    rounded = round_gptq(weight, 4, _inputs(x))
    codes = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).float()  # [256, 2]
    for row, scale, code in zip(weight, rounded.scale, rounded.codes, strict=True):
        outputs = x @ (codes * scale).T
        errors = (outputs - (x @ row)[:, None]).square().sum(dim=0)
        found = float((x @ (code * scale) - x @ row).square().sum())
        assert found <= 1.6 * float(errors.min()) + 1e-3


def test_gptq_aims_at_the_exact_output_of_quantized_inputs(correlated):
    """Coarse inputs are worth less than their weight says, so the best weight on them is another one."""
    weight, x = correlated
    step = torch.tensor(1.5)
    z = dequantize(quantize(x, step, 4), step)
    aware = _error(weight, round_gptq(weight, 4, _inputs(x, z)), x, z).sum()
    unaware = _error(weight, round_gptq(weight, 4, _inputs(z)), x, z).sum()
    assert aware < 0.97 * unaware


@pytest.mark.parametrize("method", ROUNDINGS)
def test_zero_row_and_tiny_rows_keep_finite_positive_scales(method):
    weight = torch.zeros(3, 16)
    weight[1] = 1e-6 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    weight[2] = torch.linspace(-1, 1, 16)
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    rounded = ROUNDINGS[method](weight, 4, _inputs(x))
    assert torch.isfinite(rounded.scale).all() and (rounded.scale > 0).all()
    assert (rounded.codes[0] == 0).all() and rounded.codes[1].abs().max() >= 4


@pytest.mark.parametrize("x", [torch.zeros(50, 16), torch.randn(3, 16), torch.eye(16)[:, :1] * torch.ones(16)])
def test_gptq_takes_dead_channels_few_tokens_and_inputs_of_rank_one(x):
    weight = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    rounded = round_gptq(weight, 4, _inputs(x))
    assert torch.isfinite(rounded.weight).all() and torch.isfinite(rounded.scale).all()
    assert rounded.codes.abs().max() >= 4


@pytest.mark.parametrize("method", ROUNDINGS)
def test_corrected_bias_keeps_the_mean_output(case, method):
    weight, x = case
    shift, bias = torch.linspace(-1, 1, 64), torch.linspace(0, 3, 24)
    z = dequantize(quantize(x, torch.tensor(0.7), 4), torch.tensor(0.7))
    inputs = _inputs(x, z, shift)
    rounded = ROUNDINGS[method](weight, 4, inputs)
    corrected = corrected_bias(weight, bias, rounded, inputs)
    expected = ((x + shift) @ weight.T + bias).mean(dim=0)
    actual = (z @ dequantize(rounded.codes, rounded.scale[:, None]).T + corrected).mean(dim=0)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
