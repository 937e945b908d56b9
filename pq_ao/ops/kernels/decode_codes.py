"""A warp's walk over packed codes whose words fill the tensor core's tiles.

Codes are operands as they are (`decode_planes`): their offset is taken off scores before, and off results after, the
walk. Within it scores and results count in units of fp16's smallest number.

Shape suffixes: R rows (query x query head), S slots of a tile, N words of a head, D head dim.
"""

import triton
import triton.language as tl

from pq_ao.ops.kernels import decode_parts
from pq_ao.ops.kernels.decode_parts import VALUE_GAIN
from pq_ao.ops.kernels.decode_planes import (
    SMALLEST,
    code_offset,
    code_unit,
    in_order_of_dims,
    key_cells,
    key_dims,
    key_operand,
    small_plane,
    value_cells,
    value_operand,
)

HIDDEN = tl.constexpr(decode_parts.HIDDEN.value * SMALLEST.value)
LOWEST = tl.constexpr(decode_parts.LOWEST.value * SMALLEST.value)


@triton.jit
def codes_part(
    query_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, visible_ptr, score_gain, start, slots, splits,
    split, owner, batch, group, visible_stride, stride_l, stride_h,
    QUERIES: tl.constexpr, REPEAT: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, PER_TOKEN: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Attention over share `split` of the slots; share `splits` has none.

    Returns:
        maxima [R] in units of `score_gain`, sums [R], and results [R, D] in units of the codes of values.
    """
    ROWS: tl.constexpr = QUERIES * REPEAT
    R: tl.constexpr = 8
    PLANES: tl.constexpr = 32 // BITS
    tl.static_assert(ROWS <= R)
    length = start + QUERIES
    tiles = tl.cdiv(length, TILE)
    gain = score_gain / SMALLEST

    row = tl.arange(0, R)
    row_offset = (row // REPEAT) * stride_l + (group * REPEAT + row % REPEAT) * stride_h
    queries = ()
    correction_NR = tl.zeros([WORDS, R], tl.float32)
    for p in tl.static_range(PLANES):
        dim = key_dims(p, WORDS, BITS)
        query_NR = tl.load(query_ptr + row_offset[None, :] + dim[:, None], mask=(row < ROWS)[None, :], other=0.0)
        query_NR = (query_NR.to(tl.float32) * (1.0 / code_unit(p, BITS))).to(tl.float16)
        # what the offset of codes adds to the scores of a row
        correction_NR -= query_NR.to(tl.float32) * (code_unit(p, BITS) * code_offset(BITS) * SMALLEST)
        queries += (query_NR,)
    correction_R = tl.sum(correction_NR, 0)

    m_R = tl.full([R], LOWEST, tl.float32)
    l_R = tl.zeros([R], tl.float32)
    # the sum of shares as operands, which the offset of codes weighs by: a product with ones, all its rows equal
    weight_NR = tl.zeros([16, R], tl.float32)
    ones_NS = tl.full([16, TILE], 1.0, tl.float16)
    accs = ()
    for _ in tl.static_range(PLANES):
        accs += (tl.zeros([WORDS, R], tl.float32),)

    keys_ptr += owner.to(tl.int64) * slots * WORDS
    values_ptr += owner.to(tl.int64) * slots * WORDS
    if PER_TOKEN:
        key_scale_ptr += owner.to(tl.int64) * slots
        value_scale_ptr += owner.to(tl.int64) * slots
    if visible_ptr is not None:
        visible_ptr += batch.to(tl.int64) * visible_stride
    slot_in_tile = tl.arange(0, TILE)
    last_slot_R = start + row // REPEAT
    key_slot, key_word = key_cells(TILE, WORDS)
    value_slot, value_word = value_cells(TILE, WORDS)

    last_tile = tl.minimum((split + 1) * tiles // splits, tiles)
    for tile in tl.range(split * tiles // splits, last_tile, num_stages=STAGES):
        slot_S = tile * TILE + slot_in_tile
        is_slot_S = slot_S < length
        # codes are finite whatever their bits: cheaper to read some slot than none
        if EVEN:
            key_words = tl.load(keys_ptr + tile * (TILE * WORDS) + (key_slot * WORDS + key_word))
        else:
            key_words = tl.load(keys_ptr + (tl.minimum(tile * TILE + key_slot, slots - 1) * WORDS + key_word))
        key_SN = key_operand(key_words, TILE, WORDS)
        seen_SR = is_slot_S[:, None]
        if visible_ptr is not None:
            seen_SR = seen_SR & (tl.load(visible_ptr + slot_S, mask=is_slot_S, other=0) != 0)[:, None]
        if QUERIES > 1:
            seen_SR = seen_SR & (slot_S[:, None] <= last_slot_R[None, :])
        score_SR = tl.broadcast_to(correction_R[None, :], [TILE, R])
        if not PER_TOKEN:
            score_SR = tl.where(seen_SR, score_SR, HIDDEN)
        for p in tl.static_range(PLANES):
            score_SR = tl.dot(small_plane(key_SN, p, BITS), queries[p], acc=score_SR)
        if PER_TOKEN:
            score_SR *= tl.load(key_scale_ptr + slot_S, mask=is_slot_S, other=1.0)[:, None]
            score_SR = tl.where(seen_SR, score_SR, HIDDEN)
        new_m_R = tl.maximum(m_R, tl.max(score_SR, 0))
        share_SR = tl.exp2(score_SR * gain - (new_m_R * gain)[None, :])
        # first the difference: fused, m * gain - new_m * gain of two equal m is a rounding error, of LOWEST a huge one
        decay_R = tl.exp2((m_R - new_m_R) * gain)
        m_R = new_m_R
        l_R = l_R * decay_R
        if PER_TOKEN:
            l_R += tl.sum(share_SR, 0)
            share_SR *= (tl.load(value_scale_ptr + slot_S, mask=is_slot_S, other=0.0) * VALUE_GAIN)[:, None]
        share_SR = share_SR.to(tl.float16)
        if EVEN:
            value_words = tl.load(values_ptr + tile * (TILE * WORDS) + (value_slot * WORDS + value_word))
        else:
            value_words = tl.load(values_ptr + (tl.minimum(tile * TILE + value_slot, slots - 1) * WORDS + value_word))
        value_NS = value_operand(value_words, TILE, WORDS)
        weight_NR = tl.dot(ones_NS, share_SR, acc=weight_NR * decay_R[None, :])
        new_accs = ()
        for p in tl.static_range(PLANES):
            new_accs += (tl.dot(small_plane(value_NS, p, BITS), share_SR, acc=accs[p] * decay_R[None, :]),)
        accs = new_accs

    weight_R = tl.max(weight_NR, 0)
    if not PER_TOKEN:
        l_R += weight_R
    results = ()
    for p in tl.static_range(PLANES):
        results += (accs[p] * (1.0 / (code_unit(p, BITS) * SMALLEST)) - (weight_R * code_offset(BITS))[None, :],)
    return m_R / SMALLEST, l_R, in_order_of_dims(results, BITS, WORDS)
