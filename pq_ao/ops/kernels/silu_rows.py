"""silu_hadamard for many rows: a program does a row, which goes through shared memory once, as a bf16 operand.

A row of F = K * L elements is h[k, l1, l2]. The axis l1 is done by butterflies between tensors that a thread holds
whole. Then each warp takes its own values of l1 (a batch dimension of `tl.dot` that Triton gives to the warps): the
base from the left, a Walsh matrix from the right. The accumulators of the first product are the operand of the second
as they lie in registers, and the columns of the Walsh matrix are put in the order in which a thread then holds
neighbours, so that shift and codes are read and written as they lie too.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from pq_ao.ops.kernels.dynamic_scale import dynamic_scale
from pq_ao.ops.kernels.hadamard import bf16_parts, butterflies, dot_bf16, hadamard_entry, join, small_walsh
from pq_ao.ops.kernels.silu_parts import silu_times, to_codes
from pq_ao.ops.kernels.workspace import multiprocessors


@triton.jit
def _product(a_high, a_low, b_high, b_low, A_FLAT: tl.constexpr, B_FLAT: tl.constexpr):
    """a @ b for batches of two parts each, of which FLAT ones have no low part."""
    acc = tl.zeros((a_high.shape[0], a_high.shape[1], b_high.shape[2]), tl.float32)
    if not A_FLAT:
        acc = dot_bf16(a_low, b_high, acc)
    if not B_FLAT:
        acc = dot_bf16(a_high, b_low, acc)
    return dot_bf16(a_high, b_high, acc)


@triton.jit
def _as_held(y, GROUP: tl.constexpr, BLOCK_K: tl.constexpr, L2: tl.constexpr):
    """[GROUP, BLOCK_K, L2] as [4, 8, GROUP, BLOCK_K / 8, L2 / 4]: lanes, warps, and what a thread holds."""
    y = tl.reshape(y, (GROUP, BLOCK_K // 8, 8, L2 // 8, 4, 2))
    return tl.reshape(tl.permute(y, (4, 2, 0, 1, 3, 5)), (4, 8, GROUP, BLOCK_K // 8, L2 // 4))


@triton.jit
def _load_as_held(
    ptr, first, K: tl.constexpr, T: tl.constexpr, L2: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Values of a row of F in the shape of `_as_held`, four at a time: so many are one load."""
    quarter = tl.arange(0, 4)[:, None, None, None, None, None]
    k = (
        tl.arange(0, 8)[None, :, None, None, None, None]
        + tl.arange(0, BLOCK_K // 8)[None, None, None, :, None, None] * 8
    )
    l1 = tl.arange(0, GROUP)[None, None, :, None, None, None]
    part = tl.arange(0, L2 // 16)[None, None, None, None, :, None]
    offsets = k * (T * L2) + first + l1 * L2 + quarter * (L2 // 4) + part * 4 + tl.arange(0, 4)
    x = tl.load(ptr + offsets, mask=k < K, other=0.0, eviction_policy="evict_last")
    return tl.reshape(x, (4, 8, GROUP, BLOCK_K // 8, L2 // 4))


@triton.jit
def _exchange(h, GROUP: tl.constexpr, BLOCK_K: tl.constexpr, L2: tl.constexpr, HELD: tl.constexpr):
    """[BLOCK_K, L2, GROUP] to [GROUP, L2, BLOCK_K], a warp having its l1; l2 = HELD a + b stands at L2 / HELD b + a."""
    h = tl.permute(tl.reshape(h, (BLOCK_K, L2 // HELD, HELD, GROUP)), (3, 2, 1, 0))
    h = tl.reshape(h, (GROUP, L2, BLOCK_K))
    # Adding a product of zeros has the compiler bring h, as float32, to the layout of accumulators, which transposed is
    # that of the right operand. Left alone it would store bf16 in an order that cannot be read in vectors.
    nothing = tl.zeros((GROUP, L2, 16), tl.bfloat16)
    return dot_bf16(nothing, tl.zeros((GROUP, 16, BLOCK_K), tl.bfloat16), h)


@triton.jit(do_not_specialize=["rows"])
def silu_rows_kernel(
    gate_up_ptr,  # [M, 2F]
    in_scale_ptr,  # float32 [2F] or None
    in_bias_ptr,
    base_ptr,  # float32 [BASE, BASE]
    scale_ptr,  # float32 (1,) unless DYNAMIC
    clip_ptr,  # float32 (1,) if DYNAMIC
    shift_ptr,  # float32 [F] or None
    codes_ptr,  # [M, F] int8, float8 or, for tests, float32
    row_scale_ptr,  # float32 [M]; used if DYNAMIC
    rows,
    F: tl.constexpr,
    BASE: tl.constexpr,
    FOLD: tl.constexpr,  # K = BASE * FOLD
    T: tl.constexpr,  # of l1
    GROUP: tl.constexpr,  # values of l1 that go through the products together: one a warp
    BLOCK_K: tl.constexpr,  # 16 or 32
    HELD: tl.constexpr,  # neighbours along l2 that a thread loads
    FLAT: tl.constexpr,
    IN_DTYPE: tl.constexpr,
    DYNAMIC: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
):
    K: tl.constexpr = BASE * FOLD
    L2: tl.constexpr = F // K // T
    norm: tl.constexpr = F**-0.5
    k, l2 = tl.arange(0, BLOCK_K), tl.arange(0, L2)
    base = hadamard_entry(base_ptr, k[:, None], k[None, :], (k < K)[:, None] & (k < K)[None, :], BASE, FOLD)
    base_high, base_low = bf16_parts(tl.broadcast_to(base[None], (GROUP, BLOCK_K, BLOCK_K)))
    # rows in the order of `_exchange`; column 8a + 2b + c for l2 = (L2 / 4) b + 2a + c
    l2_in, l2_out = l2 % (L2 // HELD) * HELD + l2 // (L2 // HELD), l2 // 2 % 4 * (L2 // 4) + l2 // 8 * 2 + l2 % 2
    walsh = tl.broadcast_to(small_walsh(l2_in[:, None], l2_out[None, :])[None], (GROUP, L2, L2))

    k_in, l2_in = k[:, None], l2[None, :]
    # of an output: quarter of l2, row k of eight, l1, which eight rows, place in the quarter
    k = tl.arange(0, 8)[None, :, None, None, None] + tl.arange(0, BLOCK_K // 8)[None, None, None, :, None] * 8
    l2 = tl.arange(0, 4)[:, None, None, None, None] * (L2 // 4) + tl.arange(0, L2 // 4)
    place = k * (T * L2) + tl.arange(0, GROUP)[None, None, :, None, None] * L2 + l2
    mask = k < K
    if DYNAMIC:
        clip = tl.load(clip_ptr)
    else:
        scale = tl.load(scale_ptr)
    for row in tl.range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0), num_stages=1):
        gate_ptr = gate_up_ptr + row * (2 * F)
        row_ptr = codes_ptr + row * F
        h = ()
        for l1 in tl.static_range(T):
            offsets = k_in * (T * L2) + l1 * L2 + l2_in
            h = h + (silu_times(gate_ptr, offsets, k_in < K, in_scale_ptr, in_bias_ptr, F, IN_DTYPE, ".cg"),)
        h = butterflies(h, 0, T, 1)

        ys = ()
        for group in tl.static_range(T // GROUP):
            x = _exchange(join(h, group * GROUP, GROUP), GROUP, BLOCK_K, L2, HELD)
            high, low = bf16_parts(tl.permute(x, (0, 2, 1)))
            y = _product(base_high, base_low, high, low, FLAT, False)
            high, low = bf16_parts(y)
            y = _as_held(_product(high, low, walsh, walsh, False, True), GROUP, BLOCK_K, L2) * norm
            if DYNAMIC:
                ys = ys + (y,)
            else:
                offsets = place + group * (GROUP * L2)
                if shift_ptr is not None:
                    y -= _load_as_held(shift_ptr, group * (GROUP * L2), K, T, L2, GROUP, BLOCK_K)
                codes = to_codes(y, scale, codes_ptr.dtype.element_ty, LOW, HIGH)
                tl.store(row_ptr + offsets, codes, mask=mask)
        if DYNAMIC:
            # rows beyond K are zero: those of the base and the shift are
            absmax = 0.0
            shifted = ()
            for group in tl.static_range(T // GROUP):
                y = ys[group]
                if shift_ptr is not None:
                    y -= _load_as_held(shift_ptr, group * (GROUP * L2), K, T, L2, GROUP, BLOCK_K)
                absmax = tl.maximum(absmax, tl.max(tl.abs(tl.reshape(y, (GROUP * BLOCK_K * L2,))), axis=0))
                shifted = shifted + (y,)
            ys = shifted
            scale = dynamic_scale(absmax, clip, LOW, HIGH)
            tl.store(row_scale_ptr + row, scale)
            for group in tl.static_range(T // GROUP):
                codes = to_codes(ys[group], scale, codes_ptr.dtype.element_ty, LOW, HIGH)
                tl.store(row_ptr + place + group * (GROUP * L2), codes, mask=mask)


@dataclass(frozen=True)
class RowsTiling:
    """How rows are done; see the kernel's arguments of the same names."""

    fold: int
    t: int
    block_k: int
    warps: int
    registers: int | None = 128  # at most so many a thread
    programs: int = 4  # a multiprocessor, which do all rows


_VALUES = 64  # float32 that a thread holds of a row
_LARGEST_K = 32  # beyond, the product with the base would be most of the work


def choose_rows_tiling(features: int, base_order: int) -> RowsTiling | None:
    """The tiling for many rows of F = features; None for widths that this kernel does not take."""
    fold = 1
    while base_order * fold * 2 <= _LARGEST_K and base_order * fold * 2 <= features:
        fold *= 2
    length = features // (base_order * fold)
    block_k = max(16, triton.next_power_of_2(base_order * fold))
    warps = block_k * length // (32 * _VALUES)
    if block_k > _LARGEST_K or not 4 <= warps <= 16:
        return None
    return RowsTiling(fold, length // (32 if length >= 512 else 16), block_k, warps)


def launch_rows(tensors: tuple[Tensor | None, ...], tiling: RowsTiling, constants: dict[str, object]) -> None:
    """Runs the kernel on its tensors (the last two being codes and row scales)."""
    rows, features = tensors[-2].shape
    programs = min(rows, tiling.programs * multiprocessors(tensors[0].device))
    l2 = features // (constants["BASE"] * tiling.fold * tiling.t)
    silu_rows_kernel[(programs,)](
        *tensors, rows, **constants, FOLD=tiling.fold, T=tiling.t, GROUP=min(tiling.warps, tiling.t),
        BLOCK_K=tiling.block_k, HELD=max(1, tiling.block_k * l2 // (32 * tiling.warps)), num_warps=tiling.warps,
        maxnreg=tiling.registers,
    )  # fmt: skip
