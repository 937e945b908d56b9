"""The tensor-core linear: exact integers on any shape, however the work is cut."""

import itertools
import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from pq_ao.ops import pack_int4
from pq_ao.ops.int_linear import packed_linear
from pq_ao.ops.kernels.tile_linear import TileConfig, tile_config, tile_linear
from pq_ao.ops.kernels.workspace import COUNTERS, counters
from tests.kernels.linear_cases import DTYPES, accumulators, device, epilogue, extremes, random_codes, scales

pytestmark = pytest.mark.usefixtures("one_thread")


def integers(x, w, packed, config=None):
    return tile_linear(x, None, pack_int4(w) if packed else w, None, None, torch.int32, config)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "int8"])
@pytest.mark.parametrize("outer, inner", [(1, 1), (7, 33), (70, 96)])
def test_one_to_forty_rows(outer, inner, packed):
    w = random_codes(outer, inner, bits=4 if packed else 8, seed=1)
    for rows in (*range(1, 20), 31, 32, 33, 40):
        x = random_codes(rows, inner, bits=8)
        assert torch.equal(integers(x, w, packed), accumulators(x, w)), rows


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "int8"])
@pytest.mark.parametrize("split", [1, 2, 3, 5])
@pytest.mark.parametrize("inner", [96, 97, 640])
def test_every_split(inner, split, packed):
    """Also more parts than steps: some programs then have nothing to add."""
    x, w = random_codes(19, inner, bits=4), random_codes(70, inner, bits=4, seed=1)
    config = TileConfig(outputs=64, tokens=16, depth=32, split=split, warps=4, stages=2)
    assert torch.equal(integers(x, w, packed, config), accumulators(x, w))
    assert not counters(device()).any()


@pytest.mark.parametrize("outputs, tokens, depth", [(64, 64, 128), (128, 64, 128), (128, 128, 64)])
def test_large_tiles(outputs, tokens, depth):
    x, w = random_codes(130, 200, bits=4), random_codes(140, 200, bits=4, seed=1)
    config = TileConfig(outputs, tokens, depth, split=1, warps=8, stages=3)
    assert torch.equal(integers(x, w, True, config), accumulators(x, w))
    assert torch.equal(integers(x, w, True), accumulators(x, w))


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("rows, outer, inner", [(130, 140, 384), (5, 128, 128), (128, 1, 128)])
def test_tiles_by_descriptor(rows, outer, inner, split):
    """Tiles that end past the last row and output: what is read there is zeros, and stored nowhere."""
    x, w = random_codes(rows, inner, bits=4), random_codes(outer, inner, bits=4, seed=1)
    config = TileConfig(128, 128, 64, split=split, warps=4, stages=4, tma=True)
    assert torch.equal(integers(x, w, True, config), accumulators(x, w))
    x_scale, w_scale, bias = scales(rows, outer, True, True)
    y = tile_linear(x, x_scale, pack_int4(w), w_scale, bias, torch.float32, config)
    assert torch.equal(y, epilogue(accumulators(x, w), x_scale, w_scale, bias, torch.float32))


@pytest.mark.parametrize("inner", [64, 127, 192])
def test_descriptors_want_whole_steps(inner):
    config = TileConfig(128, 128, 64, split=1, warps=4, stages=4, tma=True)
    with pytest.raises(ValueError, match="rows must be whole steps"):
        integers(random_codes(2, inner, bits=4), random_codes(3, inner, bits=4), True, config)


def test_descriptors_where_all_programs_run_at_once():
    assert tile_config(128, 28672, 2048, tma=True).tma
    assert not tile_config(128, 28672, 2048).tma
    assert not tile_config(2048, 28672, 2048, tma=True).tma, "more programs than run at once"
    assert not tile_config(128, 28672, 2048 + 16, tma=True).tma, "rows are not whole steps"
    assert not tile_config(128, 28672, 4096, packed=False, tma=True).tma


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
class TestTilesByDescriptorOnTheGPU:
    CONFIG = TileConfig(128, 128, 64, split=1, warps=4, stages=4, tma=True)

    def test_random_shapes(self):
        dice = random.Random(0)
        for case in range(320):
            rows, outer, inner = dice.randint(1, 300), dice.randint(1, 1500), 128 * dice.randint(1, 32)
            x, w = random_codes(rows, inner, bits=4, seed=case), random_codes(outer, inner, bits=4, seed=case + 1)
            got = integers(x, w, True, replace(self.CONFIG, split=dice.choice((1, 1, 2, 3))))
            assert torch.equal(got, accumulators(x, w)), (rows, outer, inner)

    @pytest.mark.parametrize("x_code, w_code", extremes(4))
    def test_extreme_codes(self, x_code, w_code):
        x, w = (torch.full((rows, 14336), code, dtype=torch.int8) for rows, code in ((128, x_code), (300, w_code)))
        expected = torch.full((128, 300), 14336 * x_code * w_code, dtype=torch.int32)
        assert torch.equal(integers(x.to(device()), w.to(device()), True, self.CONFIG).cpu(), expected)

    @pytest.mark.parametrize("place", [0, 1, 16])
    def test_any_address(self, place):
        """Codes that begin where no descriptor may take the other way."""
        x, w = random_codes(128, 4096, bits=4), random_codes(20000, 4096, bits=4, seed=1)
        moved = torch.empty(x.numel() + place, dtype=torch.int8, device=x.device)[place:].view(x.shape).copy_(x)
        assert torch.equal(integers(moved, w, True), accumulators(x, w))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "int8"])
def test_chosen_tiles_fit_the_shape(packed):
    for rows, outs, row_bytes in itertools.product(
        (0, 1, 17, 64, 65, 300, 8192), (1, 192, 4096, 152064), (1, 288, 14336)
    ):
        config = tile_config(rows, outs, row_bytes, packed)
        tiles = -(-outs // config.outputs) * -(-rows // config.tokens)
        assert rows > 64 or rows <= config.tokens, "weights are read once"
        assert config.split == 1 or row_bytes >= 512 * config.split and tiles * config.split <= 264


@pytest.mark.parametrize("x_code, w_code", extremes(4))
def test_extreme_codes_over_a_wide_layer(x_code, w_code):
    x, w = torch.full((3, 14336), x_code, dtype=torch.int8), torch.full((5, 14336), w_code, dtype=torch.int8)
    expected = torch.full((3, 5), 14336 * x_code * w_code, dtype=torch.int32)
    assert torch.equal(integers(x.to(device()), w.to(device()), True).cpu(), expected)


@pytest.mark.parametrize("x_code, w_code", extremes(8))
def test_extreme_eight_bit_codes(x_code, w_code):
    x, w = torch.full((3, 4097), x_code, dtype=torch.int8), torch.full((5, 4097), w_code, dtype=torch.int8)
    expected = torch.full((3, 5), 4097 * x_code * w_code, dtype=torch.int32)
    assert torch.equal(integers(x.to(device()), w.to(device()), False).cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("per_row", [True, False], ids=["per-row", "static"])
@pytest.mark.parametrize("split", [1, 2])
def test_epilogue(split, per_row, with_bias, dtype):
    x, w = random_codes(18, 64, bits=4), random_codes(9, 64, bits=4, seed=1)
    x_scale, w_scale, bias = scales(18, 9, per_row, with_bias)
    config = TileConfig(outputs=64, tokens=16, depth=32, split=split, warps=4, stages=2)
    y = tile_linear(x, x_scale, pack_int4(w), w_scale, bias, dtype, config)
    assert torch.equal(y, epilogue(accumulators(x, w), x_scale, w_scale, bias, dtype))
    assert torch.equal(y, packed_linear(x, x_scale, pack_int4(w), w_scale, bias, dtype, "tile"))


def test_no_rows():
    assert integers(random_codes(0, 8, bits=4), random_codes(5, 8, bits=4), True).shape == (0, 5)


def test_more_tiles_than_counters():
    config = TileConfig(outputs=16, tokens=16, depth=32, split=2, warps=4, stages=2)
    w = random_codes(16 * COUNTERS + 1, 1, bits=4)
    with pytest.raises(ValueError, match="at most 65536 can be split"):
        integers(random_codes(1, 1, bits=4), w, True, config)
