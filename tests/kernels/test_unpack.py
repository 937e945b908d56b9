"""Unpacking gives the very bytes of a cast of the codes."""

import pytest
import torch

pytest.importorskip("triton")

from pq_ao.ops import pack_int4, unpack_int4
from pq_ao.ops.int_linear import unpack_codes
from pq_ao.ops.kernels.unpack import UnpackConfig, unpack
from tests.kernels.linear_cases import device, random_codes

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte(dtype):
    packed = torch.arange(256, dtype=torch.uint8, device=device()).repeat(3, 1)
    got = unpack(packed, dtype)
    assert got.dtype == dtype
    assert torch.equal(got.view(torch.int8), unpack_int4(packed, 512).to(dtype).view(torch.int8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outer, inner", [(1, 8), (5, 72), (9, 1160), (3, 4608)])
def test_any_shape(outer, inner, dtype):
    codes = random_codes(outer, inner, bits=4)
    for got in (
        unpack(pack_int4(codes), dtype),
        unpack(pack_int4(codes), dtype, UnpackConfig(rows=2, words=64, warps=1)),
        unpack_codes(pack_int4(codes), inner, dtype),
    ):
        assert torch.equal(got.view(torch.int8), codes.to(dtype).view(torch.int8))


def test_what_it_refuses():
    with pytest.raises(ValueError, match="K % 8 == 0"):
        unpack(torch.zeros(2, 3, dtype=torch.uint8), torch.int8)
    with pytest.raises(ValueError, match="float16"):
        unpack(torch.zeros(2, 4, dtype=torch.uint8), torch.float16)
