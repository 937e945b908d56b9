"""Kernel of pq_ao::rope_store: one launch for queries, keys and values.

For few tokens, and for those head dims that `rope_rows` does not take.

A program does BLOCK_T tokens of BLOCK_H heads of one kind. Heads are held in two halves, as RoPE pairs them and as
nibbles are packed, so neither moves data between threads; R3 is a product with a matrix made in registers.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from pq_ao.hadamard import has_hadamard_matrix
from pq_ao.ops.kernels.dynamic_scale import dynamic_scale
from pq_ao.ops.kernels.early import launch_options, launches_early, wait
from pq_ao.ops.kernels.hadamard import bf16_parts, hadamard_entry, times_matrix
from pq_ao.ops.kernels.prefetch import prefetch
from pq_ao.ops.kernels.raw_input import load_input
from pq_ao.ops.kernels.rope_parts import divide_and_round
from pq_ao.ops.kernels.rope_rows import RowsTiling, choose_rows_tiling, launch_rows
from pq_ao.ops.quantize import code_range


@triton.jit
def _load_halves(ptr, offsets, mask, HALF: tl.constexpr):
    first = tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return first, tl.load(ptr + offsets + HALF, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _normalize(first, second, weight_ptr, eps, d, D: tl.constexpr):
    """RMSNorm of each head; rounded to the model's dtype before and after the gain, as Qwen3 does."""
    dtype = weight_ptr.dtype.element_ty
    squares = tl.sum(first * first, axis=2, keep_dims=True) + tl.sum(second * second, axis=2, keep_dims=True)
    factor = tl.rsqrt(squares * (1.0 / D) + eps)
    weight_first, weight_second = _load_halves(weight_ptr, d, d < D // 2, D // 2)
    first = ((first * factor).to(dtype).to(tl.float32) * weight_first).to(dtype).to(tl.float32)
    second = ((second * factor).to(dtype).to(tl.float32) * weight_second).to(dtype).to(tl.float32)
    return first, second


@triton.jit
def _quadrant(base_ptr, first_in, first_out, D: tl.constexpr, BASE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows first_in.. and columns first_out.. of the transposed Hadamard matrix, D / 2 each."""
    i, j = tl.arange(0, BLOCK_D)[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask = (i < D // 2) & (j < D // 2)
    return bf16_parts(hadamard_entry(base_ptr, first_out + j, first_in + i, mask, BASE, D // BASE))


@triton.jit
def _hadamard(first, second, base_ptr, D: tl.constexpr, BASE: tl.constexpr, FLAT: tl.constexpr):
    """R3 of two halves [BLOCK_T, BLOCK_H, BLOCK_D]."""
    T: tl.constexpr = first.shape[0]
    H: tl.constexpr = first.shape[1]
    BLOCK_D: tl.constexpr = first.shape[2]
    first, second = tl.reshape(first, (T * H, BLOCK_D)), tl.reshape(second, (T * H, BLOCK_D))
    high, low = _quadrant(base_ptr, 0, 0, D, BASE, BLOCK_D)
    if BASE == 1:  # a Walsh matrix: one butterfly, then half the matrix for both halves
        sum_, difference = first + second, first - second
        first, second = times_matrix(sum_, high, low, True), times_matrix(difference, high, low, True)
    else:
        first_out, second_out = times_matrix(first, high, low, FLAT), tl.zeros_like(first)
        high, low = _quadrant(base_ptr, D // 2, 0, D, BASE, BLOCK_D)
        first_out += times_matrix(second, high, low, FLAT)
        high, low = _quadrant(base_ptr, 0, D // 2, D, BASE, BLOCK_D)
        second_out = times_matrix(first, high, low, FLAT)
        high, low = _quadrant(base_ptr, D // 2, D // 2, D, BASE, BLOCK_D)
        first, second = first_out, second_out + times_matrix(second, high, low, FLAT)
    norm: tl.constexpr = D**-0.5
    return tl.reshape(first * norm, (T, H, BLOCK_D)), tl.reshape(second * norm, (T, H, BLOCK_D))


@triton.jit
def _store(
    first, second, cache_ptr, token_scale_ptr, scale_ptr, clip_ptr, shift_ptr, row, has_slot, head, is_head, d,
    D: tl.constexpr, BITS: tl.constexpr, DYNAMIC: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """Quantizes two halves [BLOCK_T, BLOCK_H, BLOCK_D] and writes them at `row` [BLOCK_T, BLOCK_H, 1] of the cache."""
    HALF: tl.constexpr = D // 2
    mask = has_slot & (d < HALF)
    if BITS == 16:
        dtype = cache_ptr.dtype.element_ty
        tl.store(cache_ptr + row * D + d, first.to(dtype), mask=mask)
        tl.store(cache_ptr + row * D + HALF + d, second.to(dtype), mask=mask)
    else:
        if DYNAMIC:
            clip = tl.load(clip_ptr + head, mask=is_head, other=1.0)
        else:
            scale = tl.load(scale_ptr + head, mask=is_head, other=1.0)
        shift_first, shift_second = _load_halves(shift_ptr, head * D + d, is_head & (d < HALF), HALF)
        first, second = first - shift_first, second - shift_second
        if DYNAMIC:
            absmax = tl.maximum(
                tl.max(tl.abs(first), axis=2, keep_dims=True), tl.max(tl.abs(second), axis=2, keep_dims=True)
            )
            scale = dynamic_scale(absmax, clip, LOW, HIGH)
            tl.store(token_scale_ptr + row, scale, mask=has_slot)
        first, second = divide_and_round(first, scale, LOW, HIGH), divide_and_round(second, scale, LOW, HIGH)
        if BITS == 8:
            tl.store(cache_ptr + row * D + d, first.to(tl.int8), mask=mask)
            tl.store(cache_ptr + row * D + HALF + d, second.to(tl.int8), mask=mask)
        else:
            packed = (first - LOW) + 16.0 * (second - LOW)
            tl.store(cache_ptr + row * HALF + d, packed.to(tl.int32).to(tl.uint8), mask=mask)


# one token a sequence is worth a kernel of its own, other sizes are not
@triton.jit(do_not_specialize=["tokens", "slots", "table_rows"], do_not_specialize_on_alignment=["length"])
def rope_store_kernel(
    qkv_ptr,  # [B * L, (H + 2G) * D]
    in_scale_ptr,  # float32 [(H + 2G) * D] or None
    in_bias_ptr,  # the same
    cos_ptr,  # [B or 1, L, D]
    sin_ptr,
    base_ptr,  # float32 [BASE, BASE]
    query_norm_ptr,  # [D] or None
    key_norm_ptr,
    keys_ptr,  # [B, G, S, D / 2 or D]
    values_ptr,
    key_token_scale_ptr,  # float32 [B, G, S] if DYNAMIC
    value_token_scale_ptr,
    key_scale_ptr,  # float32 [G] unless DYNAMIC
    value_scale_ptr,
    key_clip_ptr,  # float32 [G] if DYNAMIC
    value_clip_ptr,
    key_shift_ptr,  # float32 [G, 1, D] unless BITS == 16
    value_shift_ptr,
    start_ptr,  # int64
    query_ptr,  # [B * L, H, D]
    tokens,  # B * L
    length,  # L
    slots,  # S
    table_rows,  # of cos and sin from batch to batch: L or 0
    eps,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BASE: tl.constexpr,  # order of the base of R3; 0 for no rotation
    FLAT: tl.constexpr,
    BITS: tl.constexpr,
    DYNAMIC: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,  # of half a head
    EARLY: tl.constexpr,
):
    HALF: tl.constexpr = D // 2
    QUERY_BLOCKS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    KEY_BLOCKS: tl.constexpr = (G + BLOCK_H - 1) // BLOCK_H
    BLOCKS: tl.constexpr = QUERY_BLOCKS + 2 * KEY_BLOCKS
    block = tl.program_id(0) % BLOCKS
    token = (tl.program_id(0) // BLOCKS).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    is_query, is_value = block < QUERY_BLOCKS, block >= QUERY_BLOCKS + KEY_BLOCKS
    block = block - tl.where(is_query, 0, tl.where(is_value, QUERY_BLOCKS + KEY_BLOCKS, QUERY_BLOCKS))
    head = block * BLOCK_H + tl.arange(0, BLOCK_H)[None, :, None]
    d = tl.arange(0, BLOCK_D)[None, None, :]
    is_head = head < tl.where(is_query, H, G)
    is_mine = (token < tokens) & is_head
    mask = is_mine & (d < HALF)
    batch = token // length
    place = token - batch * length
    if EARLY and BITS < 16:
        prefetch(key_shift_ptr, 4 * G * D, block, BLOCKS)
        prefetch(value_shift_ptr, 4 * G * D, block, BLOCKS)
        if not DYNAMIC:
            prefetch(key_scale_ptr, 4 * G)
            prefetch(value_scale_ptr, 4 * G)
    wait(EARLY)
    columns = (head + tl.where(is_query, 0, tl.where(is_value, H + G, H))) * D + d
    row_ptr = qkv_ptr + token * ((H + 2 * G) * D)
    first = load_input(row_ptr, columns, mask, in_scale_ptr, in_bias_ptr)
    second = load_input(row_ptr, columns + HALF, mask, in_scale_ptr, in_bias_ptr)
    slot = tl.load(start_ptr) + place
    row = (batch * G + head) * slots + slot
    has_slot = is_mine & (slot >= 0) & (slot < slots)
    if is_value:
        _store(
            first, second, values_ptr, value_token_scale_ptr, value_scale_ptr, value_clip_ptr, value_shift_ptr, row,
            has_slot, head, is_head, d, D, BITS, DYNAMIC, LOW, HIGH,
        )  # fmt: skip
    else:
        if query_norm_ptr is not None:
            if is_query:
                first, second = _normalize(first, second, query_norm_ptr, eps, d, D)
            else:
                first, second = _normalize(first, second, key_norm_ptr, eps, d, D)
        table = (batch * table_rows + place) * D + d
        table_mask = (token < tokens) & (d < HALF)
        cos_first, cos_second = _load_halves(cos_ptr, table, table_mask, HALF)
        sin_first, sin_second = _load_halves(sin_ptr, table, table_mask, HALF)
        turned = first * cos_first - second * sin_first
        second = second * cos_second + first * sin_second
        first = turned
        if BASE > 0:
            first, second = _hadamard(first, second, base_ptr, D, BASE, FLAT)
        if is_query:
            target = (token * H + head) * D + d
            tl.store(query_ptr + target, first.to(query_ptr.dtype.element_ty), mask=mask)
            tl.store(query_ptr + target + HALF, second.to(query_ptr.dtype.element_ty), mask=mask)
        else:
            _store(
                first, second, keys_ptr, key_token_scale_ptr, key_scale_ptr, key_clip_ptr, key_shift_ptr, row,
                has_slot, head, is_head, d, D, BITS, DYNAMIC, LOW, HIGH,
            )  # fmt: skip


@dataclass(frozen=True)
class Tiling:
    """Tokens and heads of a program: powers of two with a product of at least 16."""

    block_t: int
    block_h: int
    warps: int
    early: bool = False  # launched before the kernel in front has ended, where the GPU can


_ROWS_TOKENS = 32  # 3.3 us on an H200 where the kernel here takes 3.9
_FEW_TOKENS = 64
_EARLY_TOKENS = 8  # with more, waiting inside takes longer than being launched later


def choose_tiling(tokens: int, kv_heads: int, head_dim: int, order: int) -> Tiling | RowsTiling:
    """The tiling for B * L tokens; `order`: of R3's base, 0 for no R3."""
    if tokens >= _ROWS_TOKENS:
        tiling = choose_rows_tiling(tokens, kv_heads, head_dim, order)
        if tiling is not None:
            return tiling
    block_h = min(8, triton.next_power_of_2(kv_heads))
    if tokens <= _FEW_TOKENS:
        return Tiling(16 // block_h, block_h, 4, early=tokens <= _EARLY_TOKENS)
    rows = 64 if head_dim <= 128 else 32
    return Tiling(rows // block_h, block_h, 4)


def launch(
    qkv: Tensor, cos: Tensor, sin: Tensor, base: Tensor | None, query_norm: Tensor | None, key_norm: Tensor | None,
    norm_eps: float, keys: Tensor, values: Tensor, key_token_scale: Tensor | None, value_token_scale: Tensor | None,
    key_scale: Tensor | None, value_scale: Tensor | None, key_clip: Tensor | None, value_clip: Tensor | None,
    key_shift: Tensor | None, value_shift: Tensor | None, start: Tensor, query: Tensor, bits: int,
    tiling: Tiling | RowsTiling | None = None, in_scale: Tensor | None = None, in_bias: Tensor | None = None,
) -> None:  # fmt: skip
    """Fills `query` [B, L, H, D] and the cache; all tensors contiguous, `tiling` overrides the choice made here."""
    batch, length, heads, head_dim = query.shape
    groups, tokens = keys.shape[1], batch * length
    if tokens == 0:
        return
    order = 0 if base is None else base.shape[0]
    tiling = tiling or choose_tiling(tokens, groups, head_dim, order)
    low, high = code_range(min(bits, 8))
    tensors = (
        query_norm, key_norm, keys, values, key_token_scale, value_token_scale, key_scale, value_scale, key_clip,
        value_clip, key_shift, value_shift, start, query,
    )  # fmt: skip
    numbers = (tokens, length, keys.shape[2], length if cos.shape[0] > 1 else 0, norm_eps)
    constants = {
        "H": heads, "G": groups, "D": head_dim, "BITS": bits,
        "DYNAMIC": key_token_scale is not None, "LOW": low, "HIGH": high,
    }  # fmt: skip
    if isinstance(tiling, RowsTiling):
        launch_rows((qkv, in_scale, in_bias, cos, sin, *tensors), numbers, tiling, base is not None, constants)
        return
    blocks = triton.cdiv(heads, tiling.block_h) + 2 * triton.cdiv(groups, tiling.block_h)
    early = tiling.early and launches_early(qkv.device)
    rope_store_kernel[(triton.cdiv(tokens, tiling.block_t) * blocks,)](
        qkv, in_scale, in_bias, cos, sin, base, *tensors, *numbers, **constants,
        BASE=order, FLAT=order == 0 or has_hadamard_matrix(order), BLOCK_T=tiling.block_t, BLOCK_H=tiling.block_h,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim // 2)), EARLY=early, num_warps=tiling.warps,
        # a fused multiply-add in RoPE or before a quantizer would give other last bits than the reference
        enable_fp_fusion=False, **launch_options(early),
    )  # fmt: skip
