"""The kernel of silu_hadamard in float16, in the interpreter (or on a GPU), against the operator's reference."""

import pytest
import torch

from pq_ao.hadamard import hadamard_base

pytest.importorskip("triton", reason="kernels need triton")

from pq_ao.ops.kernels import silu_halves
from pq_ao.ops.kernels.silu_hadamard import choose_tiling
from pq_ao.ops.kernels.silu_halves import HalvesTiling, choose_halves_tiling
from tests.kernels.silu_cases import (
    HALVES_FLIPPED,
    HALVES_SQNR,
    SCALE,
    check_codes,
    check_floats,
    make_accumulators,
    make_input,
    rotated,
    run,
)

pytestmark = pytest.mark.usefixtures("one_thread")

E4M3 = torch.float8_e4m3fn
SMALL = HalvesTiling(4, 2)  # of 512
TILINGS = {  # width: tiling
    28 * 512: HalvesTiling(1, 8),
    4 * 1024: HalvesTiling(4, 16, split=4, early=0),
    12 * 256: HalvesTiling(1, 4, early=2),
}


@pytest.mark.parametrize(("width", "tiling"), TILINGS.items())
def test_many_rows(width, tiling):
    gate_up = make_input(2, width)
    check_floats(gate_up, tiling, floor=HALVES_SQNR, scale=SCALE)
    for code_set in ("even", "spread"):
        check_codes(gate_up, False, 4, torch.int8, tiling, flipped=HALVES_FLIPPED, code_set=code_set)
        check_codes(gate_up, False, 4, E4M3, tiling, shifted=False, flipped=HALVES_FLIPPED, code_set=code_set)


@pytest.mark.parametrize(("width", "tiling"), TILINGS.items())
def test_many_rows_of_accumulators(width, tiling):
    gate_up, raw = make_accumulators(2, width)
    check_floats(gate_up, tiling, raw=raw, floor=HALVES_SQNR, scale=SCALE)
    check_codes(gate_up, False, 4, torch.int8, tiling, raw, flipped=HALVES_FLIPPED, code_set="spread")


def test_every_spread_code_appears_and_clamps():
    """Values far beyond both ends, and between all codes."""
    gate_up = make_input(4, 512)
    for scale in (0.03, 0.09):
        check_codes(gate_up, False, 4, torch.int8, SMALL, flipped=HALVES_FLIPPED, scale=scale, code_set="spread")
        check_codes(gate_up, False, 4, E4M3, SMALL, flipped=HALVES_FLIPPED, scale=scale, code_set="spread")


def test_a_base_that_is_not_flat():
    check_floats(make_input(2, 7 * 512), HalvesTiling(4, 2), hadamard_base(7), floor=HALVES_SQNR, scale=SCALE)


def test_accumulators_without_bias_or_shift():
    gate_up, raw = make_accumulators(4, 512, bias=False)
    check_codes(gate_up, False, 4, E4M3, SMALL, raw, shifted=False, flipped=HALVES_FLIPPED)


def test_the_range_of_scales_and_biases():
    """They go through float16, too, but times 64."""
    rows, width = 4, 512
    in_scale = torch.logspace(-5, 0, 2 * width)[torch.randperm(2 * width, generator=torch.Generator().manual_seed(0))]
    raw = (in_scale, torch.linspace(-50, 50, 2 * width).roll(width // 2))
    gate_up = (make_input(rows, width, torch.float32) / in_scale).bfloat16()
    base = hadamard_base(width)
    spread = rotated(gate_up, base, *raw).std().item()
    check_codes(gate_up, False, 4, torch.int8, SMALL, raw, flipped=HALVES_FLIPPED, scale=spread / 3)
    check_floats(gate_up, SMALL, raw=raw, floor=HALVES_SQNR, scale=spread / 3)


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("code_set", ["even", "spread"])
def test_every_program_does_several_rows(monkeypatch, code_set, shifted):
    """With tables, then, and the very codes that programs of one row give without."""
    tiling, gate_up = HalvesTiling(4, 2, programs=1), make_input(5, 512)
    shift = torch.linspace(-0.5, 0.5, 512) if shifted else None
    given = (hadamard_base(512), torch.tensor([SCALE]), None, shift, 4, torch.int8, tiling)
    alone, _ = run(gate_up, *given, code_set=code_set)
    monkeypatch.setattr(silu_halves, "multiprocessors", lambda device: 2)
    assert torch.equal(run(gate_up, *given, code_set=code_set)[0], alone)
    check_codes(gate_up, False, 4, torch.int8, tiling, shifted=shifted, flipped=HALVES_FLIPPED, code_set=code_set)


def test_every_program_does_several_rows_of_accumulators(monkeypatch):
    monkeypatch.setattr(silu_halves, "multiprocessors", lambda device: 2)
    gate_up, raw = make_accumulators(5, 512)
    tiling = HalvesTiling(4, 2, programs=1)
    check_codes(gate_up, False, 4, torch.int8, tiling, raw, flipped=HALVES_FLIPPED)


@pytest.mark.parametrize("exponent", [-30, -16, 17, 40])
def test_codes_do_not_depend_on_the_unit(exponent):
    """An up far from 1 and the scale with it: what is converted to float16 is in units of the scale."""
    gate_up, base = make_input(1, 512), hadamard_base(512)
    expected, _ = run(gate_up, base, torch.tensor([0.17]), None, None, 4, torch.int8, SMALL)
    gate_up[:, 512:] *= 2.0**exponent
    found, _ = run(gate_up, base, torch.tensor([0.17 * 2.0**exponent]), None, None, 4, torch.int8, SMALL)
    assert torch.equal(found, expected) and expected.unique().numel() == 16


def test_small_rows():
    gate_up = 0.03 * make_input(4, 512)
    spread = rotated(gate_up, hadamard_base(512)).std().item()
    check_codes(gate_up, False, 4, torch.int8, SMALL, shifted=False, flipped=HALVES_FLIPPED, scale=spread / 3)


@pytest.mark.parametrize("scale", [0.17, 300.0])
@pytest.mark.parametrize("raw", [False, True])
def test_hostile_values(raw, scale):
    """Saturated gates, outliers far beyond the range or within it, and a row of zeros."""
    gate_up = make_input(3, 512)
    gate_up[0, :4] = torch.tensor([-1e4, 1e4, -90.0, 90.0])
    gate_up[0, 515] = 1e3  # with a gate of 90
    gate_up[2, [7, 300]] = 1e4
    gate_up[2, [512 + 7, 512 + 300]] = torch.tensor([10.0, -4.0]).bfloat16()
    gate_up[1] = 0
    factors = (torch.full((1024,), 0.25), None) if raw else (None, None)
    check_codes(gate_up * (4 if raw else 1), False, 4, torch.int8, SMALL, factors, flipped=HALVES_FLIPPED, scale=scale)


def test_what_is_beyond_float16_saturates():
    """One element that no scale would fit, of either sign: all outputs end where its sign sends them."""
    gate_up = make_input(2, 512)
    gate_up[:, 3], gate_up[:, 512 + 3] = 1e6, torch.tensor([1e6, -1e6]).bfloat16()
    check_codes(gate_up, False, 4, torch.int8, SMALL, shifted=False, flipped=0)


def test_rows_that_begin_amid_a_word():
    """bf16 are loaded in pairs, but a view may begin at any of them."""
    gate_up = make_input(2, 512)
    view = torch.cat((gate_up.new_zeros(1), gate_up.flatten()))[1:].view_as(gate_up)
    assert view.data_ptr() % 4 == 2
    results = [
        run(x, hadamard_base(512), torch.ones(1), None, None, 4, torch.float32, SMALL)[0] for x in (gate_up, view)
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("rows", [0, 1])
def test_hardly_any_rows(rows):
    codes, _ = run(make_input(rows, 512), hadamard_base(512), torch.ones(1), None, None, 4, torch.int8, SMALL)
    assert codes.shape == (rows, 512)


def test_widths_and_what_else_it_needs():
    """Those of models with a small base; others are left to the form for few rows."""
    for width, order in ((14336, 28), (12288, 12), (8192, 1), (28672, 28), (5120, 20), (20480, 20)):
        tiling = choose_halves_tiling(width, order, raw=True)
        assert width == order * tiling.fold * 64 * tiling.warps and order * tiling.fold <= 32
        assert isinstance(choose_tiling(width, order, 8192, False, raw=True, halves=True), HalvesTiling)
        assert not isinstance(choose_tiling(width, order, 8192, False, raw=True), HalvesTiling)
        assert not isinstance(choose_tiling(width, order, 1, False, halves=True), HalvesTiling)
    for width, order in ((11008, 172), (18944, 148), (192, 12), (53248, 52), (9 * 512, 9)):
        assert choose_halves_tiling(width, order, raw=False) is None
