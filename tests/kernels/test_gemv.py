"""The dp4a linear: exact integers, and an epilogue that rounds as PyTorch's does."""

import pytest
import torch

pytest.importorskip("triton")

from pq_ao.ops import pack_int4
from pq_ao.ops.int_linear import packed_linear
from pq_ao.ops.kernels.gemv import GemvConfig, gemv, gemv_config
from tests.kernels.linear_cases import DTYPES, accumulators, device, epilogue, extremes, random_codes, scales

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "int8"])
@pytest.mark.parametrize("rows", range(1, 9))
def test_equals_int64(rows, packed):
    x, w = random_codes(rows, 72, bits=8), random_codes(13, 72, bits=4 if packed else 8, seed=1)
    got = gemv(x, None, pack_int4(w) if packed else w, None, None, torch.int32)
    assert got.dtype == torch.int32 and torch.equal(got, accumulators(x, w))


@pytest.mark.parametrize(
    "config", [GemvConfig(1, 1, 1), GemvConfig(2, 1, 3), GemvConfig(4, 2, 2), GemvConfig(16, 4, 1), GemvConfig(2, 2, 7)]
)
def test_every_cut_of_a_row_that_divides_by_none(config):
    x, w = random_codes(3, 4 * 1160, bits=4), random_codes(17, 4 * 1160, bits=4, seed=1)
    assert torch.equal(gemv(x, None, pack_int4(w), None, None, torch.int32, config), accumulators(x, w))


def test_chosen_cuts():
    """One row spreads over threads; more rows have more to compute, and a warp has a row for itself."""
    assert gemv_config(1, 6144, 512) == GemvConfig(4, 4, 2)
    assert gemv_config(1, 28672, 512) == GemvConfig(4, 2, 2)
    assert gemv_config(1, 576, 72) == GemvConfig(4, 1, 2)
    assert gemv_config(2, 6144, 512) == gemv_config(4, 6144, 512) == GemvConfig(4, 1, 4)
    assert gemv_config(4, 28672, 512) == GemvConfig(4, 2, 2)
    assert gemv_config(8, 128256, 1024, packed=False) == GemvConfig(4, 2, 2)
    assert gemv_config(8, 4096, 3584, packed=False) == gemv_config(8, 4096, 1792) == GemvConfig(2, 2, 2)


@pytest.mark.parametrize("x_code, w_code", extremes(4))
def test_extreme_codes_over_a_wide_layer(x_code, w_code):
    x, w = torch.full((2, 14336), x_code, dtype=torch.int8), torch.full((3, 14336), w_code, dtype=torch.int8)
    expected = torch.full((2, 3), 14336 * x_code * w_code, dtype=torch.int32)
    assert torch.equal(gemv(x.to(device()), None, pack_int4(w).to(device()), None, None, torch.int32).cpu(), expected)


@pytest.mark.parametrize("x_code, w_code", extremes(8))
def test_extreme_eight_bit_codes(x_code, w_code):
    x, w = torch.full((1, 4096), x_code, dtype=torch.int8), torch.full((3, 4096), w_code, dtype=torch.int8)
    expected = torch.full((1, 3), 4096 * x_code * w_code, dtype=torch.int32)
    assert torch.equal(gemv(x.to(device()), None, w.to(device()), None, None, torch.int32).cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("per_row", [True, False], ids=["per-row", "static"])
@pytest.mark.parametrize("rows", [1, 3])
def test_epilogue(rows, per_row, with_bias, dtype):
    x, w = random_codes(rows, 64, bits=4), random_codes(9, 64, bits=4, seed=1)
    x_scale, w_scale, bias = scales(rows, 9, per_row, with_bias)
    y = gemv(x, x_scale, pack_int4(w), w_scale, bias, dtype)
    assert torch.equal(y, epilogue(accumulators(x, w), x_scale, w_scale, bias, dtype))
    assert torch.equal(y, packed_linear(x, x_scale, pack_int4(w), w_scale, bias, dtype, "dp4a"))


@pytest.mark.parametrize("rows, inner, packed", [(9, 64, True), (0, 64, True), (1, 12, True), (1, 6, False)])
def test_shapes_that_it_refuses(rows, inner, packed):
    x, w = random_codes(rows, inner, bits=4), random_codes(3, inner, bits=4)
    with pytest.raises(ValueError, match="gemv: x has"):
        gemv(x, None, pack_int4(w) if packed else w, None, None, torch.int32)
