"""silu_hadamard for many rows of a linear's output: a program does a row, which goes through shared memory once.

In products of float32; `silu_halves` is faster where it applies.

A row of F = K * 64 * W elements is h[k, w, n, j], n and j of 8 places each; a program has W warps. A warp loads the n
and j of its w, and all k, as the right operand of the base: a thread eight j at a time, for every fourth k. Of the six
bits of n and j, butterflies do some of j in a thread, before that product; a product with a Walsh matrix, whose operand
the accumulators are as they lie, does the others. Then values are exchanged so that a thread has all w, which
butterflies do, and neighbours for shift and codes.
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
    small_walsh,
    stack,
    unstack,
)
from pq_ao.ops.kernels.prefetch import prefetch
from pq_ao.ops.kernels.silu_parts import saturated_codes, sigmoid_over
from pq_ao.ops.kernels.workspace import multiprocessors

_ROWS = tl.constexpr(16)  # of the base, that are exchanged together


@triton.jit
def _load(ptr, mask):
    if mask is None:
        x = tl.load(ptr, cache_modifier=".cg")
    else:
        x = tl.load(ptr, mask=mask, other=0, cache_modifier=".cg")
    return x


@triton.jit
def _load_eights(ptr, place, mask):
    """The eight j at `place` [4, 8, W, 1], 16 bytes a load; bf16 as four words of two."""
    if ptr.dtype.element_ty == tl.bfloat16:
        words = ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        x = _load(words + (place // 2 + tl.arange(0, 4)), mask)
    else:
        PART: tl.constexpr = 4 if ptr.dtype.element_ty.primitive_bitwidth == 32 else 8
        part = tl.arange(0, 8 // PART)[None, None, None, :, None] * (8 * PART) + tl.arange(0, PART)
        x = _load(ptr + (tl.expand_dims(place, 4) + part), None if mask is None else tl.expand_dims(mask, 4))
        x = tl.reshape(x, (4, 8, place.shape[2], 8))
    return x


@triton.jit
def widen(x):
    """float32 of what `_load_eights` gives."""
    if x.dtype == tl.int32:
        first, second = (x << 16).to(tl.float32, bitcast=True), (x & -65536).to(tl.float32, bitcast=True)
        x = tl.reshape(tl.join(first, second), (4, 8, x.shape[2], 8))
    return x.to(tl.float32)


@triton.jit
def load_tiles(ptr, place, FIRST: tl.constexpr, LAST: tl.constexpr, F: tl.constexpr, K: tl.constexpr):
    """Of tiles FIRST to LAST - 1, four k each, gate and up in turn."""
    tiles = ()
    for tile in tl.static_range(FIRST, LAST):
        columns = place + tile * (4 * (F // K))
        mask = None
        if tile * 4 + 4 > K:
            mask = tl.arange(0, 4)[:, None, None, None] + tile * 4 < K
        tiles = tiles + (_load_eights(ptr, columns, mask), _load_eights(ptr + F, columns, mask))
    return tiles


@triton.jit
def _base_parts(base_ptr, K: tl.constexpr, BASE: tl.constexpr, FOLD: tl.constexpr, W: tl.constexpr):
    """The left operands: _ROWS rows each, high and low in turn, column 16a + 4b + c being k = 4 (4a + c) + b."""
    column = tl.arange(0, 32)
    k = ((column // 16 * 4 + column % 4) * 4 + column // 4 % 4)[None, :]
    parts = ()
    for first in tl.static_range(0, 32, _ROWS):
        row = first + tl.arange(0, _ROWS)[:, None]
        base = hadamard_entry(base_ptr, row, k, (row < K) & (k < K), BASE, FOLD)
        parts = parts + bf16_parts(tl.broadcast_to(base[None], (W, _ROWS, 32)))
    return parts


@triton.jit
def _output_places(quarter, lane, NEAR: tl.constexpr, VEC: tl.constexpr):
    """Of the 64, NEAR for each lane; the 16 of a quarter are neighbours, or for float32 two eights."""
    PARTS: tl.constexpr = 16 // NEAR
    EIGHTS: tl.constexpr = 2 * VEC // NEAR
    part, near = lane % PARTS, tl.arange(0, NEAR)
    if EIGHTS > 0:  # written so that the compiler sees neighbours
        place = part // EIGHTS * 32 + part % EIGHTS * NEAR + near
    else:
        place = near // (2 * VEC) * 32 + near % (2 * VEC)
    return quarter * (2 * VEC) + place


@triton.jit
def _less_shift(y, shift_ptr, place, row, FIRST: tl.constexpr, K: tl.constexpr, LENGTH: tl.constexpr, W: tl.constexpr):
    ptr = shift_ptr + FIRST * LENGTH
    if K - FIRST < _ROWS:  # rows that do not exist read the last one
        ptr += tl.minimum(row, K - FIRST - 1) * LENGTH + place % LENGTH
    else:
        ptr += place
    done = ()
    for w in tl.static_range(W):
        done = done + (y[w] - tl.load(ptr + w * 64),)
    return done


@triton.jit
def _store(
    y, scale, ptr, place, row, FIRST: tl.constexpr, K: tl.constexpr, LENGTH: tl.constexpr, W: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    for w in tl.static_range(W):
        codes = saturated_codes(y[w], scale, ptr.dtype.element_ty, LOW, HIGH)
        at = ptr + (place + (FIRST * LENGTH + w * 64))
        if K - FIRST < _ROWS:
            tl.store(at, codes, mask=row < K - FIRST)
        else:
            tl.store(at, codes)


@triton.jit(do_not_specialize=["rows"])
def silu_rows_kernel(
    gate_up_ptr,  # [M, 2F]
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
    W: tl.constexpr,
    SPLIT: tl.constexpr,  # 2 or 4 parts of the eight j, that butterflies do
    EARLY: tl.constexpr,  # tiles of the next row that are loaded amid a row
    FLAT: tl.constexpr,
    DYNAMIC: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
):
    K: tl.constexpr = BASE * FOLD
    LENGTH: tl.constexpr = 64 * W
    TILES: tl.constexpr = (K + 3) // 4
    J: tl.constexpr = 8 // SPLIT
    N: tl.constexpr = 8 * J
    ROOT: tl.constexpr = F**0.5
    base = _base_parts(base_ptr, K, BASE, FOLD, W)
    # Of the 64 places of n and j, j has those that 16 bytes hold, the first bits; for float32 also the last bit.
    # The matrix has row 8j + n; and column 8t + 2q + e with e the first bit, next the rest of t, then its top, then q.
    VEC: tl.constexpr = 128 // gate_up_ptr.dtype.element_ty.primitive_bitwidth
    n = tl.arange(0, N)
    place_in = n % 8 * VEC + n // 8
    place_out = n // 2 % 4 * (2 * VEC) + n // (4 * J) * VEC + n // 8 % (J // 2) * 2 + n % 2
    walsh = tl.broadcast_to(small_walsh(place_in[:, None], place_out[None, :])[None], (W, N, N))

    warp = tl.arange(0, W)[None, None, :, None]
    lane = tl.arange(0, 8)[None, :, None, None]
    quarter = tl.arange(0, 4)[:, None, None, None]
    place_in = quarter * LENGTH + warp * 64 + lane * VEC
    # of an output: NEAR neighbours, of which a quarter of the 64 places has 16 / NEAR; the other lanes are rows
    NEAR: tl.constexpr = 2 * _ROWS // W
    row_out = warp * (NEAR // 2) + lane // (16 // NEAR)
    place_out = row_out * LENGTH + _output_places(quarter, lane, NEAR, VEC)
    if DYNAMIC:
        clip = tl.load(clip_ptr)
    else:
        scale = tl.load(scale_ptr)
    begin = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0)
    early = load_tiles(gate_up_ptr + begin * (2 * F), place_in, 0, EARLY, F, K)
    for row in tl.range(begin, rows, step, num_stages=1):
        gate_ptr = gate_up_ptr + row * (2 * F)
        next_ptr = gate_up_ptr + tl.minimum(row + step, rows - 1) * (2 * F)
        h = ()
        for tile in tl.static_range(TILES):
            if tile < EARLY:
                gate, up = widen(early[2 * tile]), widen(early[2 * tile + 1])
            else:
                loaded = load_tiles(gate_ptr, place_in, tile, tile + 1, F, K)
                gate, up = widen(loaded[0]), widen(loaded[1])
            x = gate * sigmoid_over(gate, ROOT) * up
            x = tl.permute(tl.reshape(x, (4, 8, W, SPLIT, J)), (0, 1, 2, 4, 3))
            h = h + (butterflies(unstack(x, SPLIT), 0, SPLIT, 1),)
        prefetch(next_ptr, 2 * F * (gate_up_ptr.dtype.element_ty.primitive_bitwidth // 8))

        based = ()
        for part in tl.static_range(SPLIT):
            x = ()
            for tile in tl.static_range(8):
                if tile < TILES:
                    x = x + (h[tile][part],)
                else:
                    x = x + (tl.zeros((4, 8, W, J), tl.float32),)
            x = tl.permute(tl.reshape(stack(x, 8), (4, 8, W, J, 2, 4)), (2, 4, 0, 5, 3, 1))
            high, low = bf16_parts(tl.reshape(x, (W, 32, N)))
            for half in tl.static_range(32 // _ROWS):
                y = dot_bf16(base[2 * half], low, tl.zeros((W, _ROWS, N), tl.float32))
                if not FLAT:
                    y = dot_bf16(base[2 * half + 1], high, y)
                based = based + (dot_bf16(base[2 * half], high, y),)

        ys = ()
        for half in tl.static_range(32 // _ROWS):
            x = ()
            for part in tl.static_range(SPLIT):
                high, low = bf16_parts(based[part * (32 // _ROWS) + half])
                y = dot_bf16(low, walsh, tl.zeros((W, _ROWS, N), tl.float32))
                x = x + (tl.reshape(dot_bf16(high, walsh, y), (W, _ROWS, N, 1)),)
            # The lanes that the product gave to quarters keep them, or the exchange would be in small pieces. Then
            # top of t, part, rest of t, and e; for float32 the top of the part is the last bit.
            y = tl.reshape(stack(x, SPLIT), (W, _ROWS, 2, J // 2, 4, 2, 2, SPLIT // 2))
            if VEC == 4:
                y = tl.permute(y, (4, 6, 2, 7, 3, 5, 1, 0))
            else:
                y = tl.permute(y, (4, 2, 6, 7, 3, 5, 1, 0))
            y = tl.permute(tl.reshape(y, (4, 16 // NEAR, NEAR, W, NEAR // 2, W)), (0, 4, 1, 3, 2, 5))
            y = butterflies(unstack(tl.reshape(y, (4, 8, W, NEAR, W)), W), 0, W, 1)
            if half == 0:
                early = load_tiles(next_ptr, place_in, 0, EARLY, F, K)
            if half * _ROWS < K:
                if shift_ptr is not None:  # all of it before the first store, which loads do not pass
                    y = _less_shift(y, shift_ptr, place_out, row_out, half * _ROWS, K, LENGTH, W)
                if DYNAMIC:
                    ys = ys + (y,)
                else:
                    _store(y, scale, codes_ptr + row * F, place_out, row_out, half * _ROWS, K, LENGTH, W, LOW, HIGH)
        if DYNAMIC:
            peaks = tl.zeros((4, 8, W, NEAR), tl.float32)
            for half in tl.static_range((K + _ROWS - 1) // _ROWS):
                for w in tl.static_range(W):
                    # rows that do not exist are zero, but for the shift
                    y = tl.where(row_out < K - half * _ROWS, tl.abs(ys[half][w]), 0.0)
                    peaks = tl.maximum(peaks, y)
            absmax = tl.max(tl.reshape(peaks, (32 * W * NEAR,)), axis=0)
            scale = dynamic_scale(absmax, clip, LOW, HIGH)
            tl.store(row_scale_ptr + row, scale)
            for half in tl.static_range((K + _ROWS - 1) // _ROWS):
                _store(ys[half], scale, codes_ptr + row * F, place_out, row_out, half * _ROWS, K, LENGTH, W, LOW, HIGH)


@dataclass(frozen=True)
class ManyRowsTiling:
    """How programs do all rows, here and in `silu_halves`; see the kernels' arguments of the same names."""

    fold: int
    warps: int
    split: int = 4
    early: int = 4
    registers: int | None = 128  # at most so many a thread
    programs: int = 2  # a multiprocessor, which do all rows

    def options(self) -> dict[str, int | None]:
        """What a launch takes of it."""
        return {
            "FOLD": self.fold, "W": self.warps, "SPLIT": self.split, "EARLY": self.early, "num_warps": self.warps,
            "maxnreg": self.registers,
        }  # fmt: skip


@dataclass(frozen=True)
class RowsTiling(ManyRowsTiling):
    """That of `silu_rows_kernel`."""


_LARGEST_K = 32  # beyond, the product with the base would be most of the work


def choose_rows_tiling(features: int, base_order: int, dynamic: bool = False) -> RowsTiling | None:
    """The tiling for many rows of F = features; None for widths that the kernel does not take."""
    fold = 1
    while base_order * fold * 2 <= _LARGEST_K and base_order * fold * 2 <= features:
        fold *= 2
    warps = features // (base_order * fold) // 64
    if base_order * fold > _LARGEST_K or not 4 <= warps <= 16:
        return None
    # a whole row that waits for its scale leaves no registers for the next one
    return RowsTiling(fold, warps, early=0 if dynamic else 4)


def launch_rows(tensors: tuple[Tensor | None, ...], tiling: RowsTiling, constants: dict[str, object]) -> None:
    """Runs the kernel on its tensors (the last two being codes and row scales)."""
    rows = tensors[-2].shape[0]
    if tensors[0].data_ptr() % 4:  # a view, whose bf16 are no whole words
        tensors = (tensors[0].clone(), *tensors[1:])
    programs = min(rows, tiling.programs * multiprocessors(tensors[0].device))
    silu_rows_kernel[(programs,)](*tensors, rows, **constants, **tiling.options())
