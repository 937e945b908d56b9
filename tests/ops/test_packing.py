"""Two codes a byte: what comes out is what went in, and each code stands where the layout says."""

import pytest
import torch

from pq_ao.ops import pack_int4, unpack_int4

ALL_CODES = torch.arange(-8, 8, dtype=torch.int8)


def random_codes(*shape: int) -> torch.Tensor:
    return torch.randint(-8, 8, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 15, 16, 31, 33, 64, 127, 576])
@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3), (2, 3, 4), (0,)])
def test_round_trip(leading, length):
    codes = random_codes(*leading, length)
    packed = pack_int4(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*leading, (length + 1) // 2)
    restored = unpack_int4(packed, length)
    assert restored.dtype == torch.int8
    assert torch.equal(restored, codes)


def test_every_pair_of_codes():
    pairs = torch.cartesian_prod(ALL_CODES, ALL_CODES)
    packed = pack_int4(pairs)
    assert packed.shape == (256, 1)
    assert torch.equal(packed.flatten().sort().values, torch.arange(256, dtype=torch.uint8))
    assert torch.equal(unpack_int4(packed, 2), pairs)


def test_low_nibbles_hold_the_first_half_and_high_nibbles_the_second():
    packed = pack_int4(ALL_CODES)
    low, high = torch.arange(8), torch.arange(8, 16)  # offset binary: nibble = code + 8
    assert torch.equal(packed, (low + 16 * high).to(torch.uint8))


def test_an_odd_length_is_padded_with_the_zero_code():
    packed = pack_int4(torch.tensor([-8, 7, 3], dtype=torch.int8))
    assert packed.tolist() == [0 + 16 * (3 + 8), (7 + 8) + 16 * 8]
    assert unpack_int4(packed, 4).tolist() == [-8, 7, 3, 0]


def test_strided_codes():
    codes = random_codes(6, 10)
    assert torch.equal(pack_int4(codes.t()), pack_int4(codes.t().contiguous()))
    assert torch.equal(unpack_int4(pack_int4(codes).t().contiguous().t(), 10), codes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32, torch.bool])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match=f"{dtype}; int8 codes in -8..7"):
        pack_int4(torch.zeros(4, dtype=dtype))


def test_compiles_without_a_break():
    codes = random_codes(3, 9)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def there_and_back(x):
        return unpack_int4(pack_int4(x), 9)

    assert torch.equal(there_and_back(codes), codes)
