"""What a decode step does beside its walk over the cache: the prefix, and the sum of all programs' parts.

A part is a maximum and a sum of exponentials a row, and a result not yet divided by the sum. Parts of one KV head lie
together in scratch memory: [parts, 2, ROWS] maxima and sums, then [parts, ROWS, E] results; E as in decode_attention.
Scores count in units of `score_gain`, results in units of `value_gain`: those of the codes.
"""

import triton
import triton.language as tl

from pq_ao.ops.kernels.interpret import quantize
from pq_ao.ops.kernels.widen import plane_column

# Scores of hidden slots, and the lowest maximum that softmax may start from: the one far below the other, so that
# hidden slots weigh nothing even where nothing else is seen.
HIDDEN = tl.constexpr(-1e30)
LOWEST = tl.constexpr(-5e29)


@triton.jit
def prefix_part(
    query_ptr, prefix_key_ptr, prefix_value_ptr, key_shift_ptr, value_shift_ptr, scratch_ptr, score_gain, prefix_gain,
    value_gain, prefix_len, parts, part, group, stride_l, stride_h,
    ROWS: tl.constexpr, ROWS_PADDED: tl.constexpr, REPEAT: tl.constexpr, HEAD_DIM: tl.constexpr,
    PLANES: tl.constexpr, WORDS: tl.constexpr, WORDS_PADDED: tl.constexpr, BITS: tl.constexpr,
    PREFIX_TILE: tl.constexpr,
):  # fmt: skip
    """Attention over the prefix, in float32 throughout, as one more part."""
    E: tl.constexpr = PLANES * WORDS_PADDED
    place = tl.arange(0, E)
    column = plane_column(place % WORDS_PADDED, place // WORDS_PADDED, PLANES, BITS, (HEAD_DIM + 1) // 2)
    is_column = (place % WORDS_PADDED < WORDS) & (column < HEAD_DIM)
    row = tl.arange(0, ROWS_PADDED)
    head = group * REPEAT + row % REPEAT
    m_R = tl.full([ROWS_PADDED], LOWEST, tl.float32)
    l_R = tl.zeros([ROWS_PADDED], tl.float32)
    acc_RE = tl.zeros([ROWS_PADDED, E], tl.float32)
    offset_RE = (row // REPEAT)[:, None] * stride_l + head[:, None] * stride_h + column[None, :]
    query_RE = tl.load(query_ptr + offset_RE, mask=(row < ROWS)[:, None] & is_column[None, :], other=0.0).to(tl.float32)
    key_shift_E = tl.zeros([E], tl.float32)
    value_shift_E = tl.zeros([E], tl.float32)
    if key_shift_ptr is not None:
        key_shift_E = tl.load(key_shift_ptr + group * HEAD_DIM + column, mask=is_column, other=0.0)
    if value_shift_ptr is not None:
        value_shift_E = tl.load(value_shift_ptr + group * HEAD_DIM + column, mask=is_column, other=0.0)
    for first in range(0, prefix_len, PREFIX_TILE):
        token = first + tl.arange(0, PREFIX_TILE)
        is_token = token < prefix_len
        offset_PE = (group * prefix_len + token)[:, None] * HEAD_DIM + column[None, :]
        is_there = is_token[:, None] & is_column[None, :]
        key_PE = tl.load(prefix_key_ptr + offset_PE, mask=is_there, other=0.0).to(tl.float32) - key_shift_E[None, :]
        value_PE = tl.load(prefix_value_ptr + offset_PE, mask=is_there, other=0.0).to(tl.float32)
        value_PE -= value_shift_E[None, :]
        score_RP = tl.sum(query_RE[:, None, :] * key_PE[None, :, :], 2) * prefix_gain
        score_RP = tl.where(is_token[None, :], score_RP, HIDDEN)
        new_m_R = tl.maximum(m_R, tl.max(score_RP, 1))
        share_RP = tl.exp2((score_RP - new_m_R[:, None]) * score_gain)
        decay_R = tl.exp2((m_R - new_m_R) * score_gain)
        l_R = l_R * decay_R + tl.sum(share_RP, 1)
        acc_RE = acc_RE * decay_R[:, None] + tl.sum(share_RP[:, :, None] * value_PE[None, :, :], 1)
        m_R = new_m_R
    tl.store(scratch_ptr + part * (2 * ROWS) + row, m_R, mask=row < ROWS)
    tl.store(scratch_ptr + part * (2 * ROWS) + ROWS + row, l_R, mask=row < ROWS)
    part_RE = parts * (2 * ROWS) + part * (ROWS * E) + row[:, None] * E + place[None, :]
    tl.store(scratch_ptr + part_RE, acc_RE / value_gain, mask=(row < ROWS)[:, None])


@triton.jit
def finish(
    value_shift_ptr, scratch_ptr, out_scale_ptr, out_shift_ptr, out_ptr, score_gain, value_gain, parts, group,
    ROWS: tl.constexpr, ROWS_PADDED: tl.constexpr, REPEAT: tl.constexpr, HEAD_DIM: tl.constexpr,
    PLANES: tl.constexpr, WORDS: tl.constexpr, WORDS_PADDED: tl.constexpr, HEADS: tl.constexpr, BITS: tl.constexpr,
    PARTS_PADDED: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """Sums the parts of one KV head and stores the (quantized) output."""
    E: tl.constexpr = PLANES * WORDS_PADDED
    place = tl.arange(0, E)
    column = plane_column(place % WORDS_PADDED, place // WORDS_PADDED, PLANES, BITS, (HEAD_DIM + 1) // 2)
    is_column = (place % WORDS_PADDED < WORDS) & (column < HEAD_DIM)
    row = tl.arange(0, ROWS_PADDED)
    is_row = row < ROWS
    head = group * REPEAT + row % REPEAT
    is_cell = is_row[:, None] & is_column[None, :]

    # written by other multiprocessors, so read past the first-level cache
    part = tl.arange(0, PARTS_PADDED)
    is_part_TR = (part < parts)[:, None] & is_row[None, :]
    m_ptr = scratch_ptr + part[:, None] * (2 * ROWS) + row[None, :]
    m_TR = tl.load(m_ptr, mask=is_part_TR, other=LOWEST, cache_modifier=".cg")
    l_TR = tl.load(m_ptr + ROWS, mask=is_part_TR, other=0.0, cache_modifier=".cg")
    m_R = tl.max(m_TR, 0)
    l_R = tl.sum(l_TR * tl.exp2((m_TR - m_R[None, :]) * score_gain), 0)
    acc_RE = tl.zeros([ROWS_PADDED, E], tl.float32)
    TOGETHER: tl.constexpr = PARTS_PADDED if PARTS_PADDED < 8 else 8
    for first in range(0, parts, TOGETHER):
        some = first + tl.arange(0, TOGETHER)
        is_some_TR = (some < parts)[:, None] & is_row[None, :]
        some_m_ptr = scratch_ptr + some[:, None] * (2 * ROWS) + row[None, :]
        some_m_TR = tl.load(some_m_ptr, mask=is_some_TR, other=LOWEST, cache_modifier=".cg")
        gain_TR = tl.exp2((some_m_TR - m_R[None, :]) * score_gain) * value_gain
        offset_TRE = some[:, None, None] * (ROWS * E) + row[None, :, None] * E + place[None, None, :]
        acc_ptr = scratch_ptr + parts * (2 * ROWS) + offset_TRE
        acc_TRE = tl.load(acc_ptr, mask=is_some_TR[:, :, None], other=0.0, cache_modifier=".cg")
        acc_RE += tl.sum(acc_TRE * gain_TR[:, :, None], 0)

    out_RE = acc_RE / tl.where(l_R > 0, l_R, 1.0)[:, None]  # zeros where nothing is seen
    if value_shift_ptr is not None:
        out_RE += tl.load(value_shift_ptr + group * HEAD_DIM + column, mask=is_column, other=0.0)[None, :]
    out_offset_RE = head[:, None] * HEAD_DIM + column[None, :]
    if out_scale_ptr is not None:
        if out_shift_ptr is not None:
            out_RE -= tl.load(out_shift_ptr + out_offset_RE, mask=is_cell, other=0.0)
        out_RE = quantize(out_RE, tl.load(out_scale_ptr), LOW, HIGH)
    out_offset_RE += (row // REPEAT)[:, None] * (HEADS * HEAD_DIM)
    tl.store(out_ptr + out_offset_RE, out_RE.to(out_ptr.dtype.element_ty), mask=is_cell)
