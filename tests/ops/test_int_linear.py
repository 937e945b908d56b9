"""Integer products are exact on every shape and for every code; the epilogue rounds once."""

import pytest
import torch

from pq_ao.ops import int_accumulate, int_linear, pack_int4

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = (1, 2, 3, 17, 33)
# (N, K): odd, and no multiple of 8 or of a tile; then round ones
OUTER_INNER = ((1, 1), (3, 5), (7, 33), (17, 19), (65, 129), (127, 31), (8, 16), (64, 128))


def random_codes(*shape: int, bits: int, seed: int = 0) -> torch.Tensor:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    return torch.randint(low, high, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The products in int64, elementwise and summed: no matrix product of anybody's."""
    products = x.long()[:, None, :] * weight.long()[None, :, :]
    return products.sum(dim=-1)


def stored(weight: torch.Tensor, packed: bool) -> torch.Tensor:
    return pack_int4(weight) if packed else weight


class TestAccumulate:
    @pytest.mark.parametrize("packed", [False, True], ids=["int8", "packed"])
    @pytest.mark.parametrize("outer, inner", OUTER_INNER)
    @pytest.mark.parametrize("rows", ROWS)
    def test_equals_int64(self, rows, outer, inner, packed):
        x = random_codes(rows, inner, bits=8)
        weight = random_codes(outer, inner, bits=4 if packed else 8, seed=1)
        got = int_accumulate(x, stored(weight, packed))
        assert got.dtype == torch.int32 and got.is_contiguous()
        assert torch.equal(got.long(), exact(x, weight))

    @pytest.mark.parametrize("rows", [1, 17])
    @pytest.mark.parametrize("x_code, w_code", [(-8, -8), (7, 7), (-8, 7), (7, -8)])
    def test_extreme_four_bit_codes_over_a_wide_layer(self, rows, x_code, w_code):
        inner = 14336  # intermediate_size of Llama-3-8B and Mistral-7B
        x = torch.full((rows, inner), x_code, dtype=torch.int8)
        weight = torch.full((3, inner), w_code, dtype=torch.int8)
        expected = torch.full((rows, 3), inner * x_code * w_code, dtype=torch.int32)
        assert torch.equal(int_accumulate(x, pack_int4(weight)), expected)
        assert torch.equal(int_accumulate(x, weight), expected)

    @pytest.mark.parametrize("rows", [1, 17])
    @pytest.mark.parametrize("x_code, w_code", [(-128, -128), (127, 127), (-128, 127), (127, -128)])
    def test_extreme_eight_bit_codes(self, rows, x_code, w_code):
        """Pairs of such products overflow 16 bits, where instructions that saturate would lose them."""
        inner = 14337
        x = torch.full((rows, inner), x_code, dtype=torch.int8)
        weight = torch.full((5, inner), w_code, dtype=torch.int8)
        expected = torch.full((rows, 5), inner * x_code * w_code, dtype=torch.int32)
        assert torch.equal(int_accumulate(x, weight), expected)

    @pytest.mark.parametrize("packed", [False, True], ids=["int8", "packed"])
    def test_alternating_extremes(self, packed):
        low, high = (-8, 7) if packed else (-128, 127)
        inner = 255
        x = torch.tensor([low, high], dtype=torch.int8).repeat(inner)[:inner].expand(3, -1).contiguous()
        weight = torch.stack((x[0], x[0].flip(0), -x[0].clamp_min(low + 1)))
        assert torch.equal(int_accumulate(x, stored(weight, packed)).long(), exact(x, weight))

    @pytest.mark.parametrize("packed", [False, True], ids=["int8", "packed"])
    def test_no_rows(self, packed):
        got = int_accumulate(torch.empty(0, 9, dtype=torch.int8), stored(random_codes(5, 9, bits=4), packed))
        assert got.shape == (0, 5) and got.dtype == torch.int32

    def test_strided_inputs(self):
        x, weight = random_codes(19, 6, bits=4), random_codes(40, 7, bits=8)
        expected = exact(x.t()[:, ::2], weight[::4].t()[:6].t().repeat(1, 2)[:, :10])
        got = int_accumulate(x.t()[:, ::2], weight[::4].t()[:6].t().repeat(1, 2)[:, :10])
        assert torch.equal(got.long(), expected)

    @pytest.mark.parametrize("packed", [False, True], ids=["int8", "packed"])
    @pytest.mark.parametrize("rows", [0, 1, 3])
    def test_opcheck(self, rows, packed):
        x, weight = random_codes(rows, 9, bits=4), random_codes(5, 9, bits=4)
        torch.library.opcheck(torch.ops.pq_ao.int_accumulate.default, (x, stored(weight, packed)))


def epilogue(acc, x_scale, w_scale, bias, dtype) -> torch.Tensor:
    """method section 1.3: the one float32 rounding of each step, written out in float64."""
    scale = (x_scale.double() * w_scale.double()).float()
    y = (acc.float().double() * scale.double()).float()
    if bias is not None:
        y = (y.double() + bias.double()).float()
    return y.to(dtype)


class TestLinear:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("per_row", [False, True], ids=["static", "per-row"])
    @pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
    @pytest.mark.parametrize("packed", [False, True], ids=["int8", "packed"])
    def test_epilogue(self, packed, with_bias, per_row, dtype):
        generator = torch.Generator().manual_seed(2)
        x, weight = random_codes(2, 3, 33, bits=4), random_codes(17, 33, bits=4)
        x_scale = torch.rand((2, 3, 1) if per_row else (1,), generator=generator) * 0.1
        w_scale = torch.rand(17, generator=generator) * 0.1
        bias = torch.randn(17, generator=generator) if with_bias else None
        y = int_linear(x, x_scale, stored(weight, packed), w_scale, bias, dtype)
        assert y.dtype == dtype and y.shape == (2, 3, 17)
        acc = exact(x.view(-1, 33), weight).view(2, 3, 17)
        assert torch.equal(y, epilogue(acc, x_scale, w_scale, bias, dtype))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_rounded_once_from_float64(self, dtype):
        """Scales that are powers of two leave nothing to round in float32, so only the last rounding is left."""
        x, weight = random_codes(5, 128, bits=8), random_codes(9, 128, bits=8)
        x_scale, w_scale = torch.tensor([2.0**-7]), torch.full((9,), 2.0**-5)
        bias = torch.arange(9) / 8
        y = int_linear(x, x_scale, weight, w_scale, bias, dtype)
        expected = exact(x, weight).double() * 2.0**-12 + bias.double()
        assert torch.equal(y, expected.to(dtype))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_close_to_float64_whatever_the_scales(self, dtype):
        generator = torch.Generator().manual_seed(3)
        x, weight = random_codes(33, 129, bits=8), random_codes(65, 129, bits=8)
        x_scale, w_scale = torch.rand(1, generator=generator), torch.rand(65, generator=generator)
        y = int_linear(x, x_scale, weight, w_scale, None, dtype)
        expected = exact(x, weight).double() * (x_scale.double() * w_scale.double())
        # half a unit for the rounding to `dtype`, and those of acc, of the scales' product and of theirs in float32
        bound = (torch.finfo(dtype).eps / 2 + 3 * torch.finfo(torch.float32).eps / 2) * expected.abs()
        assert ((y.double() - expected).abs() <= bound * 1.001).all()

    def test_bias_is_added_in_float32(self):
        """A bfloat16 sum would swallow the bias beside 1024."""
        x, weight = torch.full((1, 1), 4, dtype=torch.int8), torch.full((1, 1), 4, dtype=torch.int8)
        y = int_linear(x, torch.tensor([64.0]), weight, torch.ones(1), torch.tensor([3.0]), torch.float32)
        assert y.item() == 1027.0
        y = int_linear(x, torch.tensor([64.0]), weight, torch.ones(1), torch.tensor([5.0]), torch.bfloat16)
        assert y.item() == torch.tensor(1029.0).bfloat16().item() == 1032.0

    @pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
    def test_no_rows(self, shape):
        y = int_linear(
            torch.empty(shape, dtype=torch.int8),
            torch.ones(1),
            pack_int4(random_codes(5, 8, bits=4)),
            torch.ones(5),
            torch.ones(5),
            torch.bfloat16,
        )
        assert y.shape == (*shape[:-1], 5) and y.dtype == torch.bfloat16
