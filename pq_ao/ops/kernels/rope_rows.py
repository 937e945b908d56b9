"""rope_store for many tokens and head dims that are powers of two: all in registers, none through shared memory.

A head is held as D / 32 pieces of 32 elements, a thread having eight neighbours of each. RoPE, nibbles and the upper
part of R3 go from piece to piece, that is, within a thread. The lower part is a product with a Walsh matrix of 32,
whose rows and columns are in the order in which the tensor core finds and leaves the elements of a thread.

A tensor is [4, 8, WARPS, REPEAT, 8]: lane, lane, warp, and what a thread holds; dims 1 to 3 are heads of tokens.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from pq_ao.ops.kernels.codes import ROUNDER
from pq_ao.ops.kernels.dynamic_scale import dynamic_scale
from pq_ao.ops.kernels.early import launch_options, launches_early, wait
from pq_ao.ops.kernels.hadamard import bf16_parts, butterflies, dot_bf16, small_walsh
from pq_ao.ops.kernels.rope_parts import divide_and_round


@triton.jit
def _piece_places(PIECE: tl.constexpr, element: tl.constexpr):
    """Offsets of a piece's elements in a head, [4, 1, 1, 1, parts, elements]: 16 bytes a thread and load at most."""
    PART: tl.constexpr = 4 if element.primitive_bitwidth == 32 else 8
    lane = tl.arange(0, 4)[:, None, None, None, None, None] * 8 + 32 * PIECE
    return lane + tl.arange(0, 8 // PART)[None, None, None, None, :, None] * PART + tl.arange(0, PART)


@triton.jit
def _load_piece(ptr, place, mask, PIECE: tl.constexpr):
    """float32 piece of what begins at `place` [1, 8, WARPS, REPEAT or 1, 1]; the mask is alike."""
    places = tl.expand_dims(place, 5) + _piece_places(PIECE, ptr.dtype.element_ty)
    x = tl.load(ptr + places, mask=tl.expand_dims(mask, 5), other=0.0).to(tl.float32)
    return tl.reshape(x, (4, 8, place.shape[2], place.shape[3], 8))


@triton.jit
def _load_head(ptr, row, column, mask, is_head, in_scale_ptr, in_bias_ptr, D: tl.constexpr):
    """Heads that begin at `column` [1, 8, WARPS, 1, 1] of rows, of a linear's output or its accumulators."""
    pieces = ()
    for piece in tl.static_range(D // 32):
        x = _load_piece(ptr, row + column, mask, piece)
        if in_scale_ptr is not None:
            x = x * _load_piece(in_scale_ptr, column, is_head, piece)
            if in_bias_ptr is not None:
                x += _load_piece(in_bias_ptr, column, is_head, piece)
        pieces = pieces + (x,)
    return pieces


@triton.jit
def _normalize(x, weight_ptr, eps, zero, D: tl.constexpr):
    """RMSNorm of each head; rounded to the model's dtype before and after the gain, as Qwen3 does."""
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    squares = 0.0
    for piece in tl.static_range(D // 32):
        squares += tl.sum(tl.sum(x[piece] * x[piece], axis=4, keep_dims=True), axis=0, keep_dims=True)
    factor = tl.rsqrt(squares * (1.0 / D) + eps)
    done = ()
    for piece in tl.static_range(D // 32):
        weight = _load_piece(weight_ptr, zero, zero == 0, piece)
        y = (x[piece] * factor).to(dtype).to(tl.float32) * weight
        done = done + (y.to(dtype).to(tl.float32),)
    return done


@triton.jit
def _turn(x, cos_ptr, sin_ptr, table, mask, D: tl.constexpr):
    """RoPE: pieces half a head apart."""
    HALF: tl.constexpr = D // 64
    first, second = (), ()
    for piece in tl.static_range(HALF):
        cos, sin = _load_piece(cos_ptr, table, mask, piece), _load_piece(sin_ptr, table, mask, piece)
        first = first + (x[piece] * cos - x[piece + HALF] * sin,)
        cos, sin = _load_piece(cos_ptr, table, mask, piece + HALF), _load_piece(sin_ptr, table, mask, piece + HALF)
        second = second + (x[piece + HALF] * cos + x[piece] * sin,)
    return first + second


@triton.jit
def _walsh(WARPS: tl.constexpr):
    """[WARPS, 32, 32]: operand 8a + 2b + c of a product is element 8b + 2a + c of a piece, and so is a result."""
    i = tl.arange(0, 32)
    place = i // 2 % 4 * 8 + i // 8 * 2 + i % 2
    return tl.broadcast_to(small_walsh(place[:, None], place[None, :])[None], (WARPS, 32, 32))


@triton.jit
def _hadamard(x, D: tl.constexpr):
    """R3."""
    WARPS: tl.constexpr = x[0].shape[2]
    REPEAT: tl.constexpr = x[0].shape[3]
    norm: tl.constexpr = D**-0.5
    walsh = _walsh(WARPS)
    x = butterflies(x, 0, D // 32, 1)
    done = ()
    for piece in tl.static_range(D // 32):
        y = tl.permute(tl.reshape(x[piece], (4, 8, WARPS, REPEAT, 4, 2)), (2, 3, 1, 4, 0, 5))
        high, low = bf16_parts(tl.reshape(y, (WARPS, REPEAT * 8, 32)))
        y = dot_bf16(high, walsh, dot_bf16(low, walsh, tl.zeros((WARPS, REPEAT * 8, 32), tl.float32)))
        y = tl.permute(tl.reshape(y, (WARPS, REPEAT, 8, 4, 4, 2)), (4, 2, 0, 1, 3, 5))
        done = done + (tl.reshape(y, (4, 8, WARPS, REPEAT, 8)) * norm,)
    return done


@triton.jit
def _store_head(x, ptr, rows, mask, COUNT: tl.constexpr):
    d = tl.arange(0, 4)[:, None, None, None, None] * 8 + tl.arange(0, 8)
    for piece in tl.static_range(COUNT):
        y = x[piece]
        if ptr.dtype.element_ty.primitive_bitwidth == 8:
            y = (y + ROUNDER).to(tl.int32, bitcast=True)
        tl.store(ptr + rows + 32 * piece + d, y.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store(
    x, cache_ptr, token_scale_ptr, scale_ptr, clip_ptr, shift_ptr, row, has_slot, head, is_head,
    D: tl.constexpr, BITS: tl.constexpr, DYNAMIC: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """Quantizes heads and writes them at `row` [1, 8, WARPS, REPEAT, 1] of the cache."""
    PIECES: tl.constexpr = D // 32
    if BITS == 16:
        _store_head(x, cache_ptr, row * D, has_slot, PIECES)
    else:
        if DYNAMIC:
            absmax = 0.0
            shifted = ()
            for piece in tl.static_range(PIECES):
                y = x[piece] - _load_piece(shift_ptr, head * D, is_head, piece)
                absmax = tl.maximum(absmax, tl.max(tl.max(tl.abs(y), axis=4, keep_dims=True), axis=0, keep_dims=True))
                shifted = shifted + (y,)
            x = shifted
            scale = dynamic_scale(absmax, tl.load(clip_ptr + head, mask=is_head, other=1.0), LOW, HIGH)
            tl.store(token_scale_ptr + row, scale, mask=has_slot)
        else:
            scale = tl.load(scale_ptr + head, mask=is_head, other=1.0)
        codes = ()
        for piece in tl.static_range(PIECES):
            y = x[piece]
            if not DYNAMIC:
                y -= _load_piece(shift_ptr, head * D, is_head, piece)
            codes = codes + (divide_and_round(y, scale, LOW, HIGH),)
        if BITS == 8:
            _store_head(codes, cache_ptr, row * D, has_slot, PIECES)
        else:
            packed = ()
            for piece in tl.static_range(PIECES // 2):
                packed = packed + ((codes[piece] - LOW) + 16.0 * (codes[piece + PIECES // 2] - LOW),)
            _store_head(packed, cache_ptr, row * (D // 2), has_slot, PIECES // 2)


@triton.jit(do_not_specialize=["tokens", "slots", "table_rows"], do_not_specialize_on_alignment=["length"])
def rope_rows_kernel(
    qkv_ptr, in_scale_ptr, in_bias_ptr, cos_ptr, sin_ptr, query_norm_ptr, key_norm_ptr, keys_ptr, values_ptr,
    key_token_scale_ptr, value_token_scale_ptr, key_scale_ptr, value_scale_ptr, key_clip_ptr, value_clip_ptr,
    key_shift_ptr, value_shift_ptr, start_ptr, query_ptr, tokens, length, slots, table_rows, eps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROTATION: tl.constexpr,
    BITS: tl.constexpr, DYNAMIC: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    BLOCK_H: tl.constexpr, WARPS: tl.constexpr, REPEAT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """As rope_store_kernel, whose arguments these are. A program does 8 * WARPS * REPEAT heads."""
    BLOCK_T: tl.constexpr = 8 * WARPS * REPEAT // BLOCK_H
    QUERY_BLOCKS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    KEY_BLOCKS: tl.constexpr = (G + BLOCK_H - 1) // BLOCK_H
    BLOCKS: tl.constexpr = QUERY_BLOCKS + 2 * KEY_BLOCKS
    block = tl.program_id(0) % BLOCKS
    is_query, is_value = block < QUERY_BLOCKS, block >= QUERY_BLOCKS + KEY_BLOCKS
    block = block - tl.where(is_query, 0, tl.where(is_value, QUERY_BLOCKS + KEY_BLOCKS, QUERY_BLOCKS))
    lane = tl.arange(0, 8)[None, :, None, None, None]
    warp = tl.arange(0, WARPS)[None, None, :, None, None]
    index = (tl.arange(0, REPEAT)[None, None, None, :, None] * WARPS + warp) * 8 + lane
    # all tokens of a thread have one head, so that what belongs to it is loaded once
    head = block * BLOCK_H + lane % BLOCK_H + warp * 0
    is_head = head < tl.where(is_query, H, G)
    column = (head + tl.where(is_query, 0, tl.where(is_value, H + G, H))) * D
    zero = lane * 0 + warp * 0
    token = tl.program_id(0) // BLOCKS * BLOCK_T + index // BLOCK_H
    is_token = token < tokens
    mask = is_token & is_head
    batch = token // length
    place = token - batch * length
    first = token.to(tl.int64) * ((H + 2 * G) * D)
    wait(EARLY)
    x = _load_head(qkv_ptr, first, column, mask, is_head, in_scale_ptr, in_bias_ptr, D)
    slot = tl.load(start_ptr) + place
    row = (batch * G + head).to(tl.int64) * slots + slot
    has_slot = mask & (slot >= 0) & (slot < slots)
    if is_value:
        _store(
            x, values_ptr, value_token_scale_ptr, value_scale_ptr, value_clip_ptr, value_shift_ptr, row, has_slot,
            head, is_head, D, BITS, DYNAMIC, LOW, HIGH,
        )  # fmt: skip
    else:
        if query_norm_ptr is not None:
            if is_query:
                x = _normalize(x, query_norm_ptr, eps, zero, D)
            else:
                x = _normalize(x, key_norm_ptr, eps, zero, D)
        x = _turn(x, cos_ptr, sin_ptr, (batch * table_rows + place).to(tl.int64) * D, is_token, D)
        if ROTATION:
            x = _hadamard(x, D)
        if is_query:
            _store_head(x, query_ptr, (token.to(tl.int64) * H + head) * D, mask, D // 32)
        else:
            _store(
                x, keys_ptr, key_token_scale_ptr, key_scale_ptr, key_clip_ptr, key_shift_ptr, row, has_slot, head,
                is_head, D, BITS, DYNAMIC, LOW, HIGH,
            )  # fmt: skip


@dataclass(frozen=True)
class RowsTiling:
    """A program does 8 * warps * repeat heads, block_h of a token; a thread has parts of `repeat` heads.

    early: launched before the kernel in front has ended, where the GPU can.
    """

    block_h: int
    warps: int
    repeat: int = 2
    early: bool = False


_MOST_APART = 512  # tokens: with more, two heads a thread still leave every multiprocessor some programs
_HEAD_DIMS = (64, 128)


def choose_rows_tiling(tokens: int, kv_heads: int, head_dim: int, order: int) -> RowsTiling | None:
    """The tiling for many tokens; None for heads that this kernel does not take. `order`: of R3's base, 0 for no R3."""
    if order > 1 or head_dim not in _HEAD_DIMS:
        return None
    block_h = min(8, triton.next_power_of_2(kv_heads))
    return RowsTiling(block_h, 4, repeat=1, early=True) if tokens <= _MOST_APART else RowsTiling(block_h, 4)


def launch_rows(
    tensors: tuple[Tensor | None, ...], numbers: tuple[int | float, ...], tiling: RowsTiling, rotation: bool,
    constants: dict[str, object],
) -> None:  # fmt: skip
    """Runs the kernel on its tensors and numbers."""
    blocks = triton.cdiv(constants["H"], tiling.block_h) + 2 * triton.cdiv(constants["G"], tiling.block_h)
    block_t = 8 * tiling.warps * tiling.repeat // tiling.block_h
    early = tiling.early and launches_early(tensors[0].device)
    rope_rows_kernel[(triton.cdiv(numbers[0], block_t) * blocks,)](
        *tensors, *numbers, **constants, ROTATION=rotation, BLOCK_H=tiling.block_h, WARPS=tiling.warps,
        REPEAT=tiling.repeat, num_warps=tiling.warps, enable_fp_fusion=False, EARLY=early, **launch_options(early),
    )  # fmt: skip
