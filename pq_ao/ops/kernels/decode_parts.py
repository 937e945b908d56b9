"""What a decode step does beside its walk over the cache: the prefix, and the sum of all programs' parts.

A part is a maximum and a sum of exponentials a row, and a result not yet divided by the sum. Parts of one KV head lie
together in scratch memory: [parts, 2, ROWS] maxima and sums, then [parts, ROWS, D] results.
Scores count in units of `score_gain`, results in units of `value_gain`: those of the codes.

Shape suffixes: R rows (query x query head), P prefix tokens of a tile, T parts, D head dim (padded).
"""

import triton
import triton.language as tl

from pq_ao.ops.kernels.interpret import quantize

# Scores of hidden slots, and the lowest maximum that softmax may start from: the one far below the other, so that
# hidden slots weigh nothing even where nothing else is seen.
HIDDEN = tl.constexpr(-1e30)
LOWEST = tl.constexpr(-5e29)

# Probabilities times scales of values go through fp16: 64 keeps a scale of 1e-4 a normal number.
VALUE_GAIN = tl.constexpr(64.0)


@triton.jit
def prefix_part(
    query_ptr, prefix_key_ptr, prefix_value_ptr, key_shift_ptr, value_shift_ptr, scratch_ptr, score_gain, prefix_gain,
    value_gain, prefix_len, parts, part, group, stride_l, stride_h,
    ROWS: tl.constexpr, ROWS_PADDED: tl.constexpr, REPEAT: tl.constexpr, HEAD_DIM: tl.constexpr,
    PREFIX_TILE: tl.constexpr,
):  # fmt: skip
    """Attention over the prefix, in float32 throughout, as one more part."""
    D: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    dim = tl.arange(0, D)
    is_dim = dim < HEAD_DIM
    row = tl.arange(0, ROWS_PADDED)
    head = group * REPEAT + row % REPEAT
    m_R = tl.full([ROWS_PADDED], LOWEST, tl.float32)
    l_R = tl.zeros([ROWS_PADDED], tl.float32)
    acc_RD = tl.zeros([ROWS_PADDED, D], tl.float32)
    offset_RD = (row // REPEAT)[:, None] * stride_l + head[:, None] * stride_h + dim[None, :]
    query_RD = tl.load(query_ptr + offset_RD, mask=(row < ROWS)[:, None] & is_dim[None, :], other=0.0).to(tl.float32)
    key_shift_D = tl.zeros([D], tl.float32)
    value_shift_D = tl.zeros([D], tl.float32)
    if key_shift_ptr is not None:
        key_shift_D = tl.load(key_shift_ptr + group * HEAD_DIM + dim, mask=is_dim, other=0.0)
    if value_shift_ptr is not None:
        value_shift_D = tl.load(value_shift_ptr + group * HEAD_DIM + dim, mask=is_dim, other=0.0)
    for first in range(0, prefix_len, PREFIX_TILE):
        token = first + tl.arange(0, PREFIX_TILE)
        is_token = token < prefix_len
        offset_PD = (group * prefix_len + token)[:, None] * HEAD_DIM + dim[None, :]
        is_there = is_token[:, None] & is_dim[None, :]
        key_PD = tl.load(prefix_key_ptr + offset_PD, mask=is_there, other=0.0).to(tl.float32) - key_shift_D[None, :]
        value_PD = tl.load(prefix_value_ptr + offset_PD, mask=is_there, other=0.0).to(tl.float32)
        value_PD -= value_shift_D[None, :]
        score_RP = tl.sum(query_RD[:, None, :] * key_PD[None, :, :], 2) * prefix_gain
        score_RP = tl.where(is_token[None, :], score_RP, HIDDEN)
        new_m_R = tl.maximum(m_R, tl.max(score_RP, 1))
        share_RP = tl.exp2((score_RP - new_m_R[:, None]) * score_gain)
        decay_R = tl.exp2((m_R - new_m_R) * score_gain)
        l_R = l_R * decay_R + tl.sum(share_RP, 1)
        acc_RD = acc_RD * decay_R[:, None] + tl.sum(share_RP[:, :, None] * value_PD[None, :, :], 1)
        m_R = new_m_R
    acc_RD *= 1.0 / value_gain
    write_part(scratch_ptr, m_R, l_R, acc_RD, parts, part, ROWS, HEAD_DIM)


@triton.jit
def write_part(scratch_ptr, m_R, l_R, acc_RD, parts, part, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """One part to scratch memory."""
    row = tl.arange(0, acc_RD.shape[0])
    dim = tl.arange(0, acc_RD.shape[1])
    tl.store(scratch_ptr + part * (2 * ROWS) + row, m_R, mask=row < ROWS)
    tl.store(scratch_ptr + part * (2 * ROWS) + ROWS + row, l_R, mask=row < ROWS)
    cell_RD = parts * (2 * ROWS) + part * (ROWS * HEAD_DIM) + row[:, None] * HEAD_DIM + dim[None, :]
    tl.store(scratch_ptr + cell_RD, acc_RD, mask=(row < ROWS)[:, None] & (dim < HEAD_DIM)[None, :])


@triton.jit
def finish(
    value_shift_ptr, scratch_ptr, out_scale_ptr, out_shift_ptr, out_ptr, score_gain, value_gain, parts, group,
    ROWS: tl.constexpr, ROWS_PADDED: tl.constexpr, REPEAT: tl.constexpr, HEAD_DIM: tl.constexpr, HEADS: tl.constexpr,
    PARTS_PADDED: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """Sums the parts of one KV head and stores the (quantized) output."""
    D: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    dim = tl.arange(0, D)
    row = tl.arange(0, ROWS_PADDED)
    is_row = row < ROWS

    # written by other multiprocessors, so read past the first-level cache
    part = tl.arange(0, PARTS_PADDED)
    is_part_TR = (part < parts)[:, None] & is_row[None, :]
    m_ptr = scratch_ptr + part[:, None] * (2 * ROWS) + row[None, :]
    m_TR = tl.load(m_ptr, mask=is_part_TR, other=LOWEST, cache_modifier=".cg")
    l_TR = tl.load(m_ptr + ROWS, mask=is_part_TR, other=0.0, cache_modifier=".cg")
    m_R = tl.max(m_TR, 0)
    l_R = tl.sum(l_TR * tl.exp2((m_TR - m_R[None, :]) * score_gain), 0)
    acc_RD = tl.zeros([ROWS_PADDED, D], tl.float32)
    TOGETHER: tl.constexpr = PARTS_PADDED if PARTS_PADDED * ROWS_PADDED < 32 else 32 // ROWS_PADDED
    for first in tl.range(0, parts, TOGETHER, num_stages=1):
        some = first + tl.arange(0, TOGETHER)
        is_some_TR = (some < parts)[:, None] & is_row[None, :]
        some_m_ptr = scratch_ptr + some[:, None] * (2 * ROWS) + row[None, :]
        some_m_TR = tl.load(some_m_ptr, mask=is_some_TR, other=LOWEST, cache_modifier=".cg")
        cell_TRD = some[:, None, None] * (ROWS * HEAD_DIM) + row[None, :, None] * HEAD_DIM + dim[None, None, :]
        acc_ptr = scratch_ptr + parts * (2 * ROWS) + cell_TRD
        is_cell_TRD = is_some_TR[:, :, None] & (dim < HEAD_DIM)[None, None, :]
        acc_TRD = tl.load(acc_ptr, mask=is_cell_TRD, other=0.0, cache_modifier=".cg")
        gain_TR = tl.exp2((some_m_TR - m_R[None, :]) * score_gain)
        acc_RD += tl.sum(acc_TRD * gain_TR[:, :, None], 0)
    store_out(value_shift_ptr, out_scale_ptr, out_shift_ptr, out_ptr, l_R, acc_RD, value_gain, group, ROWS, REPEAT,
              HEAD_DIM, HEADS, LOW, HIGH)  # fmt: skip


@triton.jit
def store_out(
    value_shift_ptr, out_scale_ptr, out_shift_ptr, out_ptr, l_R, acc_RD, value_gain, group, ROWS: tl.constexpr,
    REPEAT: tl.constexpr, HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """The output of one KV head, quantized where it has a scale."""
    dim = tl.arange(0, acc_RD.shape[1])
    row = tl.arange(0, acc_RD.shape[0])
    is_cell_RD = (row < ROWS)[:, None] & (dim < HEAD_DIM)[None, :]
    out_RD = acc_RD * (value_gain / tl.where(l_R > 0, l_R, 1.0))[:, None]  # zeros where nothing is seen
    if value_shift_ptr is not None:
        out_RD += tl.load(value_shift_ptr + group * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0)[None, :]
    cell_RD = (group * REPEAT + row % REPEAT)[:, None] * HEAD_DIM + dim[None, :]
    if out_scale_ptr is not None:
        if out_shift_ptr is not None:
            out_RD -= tl.load(out_shift_ptr + cell_RD, mask=is_cell_RD, other=0.0)
        out_RD = quantize(out_RD, tl.load(out_scale_ptr), LOW, HIGH)
    cell_RD += (row // REPEAT)[:, None] * (HEADS * HEAD_DIM)
    tl.store(out_ptr + cell_RD, out_RD.to(out_ptr.dtype.element_ty), mask=is_cell_RD)
