"""silu_hadamard for many rows of bfloat16 to codes of 4 bits with a static scale, accumulators or not.

The form of `silu_rows`, which see, in float16: operands of both products are rounded to it, sums are float32, what is
exchanged and the butterflies after it are float16, two an instruction. SwiGLU is in float32.

A static scale lets silu(gate) * up be divided, at no cost, by what maps the codes' range to a width of 1: outputs are
then fractions of it, whatever the scale, and only need an offset. Elements beyond 3e7 scales leave float16's range;
those below some 0.1 scales lose bits, by an error below 1e-4 scales.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from pq_ao.ops.kernels.early import launch_options, launches_early, wait
from pq_ao.ops.kernels.hadamard import hadamard_entry, stack, unstack, walsh_sign
from pq_ao.ops.kernels.half_codes import four_codes, half_codes, origin
from pq_ao.ops.kernels.halves import dot_half, half_butterflies, halves, times_plus, to_half, word
from pq_ao.ops.kernels.prefetch import prefetch
from pq_ao.ops.kernels.silu_parts import sigmoid_over
from pq_ao.ops.kernels.silu_rows import ManyRowsTiling, choose_rows_tiling, load_tiles, widen
from pq_ao.ops.kernels.workspace import multiprocessors
from pq_ao.ops.quantize import code_range

_ROWS = tl.constexpr(16)  # of the base, that are exchanged together
_FACTOR = tl.constexpr(64.0)  # of scales and biases, so that float16 holds scales from 1e-6 to 1000 in 11 bits


@triton.jit
def _offsets(shift_ptr, pair, scale, LOW: tl.constexpr, HIGH: tl.constexpr):
    """What `half_codes` adds to pairs of neighbours, as words."""
    part = -1.0 / (scale * (HIGH - LOW))
    zero: tl.constexpr = origin(LOW, HIGH) / (HIGH - LOW)
    low, high = (pair * 0).to(tl.float32), (pair * 0).to(tl.float32)
    if shift_ptr is not None:
        low, high = tl.load(shift_ptr + 2 * pair), tl.load(shift_ptr + 2 * pair + 1)
    return word(low * part + zero, high * part + zero)


@triton.jit
def _factor_column(i, F: tl.constexpr, W: tl.constexpr):
    """The column of gate and up that word i of the factors is for.

    A warp loads 16 bytes a thread, thread by thread: spread as its input is, they would take twice the cache lines,
    and they are twice the input's bytes.
    """
    quarter, lane, half = i // 4 % 4, i // 16 % 8, i // 128 % 2
    warp, is_up, tile = i // 256 % W, i // (256 * W) % 2, i // (512 * W)
    return is_up * F + (tile * 4 + quarter) * (64 * W) + warp * 64 + lane * 8 + half * 4 + i % 4


@triton.jit
def silu_tables_kernel(
    shift_ptr,  # float32 [F] or None
    scale_ptr,  # float32 (1,)
    in_scale_ptr,  # float32 [2F] or None
    in_bias_ptr,  # float32 [2F] or None
    offsets_ptr,  # words [F / 2]: what `half_codes` adds
    factors_ptr,  # words [2F]: in_scale and in_bias, times _FACTOR, at places as `_factor_column` says
    F: tl.constexpr,
    W: tl.constexpr,  # warps of `silu_halves_kernel`
    BLOCK: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
):
    """What is the same for all rows, in float16: worth a kernel of its own where programs do several rows."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if in_scale_ptr is not None:
        mask = i < 2 * F
        column = _factor_column(i, F, W)
        bias = tl.zeros((BLOCK,), tl.float32)
        if in_bias_ptr is not None:
            bias = tl.load(in_bias_ptr + column, mask=mask, other=0.0)
        scale = tl.load(in_scale_ptr + column, mask=mask, other=0.0)
        tl.store(factors_ptr + i, word(scale * _FACTOR, bias * _FACTOR), mask=mask)
    offsets = _offsets(shift_ptr, tl.minimum(i, F // 2 - 1), tl.load(scale_ptr), LOW, HIGH)
    tl.store(offsets_ptr + i, offsets, mask=i < F // 2)


@triton.jit
def _load_factors(ptr, place):
    """The words of eight neighbours, in two loads, of which a warp's lie together."""
    first, second = tl.load(ptr + (place + tl.arange(0, 4))), tl.load(ptr + (place + 128 + tl.arange(0, 4)))
    return tl.reshape(tl.permute(tl.join(first, second), (0, 1, 2, 4, 3)), (4, 8, place.shape[2], 8))


@triton.jit
def _swiglu(gate, up, factors_ptr, place, divisor):
    """silu(gate) * up / divisor in float32 of what `load_tiles` gave; with factors the divisor has their square."""
    gate, up = widen(gate), widen(up)
    if factors_ptr is None:
        x = gate * sigmoid_over(gate, divisor) * up
    else:
        gate = times_plus(gate, _load_factors(factors_ptr, place))
        up = times_plus(up, _load_factors(factors_ptr + 256 * place.shape[2], place))
        x = gate * sigmoid_over(gate, divisor, 1 / _FACTOR) * up
    return x


@triton.jit
def _base_halves(base_ptr, K: tl.constexpr, BASE: tl.constexpr, FOLD: tl.constexpr, W: tl.constexpr):
    """The left operands: _ROWS rows each, column 16a + 4b + c being k = 4 (4a + c) + b."""
    column = tl.arange(0, 32)
    k = ((column // 16 * 4 + column % 4) * 4 + column // 4 % 4)[None, :]
    parts = ()
    for first in tl.static_range(0, 32, _ROWS):
        row = first + tl.arange(0, _ROWS)[:, None]
        base = hadamard_entry(base_ptr, row, k, (row < K) & (k < K), BASE, FOLD)
        parts = parts + (tl.broadcast_to(base[None], (W, _ROWS, 32)).to(tl.float16),)
    return parts


@triton.jit
def _load_offsets(
    ptr, scale, place, row, FIRST: tl.constexpr, K: tl.constexpr, LENGTH: tl.constexpr, W: tl.constexpr,
    SEVERAL: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    if K - FIRST < _ROWS:  # rows that do not exist read the last one
        place = tl.minimum(row, K - FIRST - 1) * (LENGTH // 2) + place % (LENGTH // 2)
    done = ()
    for w in tl.static_range(W):
        pair = place + (FIRST * LENGTH + w * 64) // 2
        if SEVERAL:
            done = done + (tl.load(ptr + pair),)
        else:
            done = done + (_offsets(ptr, pair, scale, LOW, HIGH),)
    return done


@triton.jit
def _store(
    y, offsets, scale, ptr, place, mask, W: tl.constexpr, UNIT: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr
):
    """Codes of words y, UNIT of them at each place."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    for w in tl.static_range(W):
        at = (place + w * 64) // UNIT  # written so that the compiler keeps to the layout of y
        if dtype == tl.float32:  # for tests
            low, high = halves(y[w])
            low_offset, high_offset = halves(offsets[w])
            low = ((low.to(tl.float32) + low_offset.to(tl.float32)) * (HIGH - LOW) - origin(LOW, HIGH)) * scale
            high = ((high.to(tl.float32) + high_offset.to(tl.float32)) * (HIGH - LOW) - origin(LOW, HIGH)) * scale
            tl.store(ptr + 2 * at, low, mask=mask)
            tl.store(ptr + (2 * at + 1), high, mask=mask)
        else:
            codes, signs = half_codes(y[w], offsets[w], dtype, LOW, HIGH)
            if UNIT == 2:
                four = four_codes(codes, codes, signs, signs, dtype, HIGH).to(tl.int16)
            else:
                codes = tl.split(tl.reshape(codes, (4, 8, W, codes.shape[3] // 2, 2)))
                signs = tl.split(tl.reshape(signs, (4, 8, W, signs.shape[3] // 2, 2)))
                four = four_codes(*codes, *signs, dtype, HIGH)
            tl.store(ptr.to(tl.pointer_type(four.dtype), bitcast=True) + at, four, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def silu_halves_kernel(
    gate_up_ptr,  # bfloat16 [M, 2F]
    factors_ptr,  # words [2F] of the tables for accumulators, or None
    base_ptr,  # float32 [BASE, BASE]
    scale_ptr,  # float32 (1,)
    offsets_ptr,  # words [F / 2] of the tables if SEVERAL, else the shift: float32 [F] or None
    codes_ptr,  # [M, F] int8, float8 or, for tests, float32
    rows,
    F: tl.constexpr,
    BASE: tl.constexpr,
    FOLD: tl.constexpr,  # K = BASE * FOLD, a multiple of 4, at most 32
    W: tl.constexpr,
    SPLIT: tl.constexpr,  # 2 or 4 parts of the eight j, that butterflies do
    EARLY: tl.constexpr,  # tiles of a row that are loaded before it begins
    SEVERAL: tl.constexpr,  # rows a program: tables are read, and the next row is fetched amid a row
    WAITS: tl.constexpr,  # launched early, see `early`; not if SEVERAL, for tables are made by the kernel in front
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
):
    K: tl.constexpr = BASE * FOLD
    LENGTH: tl.constexpr = 64 * W
    TILES: tl.constexpr = K // 4
    J: tl.constexpr = 8 // SPLIT
    N: tl.constexpr = 8 * J
    WIDTH: tl.constexpr = (HIGH - LOW) * F**0.5 * (1.0 if factors_ptr is None else _FACTOR * _FACTOR)
    scale = tl.load(scale_ptr)
    divisor = scale * WIDTH
    base = _base_halves(base_ptr, K, BASE, FOLD, W)
    n = tl.arange(0, N)  # rows and columns as in `silu_rows`
    place_in = n % 8 * 8 + n // 8
    place_out = n // 2 % 4 * 16 + n // (4 * J) * 8 + n // 8 % (J // 2) * 2 + n % 2
    walsh = walsh_sign(place_in[:, None], place_out[None, :]).to(tl.float16)
    walsh = tl.broadcast_to(walsh[None], (W, N, N))

    warp = tl.arange(0, W)[None, None, :, None]
    lane = tl.arange(0, 8)[None, :, None, None]
    quarter = tl.arange(0, 4)[:, None, None, None]
    place_in = quarter * LENGTH + warp * 64 + lane * 8
    factors_in = warp * 256 + (lane * 4 + quarter) * 4
    NEAR: tl.constexpr = 2 * _ROWS // W
    UNIT: tl.constexpr = 2 if codes_ptr.dtype.element_ty == tl.float32 else min(4, NEAR)  # codes stored as a word
    row_out = warp * (NEAR // 2) + lane // (16 // NEAR)
    near = lane % (16 // NEAR) * NEAR
    pair_out = row_out * (LENGTH // 2) + quarter * 8 + near // 2 + tl.arange(0, NEAR // 2)
    place_out = row_out * LENGTH + quarter * 16 + near + tl.arange(0, NEAR // UNIT) * UNIT
    begin = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0)
    if WAITS and offsets_ptr is not None:
        prefetch(offsets_ptr, 4 * F)
    wait(WAITS)
    early = load_tiles(gate_up_ptr + begin * (2 * F), place_in, 0, EARLY, F, K)
    for row in tl.range(begin, rows, step, num_stages=1):
        gate_ptr = gate_up_ptr + row * (2 * F)
        next_ptr = gate_up_ptr + tl.minimum(row + step, rows - 1) * (2 * F)
        h, even = (), tl.zeros((4, 8, W, 8), tl.float32)
        for tile in tl.static_range(TILES):
            place = factors_in + tile * (512 * W)
            if tile < EARLY:
                x = _swiglu(early[2 * tile], early[2 * tile + 1], factors_ptr, place, divisor)
            else:
                loaded = load_tiles(gate_ptr, place_in, tile, tile + 1, F, K)
                x = _swiglu(loaded[0], loaded[1], factors_ptr, place, divisor)
            if tile % 2 == 0:
                even = x
            if tile % 2 == 1 or tile == TILES - 1:
                x = word(even, x if tile % 2 == 1 else tl.zeros((4, 8, W, 8), tl.float32))
                x = tl.permute(tl.reshape(x, (4, 8, W, SPLIT, J)), (0, 1, 2, 4, 3))
                h = h + (half_butterflies(unstack(x, SPLIT), SPLIT),)
        if SEVERAL:
            prefetch(next_ptr, 2 * F * 2)

        based = ()
        for part in tl.static_range(SPLIT):
            x = ()
            for pair in tl.static_range(4):
                if 2 * pair < TILES:
                    x = x + halves(h[pair][part])
                else:
                    x = x + (tl.zeros((4, 8, W, J), tl.float16), tl.zeros((4, 8, W, J), tl.float16))
            x = tl.permute(tl.reshape(stack(x, 8), (4, 8, W, J, 2, 4)), (2, 4, 0, 5, 3, 1))
            x = tl.reshape(x, (W, 32, N))
            for half in tl.static_range(32 // _ROWS):
                based = based + (to_half(dot_half(base[half], x)),)

        for half in tl.static_range(32 // _ROWS):
            x = ()
            for part in tl.static_range(SPLIT):
                y = dot_half(based[part * (32 // _ROWS) + half], walsh)
                low, high = tl.split(tl.reshape(y, (W, _ROWS, N // 2, 2)))
                x = x + (tl.reshape(word(low, high), (W, _ROWS, N // 2, 1)),)
            # The lanes that the product gave to quarters keep them; then top of t, part, and rest of t
            y = tl.reshape(stack(x, SPLIT), (W, _ROWS, 2, J // 2, 4, 1, 2, SPLIT // 2))
            y = tl.permute(y, (4, 2, 6, 7, 3, 5, 1, 0))
            y = tl.reshape(y, (4, 16 // NEAR, NEAR // 2, W, NEAR // 2, W))
            y = tl.permute(y, (0, 4, 1, 3, 2, 5))
            y = unstack(tl.reshape(y, (4, 8, W, NEAR // 2, W)), W)
            if SEVERAL and half == 0:
                early = load_tiles(next_ptr, place_in, 0, EARLY, F, K)
            if half * _ROWS < K:
                y = half_butterflies(y, W)
                offsets = _load_offsets(
                    offsets_ptr, scale, pair_out, row_out, half * _ROWS, K, LENGTH, W, SEVERAL, LOW, HIGH
                )
                place = place_out + half * _ROWS * LENGTH
                mask = None
                if K - half * _ROWS < _ROWS:
                    mask = row_out < K - half * _ROWS
                _store(y, offsets, scale, codes_ptr + row * F, place, mask, W, UNIT, LOW, HIGH)


@dataclass(frozen=True)
class HalvesTiling(ManyRowsTiling):
    """That of `silu_halves_kernel`."""

    split: int = 2


_WARPS = 16  # of a multiprocessor: so many have 128 registers a thread
_BLOCK = 256  # elements of the tables


def choose_halves_tiling(features: int, base_order: int, raw: bool) -> HalvesTiling | None:
    """The tiling for many rows of F = features, of accumulators if raw; None for widths that it does not take."""
    rows = choose_rows_tiling(features, base_order)
    if rows is None or base_order * rows.fold % 4:
        return None
    # factors take registers too, which leaves none for the next row
    split, early = (4, 0) if raw else (2, 4)
    return HalvesTiling(rows.fold, rows.warps, split, early, programs=_WARPS // rows.warps)


def launch_halves(
    gate_up: Tensor,
    base: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    codes: Tensor,
    tiling: HalvesTiling,
    in_scale: Tensor | None,
    in_bias: Tensor | None,
    code_set: str,
) -> None:
    """Fills `codes` [M, F] from gate_up bfloat16 [M, 2F]; the others are as the op's."""
    rows, features = codes.shape
    assert features == base.shape[0] * tiling.fold * 64 * tiling.warps
    if gate_up.data_ptr() % 4:  # a view, whose bfloat16 are no whole words
        gate_up = gate_up.clone()
    low, high = code_range(4, code_set)
    alone = multiprocessors(gate_up.device)
    if rows <= alone:  # each with a multiprocessor, and all its registers, for itself
        tiling = replace(tiling, registers=None)
    programs = min(rows, tiling.programs * alone)
    several = rows > programs or in_scale is not None
    waits = not several and rows <= alone and launches_early(gate_up.device)
    offsets, factors = shift, None
    if several:
        elements = features // 2
        offsets = torch.empty(elements, dtype=torch.int32, device=gate_up.device)
        if in_scale is not None:
            elements = 2 * features
            factors = torch.empty(elements, dtype=torch.int32, device=gate_up.device)
        silu_tables_kernel[(triton.cdiv(elements, _BLOCK),)](
            shift, scale, in_scale, in_bias, offsets, factors, F=features, W=tiling.warps, BLOCK=_BLOCK, LOW=low,
            HIGH=high,
        )  # fmt: skip
    silu_halves_kernel[(programs,)](
        gate_up,
        factors,
        base,
        scale,
        offsets,
        codes,
        rows,
        F=features,
        BASE=base.shape[0],
        SEVERAL=several,
        WAITS=waits,
        LOW=low,
        HIGH=high,
        **tiling.options(),
        **launch_options(waits),
    )
