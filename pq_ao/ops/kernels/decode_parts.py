"""What a decode step does beside its walk over the cache: the prefix, and the sum of all programs' parts.

A part is a maximum and a sum of exponentials a row, and a result not yet divided by the sum. Parts of one KV head lie
together in scratch memory: [parts, 2, ROWS] maxima and sums, then [parts, ROWS, D] results.
Scores count in units of `score_gain`, results in units of `value_gain`: those of the codes.

Shape suffixes: R rows (query x query head, padded), T parts, D head dim (padded).
"""

import triton
import triton.language as tl

from pq_ao.ops.kernels.codes import quantize

# Scores of hidden slots, and the lowest maximum that softmax may start from: the one far below the other, so that
# hidden slots weigh nothing even where nothing else is seen.
HIDDEN = tl.constexpr(-1e30)
LOWEST = tl.constexpr(-5e29)

# Probabilities times scales of values go through fp16: 64 keeps a scale of 1e-4 a normal number.
VALUE_GAIN = tl.constexpr(64.0)


@triton.jit
def merge_prefix(
    m_R, l_R, acc_RD, query_ptr, key_shift_ptr, value_shift_ptr, prefix_key_ptr, prefix_value_ptr, score_gain,
    prefix_gain, value_gain, prefix_len, group, stride_l, stride_h,
    ROWS: tl.constexpr, REPEAT: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The prefix joins a part, in float32.

    Token by token, which takes few registers. (Of two tokens at once, Triton makes a product of depth two on the
    tensor core, with wrong results on an H200 by Triton 3.6.)
    """
    dim = tl.arange(0, acc_RD.shape[1])
    is_dim = dim < HEAD_DIM
    row = tl.arange(0, acc_RD.shape[0])
    offset_RD = ((row // REPEAT) * stride_l + (group * REPEAT + row % REPEAT) * stride_h)[:, None] + dim[None, :]
    query_RD = tl.load(query_ptr + offset_RD, mask=(row < ROWS)[:, None] & is_dim[None, :], other=0.0)
    query_RD = query_RD.to(tl.float32) * prefix_gain
    key_shift_D = tl.zeros([acc_RD.shape[1]], tl.float32)
    value_shift_D = tl.zeros([acc_RD.shape[1]], tl.float32)
    if key_shift_ptr is not None:
        key_shift_D = tl.load(key_shift_ptr + group * HEAD_DIM + dim, mask=is_dim, other=0.0)
    if value_shift_ptr is not None:
        value_shift_D = tl.load(value_shift_ptr + group * HEAD_DIM + dim, mask=is_dim, other=0.0)
    value_unit = 1.0 / value_gain
    prefix_key_ptr += group * prefix_len * HEAD_DIM
    prefix_value_ptr += group * prefix_len * HEAD_DIM
    for token in tl.range(0, prefix_len, num_stages=4):
        cell_D = token * HEAD_DIM + dim
        key_D = tl.load(prefix_key_ptr + cell_D, mask=is_dim, other=0.0).to(tl.float32) - key_shift_D
        value_D = tl.load(prefix_value_ptr + cell_D, mask=is_dim, other=0.0).to(tl.float32) - value_shift_D
        score_R = tl.sum(query_RD * key_D[None, :], 1)
        new_m_R = tl.maximum(m_R, score_R)
        share_R = tl.exp2((score_R - new_m_R) * score_gain)
        decay_R = tl.exp2((m_R - new_m_R) * score_gain)
        l_R = l_R * decay_R + share_R
        acc_RD = acc_RD * decay_R[:, None] + share_R[:, None] * (value_D * value_unit)[None, :]
        m_R = new_m_R
    return m_R, l_R, acc_RD


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
    ROWS: tl.constexpr, REPEAT: tl.constexpr, HEAD_DIM: tl.constexpr, HEADS: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """Sums the parts of one KV head, some at once, and stores the (quantized) output.

    Maxima, sums and results of some parts are asked for together, so that their latency is paid once.
    """
    R: tl.constexpr = triton.next_power_of_2(ROWS)
    D: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    AT_ONCE: tl.constexpr = 4096 // (R * D) if R * D < 4096 else 1
    dim = tl.arange(0, D)
    row = tl.arange(0, R)
    m_R = tl.full([R], LOWEST, tl.float32)
    l_R = tl.zeros([R], tl.float32)
    acc_RD = tl.zeros([R, D], tl.float32)
    for first in tl.range(0, parts, AT_ONCE, num_stages=1):
        part = first + tl.arange(0, AT_ONCE)
        is_part_TR = (part < parts)[:, None] & (row < ROWS)[None, :]
        m_ptr = scratch_ptr + part[:, None] * (2 * ROWS) + row[None, :]
        # written by other multiprocessors, so read past the first-level cache
        m_TR = tl.load(m_ptr, mask=is_part_TR, other=LOWEST, cache_modifier=".cg")
        l_TR = tl.load(m_ptr + ROWS, mask=is_part_TR, other=0.0, cache_modifier=".cg")
        cell_TRD = part[:, None, None] * (ROWS * HEAD_DIM) + row[None, :, None] * HEAD_DIM + dim[None, None, :]
        acc_ptr = scratch_ptr + parts * (2 * ROWS) + cell_TRD
        is_cell_TRD = is_part_TR[:, :, None] & (dim < HEAD_DIM)[None, None, :]
        acc_TRD = tl.load(acc_ptr, mask=is_cell_TRD, other=0.0, cache_modifier=".cg")
        new_m_R = tl.maximum(m_R, tl.max(m_TR, 0))
        gain_TR = tl.exp2((m_TR - new_m_R[None, :]) * score_gain)
        decay_R = tl.exp2((m_R - new_m_R) * score_gain)
        l_R = l_R * decay_R + tl.sum(l_TR * gain_TR, 0)
        acc_RD = acc_RD * decay_R[:, None] + tl.sum(acc_TRD * gain_TR[:, :, None], 0)
        m_R = new_m_R
    store_out(
        value_shift_ptr, out_scale_ptr, out_shift_ptr, out_ptr, l_R, acc_RD, value_gain, group, ROWS, REPEAT, HEAD_DIM,
        HEADS, LOW, HIGH,
    )  # fmt: skip


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
