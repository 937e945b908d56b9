"""silu_hadamard for many rows of a linear's raw accumulators, which are scaled on the way.

`silu_rows` is for input that needs no scales. Of accumulators it would spill, as scales and biases take registers too,
and was slower on an H200 than the form below.

A row of F = K * T * 32 elements is h[k, l1, l2]. The axis l1 is done by butterflies between tensors that a thread holds
whole. Then a row goes through shared memory once, so that each warp has its own values of l1 (a batch dimension of
`tl.dot` that Triton gives to the warps): the base from the left, a Walsh matrix from the right. The accumulators of the
first product are the operand of the second as they lie in registers, and the columns of the Walsh matrix are put in the
order in which a thread then holds neighbours, so that shift and codes are read and written as they lie too.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from pq_ao.ops.kernels.dynamic_scale import dynamic_scale
from pq_ao.ops.kernels.hadamard import (
    bf16_parts,
    butterflies,
    dot_bf16,
    hadamard_entry,
    join,
    matrix_times,
    small_walsh,
)
from pq_ao.ops.kernels.silu_parts import prefetch, saturated_codes, scaled, sigmoid_over
from pq_ao.ops.kernels.silu_rows import choose_rows_tiling
from pq_ao.ops.kernels.workspace import multiprocessors

_K = tl.constexpr(32)  # K, filled up
_L2 = tl.constexpr(32)


@triton.jit
def _load_scaled(gate_ptr, columns, in_scale_ptr, in_bias_ptr, IN_DTYPE: tl.constexpr):
    bias = None
    if in_bias_ptr is not None:
        bias = tl.load(in_bias_ptr + columns)
    x = tl.load(gate_ptr + columns, cache_modifier=".cg").to(tl.float32)
    return scaled(x, tl.load(in_scale_ptr + columns), bias, IN_DTYPE)


@triton.jit
def _exchange(h, W: tl.constexpr):
    """[_K, _L2, W] to [W, _K, _L2], a warp having its l1; l2 = HELD a + b stands at _L2 / HELD b + a."""
    HELD: tl.constexpr = _L2 // W  # neighbours along l2 that a thread loads
    h = tl.permute(tl.reshape(h, (_K, _L2 // HELD, HELD, W)), (3, 2, 1, 0))
    h = tl.reshape(h, (W, _L2, _K))
    # Adding a product of zeros has the compiler bring h, as float32, to the layout of accumulators, which transposed is
    # that of the right operand. Left alone it would store bf16 in an order that cannot be read in vectors.
    nothing = tl.zeros((W, _L2, 16), tl.bfloat16)
    h = dot_bf16(nothing, tl.zeros((W, 16, _K), tl.bfloat16), h)
    return tl.permute(h, (0, 2, 1))


@triton.jit
def _as_held(y, W: tl.constexpr):
    """[W, _K, _L2] as [4, 8, W, _K / 8, _L2 / 4]: lanes, warps, and what a thread holds."""
    y = tl.permute(tl.reshape(y, (W, _K // 8, 8, _L2 // 8, 4, 2)), (4, 2, 0, 1, 3, 5))
    return tl.reshape(y, (4, 8, W, _K // 8, _L2 // 4))


@triton.jit
def _load_as_held(ptr, K: tl.constexpr, T: tl.constexpr, W: tl.constexpr):
    """Values of a row of F in the shape of `_as_held`, four at a time: so many are one load."""
    k = tl.arange(0, 8)[:, None, None, None, None] + tl.arange(0, _K // 8)[:, None, None] * 8
    k = tl.minimum(k, K - 1)
    l1 = tl.arange(0, W)[:, None, None, None]
    l2 = tl.arange(0, 4)[:, None, None, None, None, None] * (_L2 // 4) + tl.arange(0, _L2 // 16)[:, None] * 4
    x = tl.load(ptr + (k * (T * _L2) + l1 * _L2 + (l2 + tl.arange(0, 4))), eviction_policy="evict_last")
    return tl.reshape(x, (4, 8, W, _K // 8, _L2 // 4))


@triton.jit(do_not_specialize=["rows"])
def silu_accumulators_kernel(
    gate_up_ptr,  # float32 or bfloat16 [M, 2F]
    in_scale_ptr,  # float32 [2F]
    in_bias_ptr,  # float32 [2F] or None
    base_ptr,  # float32 [BASE, BASE]
    scale_ptr,  # float32 (1,) unless DYNAMIC
    clip_ptr,  # float32 (1,) if DYNAMIC
    shift_ptr,  # float32 [F] or None
    codes_ptr,  # [M, F] int8, float8 or, for tests, float32
    row_scale_ptr,  # float32 [M]; used if DYNAMIC
    rows,
    F: tl.constexpr,
    BASE: tl.constexpr,
    FOLD: tl.constexpr,  # K = BASE * FOLD, at most 32
    W: tl.constexpr,  # warps, each of which has one l1 of W that go through the products together
    FLAT: tl.constexpr,
    IN_DTYPE: tl.constexpr,
    DYNAMIC: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
):
    K: tl.constexpr = BASE * FOLD
    T: tl.constexpr = F // K // _L2
    ROOT: tl.constexpr = F**0.5
    HELD: tl.constexpr = _L2 // W
    BYTES: tl.constexpr = gate_up_ptr.dtype.element_ty.primitive_bitwidth // 8
    k, l2 = tl.arange(0, _K), tl.arange(0, _L2)
    base = hadamard_entry(base_ptr, k[:, None], k[None, :], (k < K)[:, None] & (k < K)[None, :], BASE, FOLD)
    base_high, base_low = bf16_parts(tl.broadcast_to(base[None], (W, _K, _K)))
    # rows in the order of `_exchange`; column 8a + 2b + c for l2 = (_L2 / 4) b + 2a + c
    l2_in, l2_out = l2 % (_L2 // HELD) * HELD + l2 // (_L2 // HELD), l2 // 2 % 4 * (_L2 // 4) + l2 // 8 * 2 + l2 % 2
    walsh = tl.broadcast_to(small_walsh(l2_in[:, None], l2_out[None, :])[None], (W, _L2, _L2))

    # k that do not exist are read as the last one; the base is zero there
    columns = tl.minimum(k, K - 1)[:, None] * (T * _L2) + l2[None, :]
    # of an output: quarter of l2, row k of eight, l1, which eight rows, place in the quarter
    k = tl.arange(0, 8)[None, :, None, None, None] + tl.arange(0, _K // 8)[None, None, None, :, None] * 8
    l2 = tl.arange(0, 4)[:, None, None, None, None] * (_L2 // 4) + tl.arange(0, _L2 // 4)
    place = k * (T * _L2) + tl.arange(0, W)[None, None, :, None, None] * _L2 + l2
    if DYNAMIC:
        clip = tl.load(clip_ptr)
    else:
        scale = tl.load(scale_ptr)
    step = tl.num_programs(0)
    for row in tl.range(tl.program_id(0).to(tl.int64), rows, step, num_stages=1):
        gate_ptr = gate_up_ptr + row * (2 * F)
        codes_row = codes_ptr + row * F
        h = ()
        for l1 in tl.static_range(T):
            gate = _load_scaled(gate_ptr, columns + l1 * _L2, in_scale_ptr, in_bias_ptr, IN_DTYPE)
            up = _load_scaled(gate_ptr, columns + (F + l1 * _L2), in_scale_ptr, in_bias_ptr, IN_DTYPE)
            h = h + (gate * sigmoid_over(gate, ROOT) * up,)
        prefetch(gate_up_ptr + tl.minimum(row + step, rows - 1) * (2 * F), 2 * F * BYTES)
        h = butterflies(h, 0, T, 1)

        ys = ()
        for group in tl.static_range(T // W):
            x = _exchange(join(h, group * W, W), W)
            y = matrix_times(base_high, base_low, x, tl.zeros((W, _K, _L2), tl.float32), FLAT)
            high, low = bf16_parts(y)
            y = dot_bf16(low, walsh, tl.zeros((W, _K, _L2), tl.float32))
            y = _as_held(dot_bf16(high, walsh, y), W)
            if shift_ptr is not None:
                y -= _load_as_held(shift_ptr + group * (W * _L2), K, T, W)
            if DYNAMIC:
                ys = ys + (y,)
            else:
                codes = saturated_codes(y, scale, codes_ptr.dtype.element_ty, LOW, HIGH)
                tl.store(codes_row + place + group * (W * _L2), codes, mask=k < K)
        if DYNAMIC:
            peaks = tl.zeros((4, 8, W, _K // 8, _L2 // 4), tl.float32)
            for group in tl.static_range(T // W):
                # rows that do not exist are zero, but for the shift
                peaks = tl.maximum(peaks, tl.where(k < K, tl.abs(ys[group]), 0.0))
            scale = dynamic_scale(tl.max(tl.reshape(peaks, (W * _K * _L2,)), axis=0), clip, LOW, HIGH)
            tl.store(row_scale_ptr + row, scale)
            for group in tl.static_range(T // W):
                codes = saturated_codes(ys[group], scale, codes_ptr.dtype.element_ty, LOW, HIGH)
                tl.store(codes_row + place + group * (W * _L2), codes, mask=k < K)


@dataclass(frozen=True)
class AccumulatorsTiling:
    """How rows of accumulators are done; see the kernel's arguments of the same names."""

    fold: int
    warps: int
    registers: int | None = 128  # at most so many a thread
    programs: int = 1  # a multiprocessor, which do all rows

    def options(self) -> dict[str, int | None]:
        """What a launch takes of it."""
        return {"FOLD": self.fold, "W": self.warps, "num_warps": self.warps, "maxnreg": self.registers}


_WARPS = 16  # of a multiprocessor, for so many have 128 registers a thread


def choose_accumulators_tiling(features: int, base_order: int) -> AccumulatorsTiling | None:
    """The tiling for many rows of F = features; None for widths that `silu_rows` does not take either."""
    rows = choose_rows_tiling(features, base_order)
    if rows is None:
        return None
    warps = min(2 * rows.warps, _WARPS)  # half of what a thread has there of a row, but for the widest
    return AccumulatorsTiling(rows.fold, warps, programs=_WARPS // warps)


def launch_accumulators(
    tensors: tuple[Tensor | None, ...], tiling: AccumulatorsTiling, constants: dict[str, object]
) -> None:
    """Runs the kernel on its tensors (the last two being codes and row scales)."""
    rows = tensors[-2].shape[0]
    programs = min(rows, tiling.programs * multiprocessors(tensors[0].device))
    silu_accumulators_kernel[(programs,)](*tensors, rows, **constants, **tiling.options())
