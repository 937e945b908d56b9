"""Integer products are exact on every shape and for every code; the epilogue rounds once."""

import random
import sys

import pytest
import torch

from pq_ao.ops import int_accumulate, int_linear, pack_int4, unscaled_linear
from pq_ao.ops.linear_paths import LinearPath, forced_path

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

    @pytest.mark.parametrize("stride", [(96, 1), (0, 1), (1, 1)])
    def test_the_stride_of_a_single_row_does_not_matter(self, stride):
        """Compiled code gives it any value; torch._int_mm on the CPU reads it all the same."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randint(-8, 8, (1, 96), dtype=torch.int8, generator=generator)
        w = torch.randint(-8, 8, (40, 96), dtype=torch.int8, generator=generator)
        expected = (x.long() @ w.long().t()).int()
        assert torch.equal(int_accumulate(x.as_strided((1, 96), stride), w), expected)

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
    """The one float32 rounding of each step, written out in float64."""
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


class TestOps:
    @pytest.mark.parametrize("packed", [False, True], ids=["int8", "packed"])
    @pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16])
    def test_packed_linear(self, dtype, packed):
        x, weight = random_codes(3, 9, bits=4), random_codes(5, 9, bits=4)
        scales = (None, None, None) if dtype == torch.int32 else (torch.rand(3, 1), torch.rand(5), torch.rand(5))
        arguments = (x, scales[0], stored(weight, packed), *scales[1:], dtype, "tile")
        torch.library.opcheck(torch.ops.pq_ao.packed_linear.default, arguments)
        if dtype == torch.int32:
            assert torch.equal(torch.ops.pq_ao.packed_linear(*arguments).long(), exact(x, weight))

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
    @pytest.mark.parametrize("inner", [7, 16])
    def test_unpack_codes(self, inner, dtype):
        codes = random_codes(5, inner, bits=4)
        torch.library.opcheck(torch.ops.pq_ao.unpack_codes.default, (pack_int4(codes), inner, dtype))
        assert torch.equal(torch.ops.pq_ao.unpack_codes(pack_int4(codes), inner, dtype).to(torch.int8), codes)

    def test_what_the_gpu_runs_traces_and_agrees(self, monkeypatch):
        """Every path but INT_MM, on the CPU: choice, conversion of codes, unpacking and epilogue around the kernels."""
        monkeypatch.setattr(sys.modules["pq_ao.ops.int_linear"], "capability_of", lambda device: (9, 0))
        x, weight = random_codes(2064, 64, bits=4), random_codes(32, 64, bits=4)
        x_scale, w_scale, bias = torch.tensor([0.3]), torch.rand(32), torch.rand(32)
        torch._dynamo.reset()  # the limit on recompilations counts those of other tests
        compiled = torch.compile(int_linear, fullgraph=True, dynamic=False, backend="aot_eager")
        for rows in (1, 40, 2064):
            expected = epilogue(exact(x[:rows], weight), x_scale, w_scale, bias, torch.float32)
            for codes in (x[:rows], x[:rows].to(torch.float8_e4m3fn)):
                y = compiled(codes, x_scale, pack_int4(weight), w_scale, bias, torch.float32)
                assert torch.equal(y, expected), (rows, codes.dtype)
        for path in (LinearPath.TILE, LinearPath.E4M3):
            assert torch.equal(int_accumulate(x, pack_int4(weight), path).long(), exact(x, weight))

    def test_accumulators_left_to_the_op_behind(self, monkeypatch):
        monkeypatch.setattr(sys.modules["pq_ao.ops.int_linear"], "capability_of", lambda device: (9, 0))
        codes, weight = random_codes(2, 1100, 64, bits=4), random_codes(32, 64, bits=4)
        x, w_scale, bias = codes.to(torch.float8_e4m3fn), torch.rand(32), torch.rand(32)
        expected = exact(codes.view(-1, 64), weight).view(2, 1100, 32)
        acc, scale = unscaled_linear(x, torch.tensor([0.3]), pack_int4(weight), w_scale, torch.bfloat16)
        assert acc.dtype == torch.bfloat16 and torch.equal(acc, expected.to(acc.dtype))
        y = (acc * scale + bias).to(torch.bfloat16)
        assert torch.equal(y, int_linear(x, torch.tensor([0.3]), pack_int4(weight), w_scale, bias, torch.bfloat16))
        for dtype in (torch.float16, torch.float32):
            assert unscaled_linear(x, torch.tensor([0.3]), pack_int4(weight), w_scale, dtype) is None
        for few_or_int8_or_dynamic in (
            (x[:, :4], torch.tensor([0.3])),
            (codes, torch.tensor([0.3])),
            (x, torch.rand(2, 1100, 1)),
        ):
            assert unscaled_linear(*few_or_int8_or_dynamic, pack_int4(weight), w_scale, torch.bfloat16) is None

    @pytest.mark.parametrize("x_scale", [torch.tensor([0.25]), torch.rand(2, 3, 1)], ids=["static", "per-row"])
    def test_traces_as_one_graph(self, x_scale):
        x, weight = random_codes(2, 3, 16, bits=4), pack_int4(random_codes(5, 16, bits=4))
        w_scale, bias = torch.rand(5), torch.rand(5)
        torch._dynamo.reset()  # the limit on recompilations counts those of other tests
        compiled = torch.compile(int_linear, fullgraph=True, backend="aot_eager")
        for codes in (x, x.to(torch.float8_e4m3fn)):
            y = compiled(codes, x_scale, weight, w_scale, bias, torch.float32)
            assert torch.equal(y, int_linear(x, x_scale, weight, w_scale, bias, torch.float32))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
class TestEveryPathOnTheGPU:
    """Random shapes; sizes come from short lists, for some kernels are compiled for each."""

    CASES = 320
    DP4A_INNER = {True: (8, 72, 1032, 4096), False: (4, 100, 1160, 4096)}
    INNER = (33, 640, 2050, 4096)

    def shape(self, path: LinearPath, packed: bool, dice: random.Random) -> tuple[int, int, int]:
        if path is LinearPath.DP4A:
            return dice.randint(1, 8), dice.randint(1, 600), dice.choice(self.DP4A_INNER[packed])
        rows = dice.choice((dice.randint(1, 40), dice.randint(41, 300), dice.randint(301, 4096)))
        if path is LinearPath.E4M3:
            return rows, 16 * dice.randint(1, 40), 16 * dice.randint(1, 120)
        return rows, dice.randint(1, 600), dice.choice(self.INNER)

    def arguments(self, path: LinearPath, dice: random.Random):
        packed = path is LinearPath.E4M3 or dice.random() < 0.7
        rows, outer, inner = self.shape(path, packed, dice)
        bits = 4 if path is LinearPath.E4M3 else dice.choice((4, 8))
        # 4-bit codes that are not even reach from -15 to 14
        x = random_codes(rows, inner, bits=5 if bits == 4 else 8, seed=dice.getrandbits(31)).cuda()
        x = x.clamp(-15, 14) if bits == 4 else x
        weight = random_codes(outer, inner, bits=4 if packed else 8, seed=dice.getrandbits(31)).cuda()
        # not exact of anybody's: float64 sums of integers are, below 2^53
        expected = (x.double() @ weight.double().t()).to(torch.int32)
        x = x.to(torch.float8_e4m3fn) if path is LinearPath.E4M3 or bits == 4 and dice.random() < 0.2 else x
        return x, stored(weight, packed), weight, expected

    @pytest.mark.parametrize("path", LinearPath, ids=lambda path: path.value)
    def test_fuzz(self, path):
        dice = random.Random(path.value)
        for case in range(self.CASES):
            x, w, weight, expected = self.arguments(path, dice)
            got = int_accumulate(x, w, path)
            assert torch.equal(got, expected), (case, tuple(x.shape), tuple(w.shape), x.dtype, w.dtype)
            if case % 40 == 0:
                on_cpu = int_accumulate(x[:8].cpu(), w.cpu())
                assert torch.equal(got[:8].cpu(), on_cpu)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("path", LinearPath, ids=lambda path: path.value)
    def test_epilogue_equals_the_cpu(self, path, dtype):
        generator = torch.Generator().manual_seed(0)
        rows = 8 if path is LinearPath.DP4A else 70
        x, w = random_codes(rows, 1536, bits=4), pack_int4(random_codes(144, 1536, bits=4))
        w_scale, bias = torch.rand(144, generator=generator), torch.randn(144, generator=generator)
        for x_scale in (torch.rand(1, generator=generator), torch.rand(rows, 1, generator=generator)):
            expected = int_linear(x, x_scale, w, w_scale, bias, dtype)
            if path is LinearPath.E4M3 and dtype == torch.bfloat16:
                expected = epilogue(int_accumulate(x, w).to(dtype), x_scale, w_scale, bias, dtype)
            arguments = (x_scale.cuda(), w.cuda(), w_scale.cuda(), bias.cuda(), dtype, 4)
            with forced_path(path):
                assert torch.equal(int_linear(x.cuda(), *arguments).cpu(), expected)

    @pytest.mark.parametrize("path", LinearPath, ids=lambda path: path.value)
    @pytest.mark.parametrize("x_code, w_code", [(-8, -8), (7, 7), (-8, 7), (14, -8), (-15, 7), (-15, -8)])
    def test_extremes(self, path, x_code, w_code):
        x = torch.full((8, 14336), x_code, dtype=torch.int8, device="cuda")
        weight = torch.full((4096, 14336), w_code, dtype=torch.int8, device="cuda")
        got = int_accumulate(x, pack_int4(weight), path)
        assert (got == 14336 * x_code * w_code).all()

    def test_chosen_by_shape_and_traced(self):
        x, w = random_codes(2064, 4096, bits=4), pack_int4(random_codes(64, 4096, bits=4))
        x_scale, w_scale = torch.tensor([0.5]), torch.full((64,), 0.25)
        torch._dynamo.reset()  # the limit on recompilations counts those of other tests
        compiled = torch.compile(int_linear, fullgraph=True, dynamic=False)
        for rows in (1, 40, 2064):
            expected = int_linear(x[:rows], x_scale, w, w_scale, None, torch.float16)
            on_gpu = (x_scale.cuda(), w.cuda(), w_scale.cuda(), None, torch.float16)
            for codes in (x[:rows].cuda(), x[:rows].cuda().to(torch.float8_e4m3fn)):
                assert torch.equal(compiled(codes, *on_gpu).cpu(), expected)
