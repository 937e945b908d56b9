"""The kernel of silu_hadamard, in the interpreter (or on a GPU), against the operator's reference and float64."""

import pytest
import torch

from pq_ao.hadamard import hadamard_base
from pq_ao.ops import silu_hadamard

pytest.importorskip("triton", reason="kernels need triton")

from pq_ao.ops.kernels.silu_hadamard import Tiling, choose_tiling
from pq_ao.ops.kernels.silu_halves import HalvesTiling
from pq_ao.ops.kernels.silu_rows import RowsTiling, choose_rows_tiling
from tests.kernels.code_places import place_of
from tests.kernels.silu_cases import (
    FLIPPED,
    HALVES_FLIPPED,
    HALVES_SQNR,
    ROTATED_SQNR,
    SCALE,
    check_codes,
    check_floats,
    make_accumulators,
    make_input,
    run,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# 12 x 16, 20 x 8, 1 x 256, 28 x 64, 44 x 4, 76 x 2 (more than one step of k), 36 x 1, 7 x 2 and 9 x 2 (DCT), 8
WIDTHS = (192, 160, 256, 1792, 176, 152, 36, 14, 18, 8)

MODES = [(False, "even"), (False, "spread"), (True, "even")]  # dynamic, codes


@pytest.mark.parametrize("width", WIDTHS)
def test_rotated_floats(width):
    check_floats(make_input(2, width, torch.bfloat16))


@pytest.mark.parametrize("dynamic, code_set", MODES)
@pytest.mark.parametrize("width", [192, 256, 152, 14])
def test_codes(width, dynamic, code_set):
    check_codes(make_input(8, width, torch.bfloat16), dynamic, 4, torch.int8, code_set=code_set)


@pytest.mark.parametrize("tiling", [None, RowsTiling(4, 2)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_without_a_shift(dynamic, tiling):
    check_codes(make_input(4, 512, torch.bfloat16), dynamic, 4, torch.int8, tiling, shifted=False)


@pytest.mark.parametrize("tiling", [None, RowsTiling(4, 2)])
def test_a_mean_does_not_widen_dynamic_scales(tiling):
    """A shift far larger than what varies around it comes off before the absmax is taken."""
    gate_up, base = make_input(4, 512, torch.bfloat16), hadamard_base(512)
    shift, clip = torch.full((512,), 100.0), torch.tensor([0.5])
    shift[7] = -300.0
    codes, row_scale = run(gate_up, base, None, clip, shift, 4, torch.int8, tiling)
    expected, expected_scale = silu_hadamard(gate_up, base, None, clip, shift, 4, torch.int8)
    torch.testing.assert_close(row_scale, expected_scale, rtol=1e-5, atol=0)
    assert (codes[:, 7] == 7).all() and torch.equal(codes, expected)  # all but one lie between -6 and -4 scales


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_bits_and_encodings(dtype):
    gate_up = make_input(8, 192, dtype)
    check_codes(gate_up, False, 8, torch.int8)
    check_codes(gate_up, False, 4, torch.float8_e4m3fn, code_set="spread")


@pytest.mark.parametrize(("split", "group"), [(1, 1), (1, 4), (2, 2), (4, 2), (8, 1)])
def test_every_split_gives_the_same_floats(split, group):
    tiling = Tiling(fold=1, t=8, l2=16, split=split, group=group, block_out=16, block_k=32, warps=4)
    check_floats(make_input(1, 20 * 128, torch.bfloat16), tiling)


@pytest.mark.parametrize("width", [14336, 11008, 1536, 18944, 4864, 8192, 12288, 28672, 29568, 53248, 64, 4])
@pytest.mark.parametrize("rows", [1, 3, 20, 100, 256, 8192])
def test_the_chosen_tiling_covers_the_row(width, rows):
    order = hadamard_base(width).shape[0] if width < 20000 else {28672: 28, 29568: 924, 53248: 52}[width]
    for dynamic in (False, True):
        tiling = choose_tiling(width, order, rows, dynamic)
        if isinstance(tiling, RowsTiling):
            assert width == order * tiling.fold * 64 * tiling.warps and order * tiling.fold <= 32
            continue
        assert order * tiling.fold * tiling.t * tiling.l2 == width
        assert tiling.t % (tiling.split * tiling.group) == 0
        assert not dynamic or (tiling.split == 1 and tiling.block_out >= order)


ROWS = {  # width: (base order, tiling)
    14336: RowsTiling(1, 8),
    12 * 256: RowsTiling(1, 4, split=2, early=0),
    24 * 128: RowsTiling(2, 2, early=5),
    4 * 1024: RowsTiling(4, 16, split=2),
    512: RowsTiling(4, 2, early=1),
}


@pytest.mark.parametrize(("width", "tiling"), ROWS.items())
def test_many_rows(width, tiling):
    check_floats(make_input(2, width, torch.bfloat16), tiling)
    for dynamic, code_set in MODES:
        check_codes(make_input(3, width, torch.float16), dynamic, 4, torch.int8, tiling, code_set=code_set)
    check_codes(make_input(2, width, torch.float32), False, 4, torch.float8_e4m3fn, tiling)


def test_many_rows_with_a_base_that_is_not_flat():
    check_floats(make_input(2, 18 * 128, torch.bfloat16), RowsTiling(2, 2), hadamard_base(18))


def test_widths_of_many_rows():
    """Those of models with a small base; others are left to the form for few rows."""
    for width, order in ((14336, 28), (12288, 12), (8192, 1), (28672, 28), (5120, 20), (20480, 20)):
        assert choose_rows_tiling(width, order) is not None
    for width, order in ((11008, 172), (18944, 148), (192, 12), (53248, 52)):
        assert choose_rows_tiling(width, order) is None


@pytest.mark.parametrize(("width", "bias"), [(20 * 64, True), (152, False)])
def test_accumulators(width, bias):
    gate_up, raw = make_accumulators(2, width, bias)
    check_codes(gate_up, False, 4, torch.int8, None, raw, shifted=bias, code_set="spread")
    check_floats(gate_up, raw=raw)


def test_accumulators_without_a_rotation():
    gate_up, raw = make_accumulators(3, 160)
    scale, shift = torch.tensor([0.2]), torch.linspace(-1, 1, 160)
    codes, _ = run(gate_up, None, scale, None, shift, 4, torch.int8, None, *raw)
    expected, _ = silu_hadamard(gate_up, None, scale, None, shift, 4, torch.int8, *raw)
    assert (codes - expected).abs().max() <= 1 and (codes != expected).sum() <= max(1, FLIPPED * codes.numel())


@pytest.mark.parametrize("dynamic, code_set", MODES)
@pytest.mark.parametrize("width", [160, 33])
def test_without_a_rotation_codes_are_equal(width, dynamic, code_set):
    gate_up = make_input(3, width, torch.bfloat16)
    scale, clip = (None, torch.tensor([0.85])) if dynamic else (torch.tensor([0.2]), None)
    shift = torch.linspace(-1, 1, width)
    codes, row_scale = run(gate_up, None, scale, clip, shift, 4, torch.int8, code_set=code_set)
    expected, expected_scale = silu_hadamard(gate_up, None, scale, clip, shift, 4, torch.int8, codes=code_set)
    if dynamic:
        torch.testing.assert_close(row_scale, expected_scale, rtol=1e-6, atol=0)
    difference = (place_of(codes, code_set) - place_of(expected, code_set)).abs()
    assert difference.max() <= 1 and (difference > 0).sum() <= max(1, FLIPPED * codes.numel())


@pytest.mark.parametrize("tiling", [None, RowsTiling(4, 2)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_hostile_values(dynamic, tiling):
    """Saturated gates, one huge outlier, and a row of zeros."""
    gate_up = make_input(3, 512, torch.bfloat16)
    gate_up[0, :4] = torch.tensor([-1e4, 1e4, -90.0, 90.0])
    gate_up[0, 515] = 2e3
    gate_up[1] = 0
    check_codes(gate_up, dynamic, 4, torch.int8, tiling)


def test_rows_that_begin_amid_a_word():
    """bf16 are loaded in pairs, but a view may begin at any of them."""
    gate_up = make_input(2, 512, torch.bfloat16)
    view = torch.cat((gate_up.new_zeros(1), gate_up.flatten()))[1:].view_as(gate_up)
    assert view.data_ptr() % 4 == 2
    results = [run(x, hadamard_base(512), torch.ones(1), None, None, 4, torch.float32, RowsTiling(4, 2))[0]
               for x in (gate_up, view)]  # fmt: skip
    assert torch.equal(*results)


def test_no_rows():
    codes, _ = run(make_input(0, 192, torch.bfloat16), hadamard_base(192), torch.ones(1), None, None, 4, torch.int8)
    assert codes.shape == (0, 192)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("rows", [1, 7, 128, 300])
@pytest.mark.parametrize("width", [14336, 5120, 11008, 1536, 18944, 4864, 8192, 12288, 28672, 29568])
def test_models_widths(width, rows):
    gate_up, order = make_input(rows, width, torch.bfloat16), hadamard_base(width).shape[0]
    halves = isinstance(choose_tiling(width, order, rows, False, halves=True), HalvesTiling)
    flipped, floor = (HALVES_FLIPPED, HALVES_SQNR) if halves else (FLIPPED, ROTATED_SQNR)
    check_floats(gate_up, floor=floor, scale=SCALE)
    check_codes(gate_up, True, 4, torch.int8)
    check_codes(gate_up, False, 8, torch.int8)
    accumulators, raw = make_accumulators(rows, width)
    check_floats(accumulators, raw=raw, floor=floor, scale=SCALE)
    for encoding in (torch.int8, torch.float8_e4m3fn):
        check_codes(gate_up, False, 4, encoding, flipped=flipped)
        check_codes(accumulators, False, 4, encoding, None, raw, flipped=flipped)
