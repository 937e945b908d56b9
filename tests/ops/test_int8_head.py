"""Digits of activations, and the INT8 head's product, against float64."""

import pytest
import torch

from pq_ao.ops.int8_head import MAX_INNER, int8_head, split_digits


def _sqnr(found, exact):
    """Decibels."""
    return float(10 * torch.log10(exact.double().square().mean() / (found.double() - exact.double()).square().mean()))


def _inputs(rows, outs, inner, dtype):
    generator = torch.Generator().manual_seed(rows + inner)
    x = torch.randn(rows, inner, generator=generator).to(dtype)
    codes = torch.randint(-127, 128, (outs, inner), generator=generator, dtype=torch.int8)
    return x, codes, torch.rand(outs, generator=generator) + 0.5


def _digits_as_floats(x):
    digits, scale = split_digits(x)
    assert digits.dtype == torch.int8
    return (256 * digits[0].double() + digits[1].double()) * scale.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_digits_keep_16_bits(dtype):
    x = torch.randn(7, 4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    error = (_digits_as_floats(x) - x.double()).abs()
    assert (error <= x.double().abs().amax(dim=1, keepdim=True) / 64000).all()


def test_digits_of_hostile_rows():
    x = torch.zeros(5, 64)
    x[1, 3], x[2, 3], x[3, :], x[4, 5] = 3e38, -1e-32, -7.0, 1e-45
    restored = _digits_as_floats(x)
    assert torch.equal(restored[0], torch.zeros(64, dtype=torch.float64))  # no division by zero
    for row in (1, 2, 3):
        torch.testing.assert_close(restored[row], x[row].double(), rtol=1e-6, atol=0)
    assert restored[4].abs().max() < 1e-30  # below the smallest scale
    assert int8_head(torch.tensor([[torch.nan, 1.0]]), torch.ones(3, 2, dtype=torch.int8), torch.ones(3)).isnan().all()


@pytest.mark.parametrize(("rows", "outs", "inner"), [(1, 515, 96), (3, 100, 577), (8, 64, 4096), (0, 20, 32)])
@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, 80), (torch.float16, 70), (torch.bfloat16, 54)])
def test_product_against_float64(rows, outs, inner, dtype, floor):
    x, codes, scale = _inputs(rows, outs, inner, dtype)
    y = int8_head(x, codes, scale)
    assert y.shape == (rows, outs) and y.dtype == dtype
    if rows:  # 89 dB in float32; a rounding to float16 or bfloat16 alone has 73.6 or 55.6
        assert _sqnr(y, x.double() @ (codes.double() * scale.double()[:, None]).T) > floor


def test_rows_do_not_depend_on_each_other_and_many_are_cut():
    x, codes, scale = _inputs(1030, 9, 64, torch.float32)
    y = int8_head(x, codes, scale)
    assert torch.equal(y[600:601], int8_head(x[600:601], codes, scale))
    assert torch.equal(int8_head(x.view(2, 515, 64), codes, scale), y.view(2, 515, 9))


def test_sums_at_the_limit_stay_exact():
    x = torch.full((1, MAX_INNER), -1.0)
    codes = torch.full((1, MAX_INNER), 127, dtype=torch.int8)
    torch.testing.assert_close(int8_head(x, codes, torch.ones(1)).item(), -127.0 * MAX_INNER, rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels need a GPU")
@pytest.mark.parametrize("rows", [1, 4, 8, 33, 600])
def test_gpu_equals_cpu(rows):
    x, codes, scale = _inputs(rows, 4999, 4096, torch.float32)
    found = int8_head(x.cuda(), codes.cuda(), scale.cuda()).cpu()
    torch.testing.assert_close(found, int8_head(x, codes, scale), rtol=1e-6, atol=1e-4)
