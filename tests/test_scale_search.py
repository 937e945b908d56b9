"""The search of a static scale from a histogram, against quantizing the values themselves."""

import pytest
import torch

from pq_ao.block_sites import SiteRange
from pq_ao.ops.quantize import centre, dequantize, quantize
from pq_ao.scale_search import _ACTIVATION_GRID, _absmax_scale, _scale_errors, best_scale

CODES = [(4, "even"), (8, "even"), (4, "spread"), (4, "wide")]


def _values(outlier: float) -> torch.Tensor:
    x = torch.randn(40_000, generator=torch.Generator().manual_seed(0)) ** 3 + 0.5
    x[0] = outlier * x.abs().max()
    return x


def _error(x: torch.Tensor, scale: float, bits: int, codes: str) -> float:
    scale = torch.tensor(scale)
    offset = scale * centre(codes)
    restored = dequantize(quantize(x + offset, scale, bits, codes=codes), scale) - offset
    return float((restored - x).square().sum(dtype=torch.float64))


@pytest.mark.parametrize(("bits", "codes"), CODES)
@pytest.mark.parametrize("outlier", [1.0, -20.0])
def test_errors_are_those_of_quantized_values(bits, codes, outlier):
    x = _values(outlier)
    absmax = float(x.abs().max())
    start = _absmax_scale(absmax, bits, codes)
    found = _scale_errors(SiteRange.of(x, absmax), start, bits, codes)
    assert tuple(found) == _ACTIVATION_GRID
    bin_width = 2 * absmax / SiteRange.of(x, absmax).histogram.numel()
    for factor, error in found.items():
        exact = _error(x, start * factor, bits, codes)
        # a value stands for its bin's middle: each difference is off by half a bin at most
        assert abs(error**0.5 - exact**0.5) <= bin_width / 2 * len(x) ** 0.5


@pytest.mark.parametrize(("bits", "codes"), CODES)
def test_the_best_of_the_grid_is_taken(bits, codes):
    x = _values(1.0)
    start = _absmax_scale(float(x.abs().max()), bits, codes)
    lowest = min(_error(x, start * factor, bits, codes) for factor in _ACTIVATION_GRID)
    assert _error(x, float(best_scale(x, bits, codes)), bits, codes) <= 1.01 * lowest


def test_zeros_have_a_scale():
    assert float(best_scale(torch.zeros(3, 5), 4)) > 0
