"""Symmetric quantizers against the formula in float64, and at its edges: ties, both ends, tiny and huge scales."""

import pytest
import torch

from pq_ao.ops import code_range, dequantize, quantize, quantize_per_row
from pq_ao.ops.quantize import MAX_SCALE, MIN_SCALE, absmax_scale, centre, code_values

ONE = torch.ones(1)
CLIPS = (1.0, 0.8, 0.37)
UNEVEN = {
    "spread": (-11, -8, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 7, 10),
    "wide": (-15, -11, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 5, 7, 10, 14),
}


def random_floats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_code_range():
    assert code_range(4) == (-8, 7)
    assert code_range(8) == (-128, 127)
    assert {codes: code_range(4, codes) for codes in UNEVEN} == {"spread": (-11, 10), "wide": (-15, 14)}


def test_code_values():
    assert code_values(4) == list(range(-8, 8)) and code_values(8) == list(range(-128, 128))
    assert {codes: tuple(code_values(4, codes)) for codes in UNEVEN} == {key: tuple(UNEVEN[key]) for key in UNEVEN}
    with pytest.raises(ValueError, match="bits=8"):
        code_values(8, "spread")


@pytest.mark.parametrize("codes, values", UNEVEN.items())
class TestUnevenCodes:
    def test_every_value_gets_the_nearest_code(self, codes, values):
        grid = torch.tensor(values)
        x = random_floats(4000) * 6
        found = quantize(x, ONE, 4, codes=codes)
        assert found.dtype == torch.int8 and set(found.tolist()) == set(values)
        assert torch.equal((x - found).abs(), (x[:, None] - grid).abs().amin(dim=1))

    def test_ties(self, codes, values):
        """Even, by its distance from -1/2, in even steps; nearer to that in others."""
        grid = torch.tensor(values)
        found = quantize((grid[1:] + grid[:-1]) / 2, ONE, 4, codes=codes)
        pairs = zip(values[:-1], values[1:], strict=True)

        def expected(low: int, high: int) -> int:
            if high == low + 1:
                return min(low, high, key=lambda code: max(code, -1 - code) % 2)
            return min(low, high, key=lambda code: abs(code + 0.5))

        assert found.tolist() == [0 if (low, high) == (-1, 0) else expected(low, high) for low, high in pairs]

    def test_clamped_at_both_ends_and_exact_in_float8(self, codes, values):
        x = torch.tensor([values[-1] + 0.1, 40.0, torch.inf, -torch.inf, values[0] - 0.1])
        assert quantize(x, ONE, 4, codes=codes).tolist() == [values[-1]] * 3 + [values[0]] * 2
        x = random_floats(1000) * 6
        as_float8 = quantize(x, ONE, 4, torch.float8_e4m3fn, codes=codes)
        assert torch.equal(as_float8.to(torch.int8), quantize(x, ONE, 4, codes=codes))

    def test_sums_stay_where_float8_adds_exactly(self, codes, values):
        assert max(map(abs, values)) * 8 * 128 < 2**14


def best_sqnr(x: torch.Tensor, codes: str) -> float:
    """In dB, of the best of many static scales."""
    offset = centre(codes)
    errors = []
    for step in range(200):
        scale = x.abs().amax() * 0.97**step
        errors.append(((quantize(x + offset * scale, scale, 4, codes=codes) - offset) * scale - x).square().sum())
    return float(10 * torch.log10(x.square().sum() / min(errors)))


def test_spread_codes_are_near_the_best_of_sixteen_for_a_normal_distribution():
    """Lloyd's best quantizer of 16 levels has 20.22 dB."""
    x = random_floats(200_000)
    assert best_sqnr(x, "spread") > 19.9 > 19.3 > best_sqnr(x, "even")


def test_wide_codes_suit_rows_of_different_sizes():
    sizes = torch.randn(500, 1, generator=torch.Generator().manual_seed(1)).mul(0.7).exp()
    x = random_floats(500, 64) * sizes
    even, spread, wide = (best_sqnr(x, codes) for codes in ("even", "spread", "wide"))
    assert wide > spread + 0.5 and spread > even + 1.5


@pytest.mark.parametrize("bits, codes", [(8, "spread"), (4, "int")])
def test_unknown_codes_are_refused(bits, codes):
    with pytest.raises(ValueError, match=f"codes='{codes}' with bits={bits}"):
        quantize(random_floats(4), ONE, bits, codes=codes)


class TestQuantize:
    def test_ties_go_to_the_even_code(self):
        x = torch.tensor([-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
        codes = quantize(x, ONE, 4)
        assert codes.dtype == torch.int8
        assert codes.tolist() == [-4, -2, -2, 0, 0, 2, 2, 4]

    @pytest.mark.parametrize("bits, low, high", [(4, -8, 7), (8, -128, 127)])
    def test_clamped_at_both_ends(self, bits, low, high):
        x = torch.tensor([low - 0.5, low - 1.0, -1e30, -torch.inf, high + 0.4, high + 1.0, 1e30, torch.inf])
        assert quantize(x, ONE, bits).tolist() == [low] * 4 + [high] * 4

    @pytest.mark.parametrize("bits, high", [(4, 7), (8, 127)])
    def test_the_largest_positive_value_loses_half_a_step(self, bits, high):
        """The scale is 2 absmax / (2^bits - 1): absmax falls on high + 0.5, and its negative on the lowest code."""
        absmax = torch.tensor([3.0])
        scale = absmax_scale(absmax, bits)
        assert quantize(absmax, scale, bits).item() == high
        assert quantize(-absmax, scale, bits).item() in (-high - 1, -high)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_divides_and_rounds_in_float32(self, dtype):
        """In bfloat16 the quotient itself would be rounded: its spacing is 0.5 between 64 and 128."""
        x, scale = (random_floats(64, 65) * 20).to(dtype), torch.tensor([torch.pi / 8])
        expected = torch.clamp(torch.round(x.double() / scale.double()), -128, 127).to(torch.int8)
        assert torch.equal(quantize(x, scale, 8), expected)  # no quotient here falls so near a tie that float32 errs
        if dtype == torch.bfloat16:
            narrow = torch.clamp(torch.round(x / scale.to(dtype)), -128, 127).to(torch.int8)
            assert not torch.equal(narrow, expected)

    def test_one_scale_for_each_head(self):
        x, scale = random_floats(2, 3, 5, 8), torch.tensor([0.1, 0.2, 0.3])
        codes = quantize(x, scale.view(-1, 1, 1), 4)
        for head in range(3):
            assert torch.equal(codes[:, head], quantize(x[:, head], scale[head], 4))

    def test_codes_are_fixed_points(self):
        """What is dequantized quantizes to the same codes again."""
        for bits in (4, 8):
            low, high = code_range(bits)
            codes = torch.arange(low, high + 1, dtype=torch.int8)
            for scale in (torch.tensor([1e-4]), torch.tensor([0.1]), torch.tensor([1 / 3]), torch.tensor([1e4])):
                assert torch.equal(quantize(dequantize(codes, scale), scale, bits), codes)


class TestScale:
    @pytest.mark.parametrize("bits, steps", [(4, 7.5), (8, 127.5)])
    def test_absmax_over_half_the_levels(self, bits, steps):
        absmax = torch.tensor([0.5, 1.0, 30.0])
        assert torch.allclose(absmax_scale(absmax, bits), absmax / steps, rtol=1e-6, atol=0)

    def test_clamped_at_both_ends(self):
        absmax = torch.tensor([0.0, 1e-12, 1e12, torch.inf])
        expected = torch.tensor([MIN_SCALE, MIN_SCALE, MAX_SCALE, MAX_SCALE])
        assert (MIN_SCALE, MAX_SCALE) == (1e-4, 1e4)
        assert torch.equal(absmax_scale(absmax, 4), expected)

    def test_the_floor_can_be_lowered(self):
        assert torch.allclose(absmax_scale(torch.tensor([7.5e-6]), 4, floor=1e-8), torch.tensor([1e-6]))


class TestPerRow:
    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 16), (2, 2, 3, 24), (0, 8)])
    def test_each_row_on_its_own(self, shape, bits):
        x = random_floats(*shape) * torch.logspace(-3, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))
        codes, scale = quantize_per_row(x, ONE, bits)
        assert codes.shape == x.shape and codes.dtype == torch.int8
        assert scale.shape == (*shape[:-1], 1) and scale.dtype == torch.float32
        for row, row_codes, row_scale in zip(
            x.view(-1, shape[-1]), codes.view(-1, shape[-1]), scale.view(-1), strict=True
        ):
            whole = absmax_scale(row.abs().max(), bits)
            assert 0.995 * whole <= row_scale <= whole  # a little less, see the next test
            assert torch.equal(row_codes, quantize(row, row_scale, bits))

    @pytest.mark.parametrize("bits", [4, 8])
    def test_the_largest_value_of_a_row_is_on_no_edge(self, bits):
        """At absmax / scale = 7.5 the last bit of a quotient would choose the code, differently on each path."""
        low, high = code_range(bits)
        x = random_floats(500, 16)
        codes, scale = quantize_per_row(x, ONE, bits)
        absmax, where = x.abs().max(dim=-1, keepdim=True)
        assert ((absmax / scale - (high + 0.5)) > 1e-3).all()
        largest, sign = codes.gather(-1, where), x.gather(-1, where).sign()
        assert torch.equal(largest.long(), torch.where(sign > 0, high, low))

    def test_a_row_of_zeros(self):
        codes, scale = quantize_per_row(torch.zeros(2, 8), ONE, 4)
        assert codes.count_nonzero() == 0
        assert torch.equal(scale, torch.full((2, 1), MIN_SCALE))

    @pytest.mark.parametrize("bits", [4, 8])
    def test_error_is_half_a_step_but_for_the_clamped_top(self, bits):
        x = random_floats(50, 64)
        codes, scale = quantize_per_row(x, ONE, bits)
        steps = x / scale
        error = (dequantize(codes, scale) - x).abs() / scale
        below = steps <= code_range(bits)[1] + 0.5
        assert below.float().mean() > 0.98
        assert error[below].max() <= 0.5 + 1e-4
        assert error.max() < 1

    def test_narrow_input(self):
        x = random_floats(4, 32).bfloat16()
        for got, expected in zip(quantize_per_row(x, ONE, 4), quantize_per_row(x.float(), ONE, 4), strict=True):
            assert torch.equal(got, expected)

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("clip", CLIPS)
    def test_a_clip_factor_scales_the_scale_and_clamps(self, clip, bits):
        low, high = code_range(bits)
        x = random_floats(200, 64)
        codes, scale = quantize_per_row(x, torch.tensor([clip]), bits)
        _, whole = quantize_per_row(x, ONE, bits)
        torch.testing.assert_close(scale, clip * whole, rtol=3e-7, atol=0)
        assert torch.equal(scale, whole) == (clip == 1)
        assert torch.equal(codes, quantize(x, scale, bits))
        beyond = (x / scale).abs() > high + 1
        assert beyond.any() == (clip < 1)  # of the whole range nothing is as far out
        assert torch.equal(codes[beyond].long(), torch.where(x[beyond] > 0, high, low))

    def test_the_order_of_the_factors(self):
        """The one that kernels keep, and without a clip what was there before there were clips, to the bit."""
        x, clip = random_floats(500, 16), torch.tensor([0.83])
        absmax = x.abs().amax(dim=-1, keepdim=True) * (1 - 2**-12)
        assert torch.equal(quantize_per_row(x, ONE, 4)[1], absmax * (2 / 15))
        assert torch.equal(quantize_per_row(x, clip, 4)[1], absmax * clip * (2 / 15))
        assert not torch.equal(absmax * clip * (2 / 15), absmax * (2 / 15) * clip)

    def test_one_clip_for_each_head(self):
        x, clip = random_floats(2, 3, 5, 8), torch.tensor([0.9, 0.5, 1.0])
        codes, scale = quantize_per_row(x, clip.view(-1, 1, 1), 4)
        for head in range(3):
            alone, alone_scale = quantize_per_row(x[:, head], clip[head], 4)
            assert torch.equal(codes[:, head], alone) and torch.equal(scale[:, head], alone_scale)

    def test_a_clipped_scale_keeps_to_its_range(self):
        rows = torch.tensor([[1e-3], [1e9]])
        assert quantize_per_row(rows, torch.tensor([0.5]), 4)[1].tolist() == [[torch.tensor(MIN_SCALE)], [MAX_SCALE]]


def test_dequantize_is_float32():
    codes, scale = torch.tensor([[-8, 7]], dtype=torch.int8), torch.tensor([[0.5]])
    restored = dequantize(codes, scale)
    assert restored.dtype == torch.float32
    assert restored.tolist() == [[-4.0, 3.5]]


def test_compiled_equals_eager():
    x, scale = random_floats(7, 33) * 10, torch.tensor([0.3])
    clip = torch.tensor([0.7])
    compiled = torch.compile(lambda x: (quantize(x, scale, 4), *quantize_per_row(x, clip, 8)), fullgraph=True)
    expected = (quantize(x, scale, 4), *quantize_per_row(x, clip, 8))
    assert all(torch.equal(got, want) for got, want in zip(compiled(x), expected, strict=True))
