"""Kernel of pq_ao::silu_hadamard: SwiGLU, the rotation R4 and quantization of a row without leaving the chip.

For few rows, and for what `silu_halves` and `silu_rows` do not take.

A row of F = K * L elements, L a power of two, is h[k, l1, l2]. The axis l1 (T values) is done by butterflies between
tensors that a thread holds whole, l2 by a product with a Walsh matrix, k by one with the base. With SPLIT programs a
row, each reads all of it and keeps T / SPLIT of the l1 outputs, so that nothing has to be summed across programs.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pq_ao.hadamard import has_hadamard_matrix
from pq_ao.ops.kernels.dynamic_scale import dynamic_scale
from pq_ao.ops.kernels.early import launch_options, launches_early, wait
from pq_ao.ops.kernels.hadamard import (
    bf16_parts,
    butterflies,
    hadamard_entry,
    join_rows,
    matrix_times,
    times_matrix,
    walsh_sign,
)
from pq_ao.ops.kernels.prefetch import prefetch
from pq_ao.ops.kernels.silu_halves import HalvesTiling, choose_halves_tiling, launch_halves
from pq_ao.ops.kernels.silu_parts import silu_times, to_codes
from pq_ao.ops.kernels.silu_rows import RowsTiling, choose_rows_tiling, launch_rows
from pq_ao.ops.quantize import code_range


@triton.jit
def _rotate_chunk(
    gate_ptr, in_scale_ptr, in_bias_ptr, base_ptr, first_k, first, first_out, walsh, y,
    F: tl.constexpr, BASE: tl.constexpr, FOLD: tl.constexpr, T: tl.constexpr, L2: tl.constexpr,
    SPLIT: tl.constexpr, GROUP: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L2: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    """Adds what BLOCK_K values of k give to y, a tuple of T / SPLIT / GROUP tensors [BLOCK_OUT, GROUP * BLOCK_L2]."""
    k = first_k + tl.arange(0, BLOCK_K)[:, None]
    l2 = tl.arange(0, BLOCK_L2)[None, :]
    mask = (k < BASE * FOLD) & (l2 < L2)
    h = ()
    for l1 in tl.static_range(T):
        columns = k * (T * L2) + l1 * L2 + l2
        h = h + (silu_times(gate_ptr, columns, mask, in_scale_ptr, in_bias_ptr, F),)
    h = butterflies(h, first, T, SPLIT)
    i = first_out + tl.arange(0, BLOCK_OUT)[:, None]
    j = first_k + tl.arange(0, BLOCK_K)[None, :]
    base = hadamard_entry(base_ptr, i, j, (i < BASE * FOLD) & (j < BASE * FOLD), BASE, FOLD)
    high, low = bf16_parts(base)
    done = ()
    for group in tl.static_range(T // SPLIT // GROUP):
        part = join_rows(h, group * GROUP, GROUP, BLOCK_K, BLOCK_L2)
        if L2 > 1:
            part = times_matrix(part, walsh, walsh, FLAT=True)
        done = done + (matrix_times(high, low, tl.reshape(part, (BLOCK_K, GROUP * BLOCK_L2)), y[group], FLAT),)
    return done


@triton.jit
def _places(
    k, column, first, group, T: tl.constexpr, L2: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_L2: tl.constexpr,
):  # fmt: skip
    """Where the outputs of a group stand in a row of F."""
    l1 = first * (T // SPLIT) + group * GROUP + column // BLOCK_L2
    return k * (T * L2) + l1 * L2 + column % BLOCK_L2


@triton.jit
def _do_row(
    row, gate_up_ptr, in_scale_ptr, in_bias_ptr, base_ptr, scale_ptr, clip_ptr, shift_ptr, codes_ptr, row_scale_ptr,
    first, first_out, walsh,
    F: tl.constexpr, BASE: tl.constexpr, FOLD: tl.constexpr, T: tl.constexpr, L2: tl.constexpr,
    SPLIT: tl.constexpr, GROUP: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L2: tl.constexpr,
    FLAT: tl.constexpr, DYNAMIC: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = BASE * FOLD
    GROUPS: tl.constexpr = T // SPLIT // GROUP
    norm: tl.constexpr = F**-0.5
    row = row.to(tl.int64)
    gate_ptr = gate_up_ptr + row * (2 * F)
    y = ()
    for _ in tl.static_range(GROUPS):
        y = y + (tl.zeros((BLOCK_OUT, GROUP * BLOCK_L2), tl.float32),)
    if K <= BLOCK_K:
        y = _rotate_chunk(
            gate_ptr, in_scale_ptr, in_bias_ptr, base_ptr, 0, first, first_out, walsh, y,
            F, BASE, FOLD, T, L2, SPLIT, GROUP, BLOCK_OUT, BLOCK_K, BLOCK_L2, FLAT,
        )  # fmt: skip
    else:
        for first_k in range(0, K, BLOCK_K):
            y = _rotate_chunk(
                gate_ptr, in_scale_ptr, in_bias_ptr, base_ptr, first_k, first, first_out, walsh, y,
                F, BASE, FOLD, T, L2, SPLIT, GROUP, BLOCK_OUT, BLOCK_K, BLOCK_L2, FLAT,
            )  # fmt: skip
    if DYNAMIC:
        clip = tl.load(clip_ptr)
    else:
        scale = tl.load(scale_ptr)
    k = first_out + tl.arange(0, BLOCK_OUT)[:, None]
    column = tl.arange(0, GROUP * BLOCK_L2)[None, :]
    mask = (k < K) & (column % BLOCK_L2 < L2)
    if DYNAMIC:
        # what lies outside the masks is zero: those rows and columns of the two matrices are, and of the shift
        absmax = 0.0
        values = ()
        for group in tl.static_range(GROUPS):
            value = y[group] * norm
            if shift_ptr is not None:
                offsets = _places(k, column, first, group, T, L2, SPLIT, GROUP, BLOCK_L2)
                value -= tl.load(shift_ptr + offsets, mask=mask, other=0.0)
            absmax = tl.maximum(absmax, tl.max(tl.max(tl.abs(value), axis=1), axis=0))
            values = values + (value,)
        scale = dynamic_scale(absmax, clip, LOW, HIGH)
        tl.store(row_scale_ptr + row, scale)
    for group in tl.static_range(GROUPS):
        offsets = _places(k, column, first, group, T, L2, SPLIT, GROUP, BLOCK_L2)
        if DYNAMIC:
            value = values[group]
        else:
            value = y[group] * norm
            if shift_ptr is not None:
                value -= tl.load(shift_ptr + offsets, mask=mask, other=0.0)
        codes = to_codes(value, scale, codes_ptr.dtype.element_ty, LOW, HIGH)
        tl.store(codes_ptr + row * F + offsets, codes, mask=mask)


@triton.jit
def silu_hadamard_kernel(
    gate_up_ptr,  # [M, 2F]
    in_scale_ptr,  # float32 [2F] or None
    in_bias_ptr,  # float32 [2F] or None
    base_ptr,  # float32 [BASE, BASE]
    scale_ptr,  # float32 (1,) unless DYNAMIC
    clip_ptr,  # float32 (1,) if DYNAMIC
    shift_ptr,  # float32 [F] or None
    codes_ptr,  # [M, F] int8, float8 or, for tests, float32
    row_scale_ptr,  # float32 [M]; used if DYNAMIC
    F: tl.constexpr,
    BASE: tl.constexpr,
    FOLD: tl.constexpr,  # K = BASE * FOLD: that much of the power of two goes with the base
    T: tl.constexpr,
    L2: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,  # outputs l1 that go through the products together: more take more registers
    BLOCK_OUT: tl.constexpr,  # outputs k of a program; SPLIT * cdiv(K, BLOCK_OUT) programs a row
    BLOCK_K: tl.constexpr,
    BLOCK_L2: tl.constexpr,
    FLAT: tl.constexpr,
    DYNAMIC: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    EARLY: tl.constexpr,
):
    TILES: tl.constexpr = SPLIT * ((BASE * FOLD + BLOCK_OUT - 1) // BLOCK_OUT)
    program = tl.program_id(0)
    tile = program % TILES
    first, first_out = tile % SPLIT, tile // SPLIT * BLOCK_OUT
    i, j = tl.arange(0, BLOCK_L2)[:, None], tl.arange(0, BLOCK_L2)[None, :]
    walsh = tl.where((i < L2) & (j < L2), walsh_sign(i, j), 0.0).to(tl.bfloat16)
    if EARLY:
        prefetch(base_ptr, 4 * BASE * BASE, tile, TILES)
        if not DYNAMIC:
            prefetch(scale_ptr, 4)
        if shift_ptr is not None:
            prefetch(shift_ptr, 4 * F, tile, TILES)
    wait(EARLY)
    _do_row(
        program // TILES, gate_up_ptr, in_scale_ptr, in_bias_ptr, base_ptr, scale_ptr, clip_ptr, shift_ptr, codes_ptr,
        row_scale_ptr, first, first_out, walsh, F, BASE, FOLD, T, L2, SPLIT, GROUP, BLOCK_OUT, BLOCK_K,
        BLOCK_L2, FLAT, DYNAMIC, LOW, HIGH,
    )  # fmt: skip


@triton.jit
def silu_quantize_kernel(
    gate_up_ptr, in_scale_ptr, in_bias_ptr, scale_ptr, clip_ptr, shift_ptr, codes_ptr, row_scale_ptr,
    F: tl.constexpr, BLOCK: tl.constexpr, DYNAMIC: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The same without a rotation: cdiv(F, BLOCK) programs a row; DYNAMIC needs one."""
    TILES: tl.constexpr = (F + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    row = (program // TILES).to(tl.int64)
    columns = program % TILES * BLOCK + tl.arange(0, BLOCK)
    mask = columns < F
    if EARLY and shift_ptr is not None:
        prefetch(shift_ptr, 4 * F, program % TILES, TILES)
    wait(EARLY)
    y = silu_times(gate_up_ptr + row * (2 * F), columns, mask, in_scale_ptr, in_bias_ptr, F)
    if DYNAMIC:
        clip = tl.load(clip_ptr)
    else:
        scale = tl.load(scale_ptr)
    if shift_ptr is not None:
        y -= tl.load(shift_ptr + columns, mask=mask, other=0.0)
    if DYNAMIC:
        scale = dynamic_scale(tl.max(tl.abs(y), axis=0), clip, LOW, HIGH)
        tl.store(row_scale_ptr + row, scale)
    # nothing was summed here, so codes can be those of the true division
    codes = to_codes(tl.div_rn(y, scale), 1.0, codes_ptr.dtype.element_ty, LOW, HIGH)
    tl.store(codes_ptr + row * F + columns, codes, mask=mask)


_EARLY_ROWS = 8
_WHOLE_ROWS = 96  # beyond, a program does whole rows
_FEW_ROWS = 256  # up to here rows are cut between programs, for there are not enough of them to fill a GPU
_LARGEST_TILE = 32768  # float32 values that a program of 16 warps keeps in registers
_LARGEST_BLOCK_OUT = 256


@dataclass(frozen=True)
class Tiling:
    """How a rotation is cut; see the kernel's arguments of the same names."""

    fold: int
    t: int
    l2: int
    split: int
    group: int
    block_out: int
    block_k: int
    warps: int
    registers: int | None = None  # at most so many a thread, so that several programs share a multiprocessor
    stages: int = 3  # of what is loaded for several steps of k
    early: bool = False  # launched before the kernel in front has ended, where the GPU can

    def options(self) -> dict[str, object]:
        """Launch options of Triton."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        if self.registers is not None:
            options["maxnreg"] = self.registers
        return options


def choose_tiling(
    features: int, base_order: int, rows: int, dynamic: bool, raw: bool = False, halves: bool = False
) -> Tiling | RowsTiling | HalvesTiling:
    """The tiling for `rows` rows of F = features, of accumulators if raw, rotated with a base of this order.

    halves: whether `silu_halves` may be it, for what it needs beside the width.
    """
    if rows > _WHOLE_ROWS:
        tiling = None
        if halves:
            tiling = choose_halves_tiling(features, base_order, raw)
        elif not raw:
            tiling = choose_rows_tiling(features, base_order, dynamic)
        if tiling is not None:
            return tiling
    length = features // base_order
    fold = 1
    while base_order * fold < 12 and fold < length:
        fold *= 2
    if base_order == 1:
        fold = min(32, length)
    k, length = base_order * fold, length // fold
    l2 = min(length, max(32, length // 32))
    t = length // l2
    block_k = 16 if k <= 16 or (k > 32 and -(-k // 32) * 32 > 1.15 * k) else 32
    block_out = max(16, triton.next_power_of_2(k))
    split = 1
    if not dynamic:  # which needs the whole row in one program
        block_out = min(block_out, _LARGEST_BLOCK_OUT)
        if rows <= _FEW_ROWS:
            split = min(t, 1 << (_FEW_ROWS // rows).bit_length() - 1)
            block_out = min(block_out, 64)
        while split < t and block_out * max(16, l2) * (t // split) > _LARGEST_TILE:
            split *= 2
    values = max(block_out, block_k * split) * max(16, l2) * (t // split)
    warps = 4 if values <= 8192 else 8 if values <= 16384 else 16
    # 128 registers: two programs of 8 warps on a multiprocessor
    registers = 128 if warps == 8 and split == 1 and not dynamic else None
    stages = 3
    if block_out > _LARGEST_BLOCK_OUT:  # several chunks of so large a base in flight exceed shared memory
        stages = 1
    elif raw:  # as do those of scales and biases, which are five times what they are for
        stages = 2 if block_k * length <= 4096 else 1
    early = rows <= _EARLY_ROWS  # with more, waiting inside takes longer than being launched later
    return Tiling(fold, t, l2, split, min(8, t // split), block_out, block_k, warps, registers, stages, early)


def launch(
    gate_up: Tensor,
    base: Tensor | None,
    scale: Tensor | None,
    clip: Tensor | None,
    shift: Tensor | None,
    bits: int,
    codes: Tensor,
    row_scale: Tensor,
    tiling: Tiling | RowsTiling | HalvesTiling | None = None,
    in_scale: Tensor | None = None,
    in_bias: Tensor | None = None,
    code_set: str = "even",
) -> None:
    """Fills `codes` [M, F] and, if `clip` is given, `row_scale` [M] from gate_up [M, 2F], all contiguous.

    float32 `codes` receive what would be quantized instead. `tiling` overrides the choice made here.
    """
    rows, features = codes.shape
    if rows == 0:
        return
    low, high = code_range(bits, code_set)
    dynamic = clip is not None
    constants = {"F": features, "DYNAMIC": dynamic, "LOW": low, "HIGH": high}
    if base is None:
        block = triton.next_power_of_2(features) if dynamic else min(2048, triton.next_power_of_2(features))
        early = rows <= _EARLY_ROWS and launches_early(gate_up.device)
        silu_quantize_kernel[(rows * triton.cdiv(features, block),)](
            gate_up, in_scale, in_bias, scale, clip, shift, codes, row_scale, **constants, BLOCK=block, EARLY=early,
            num_warps=4 if block <= 4096 else 16, **launch_options(early),
        )  # fmt: skip
        return
    order = base.shape[0]
    halves = gate_up.dtype == torch.bfloat16 and bits == 4 and not dynamic
    tiling = tiling or choose_tiling(features, order, rows, dynamic, raw=in_scale is not None, halves=halves)
    tensors = (gate_up, in_scale, in_bias, base, scale, clip, shift, codes, row_scale)
    if isinstance(tiling, HalvesTiling):
        assert halves
        launch_halves(gate_up, base, scale, shift, codes, tiling, in_scale, in_bias, code_set)
        return
    constants |= {"BASE": order, "FLAT": has_hadamard_matrix(order)}
    if isinstance(tiling, RowsTiling):
        assert in_scale is None
        launch_rows((gate_up, *tensors[3:]), tiling, constants)
        return
    programs = rows * tiling.split * triton.cdiv(order * tiling.fold, tiling.block_out)
    early = tiling.early and launches_early(gate_up.device)
    silu_hadamard_kernel[(programs,)](
        *tensors, **constants, FOLD=tiling.fold, T=tiling.t, L2=tiling.l2, SPLIT=tiling.split, GROUP=tiling.group,
        BLOCK_OUT=tiling.block_out, BLOCK_K=tiling.block_k, BLOCK_L2=max(16, tiling.l2), EARLY=early,
        **tiling.options(), **launch_options(early),
    )  # fmt: skip
