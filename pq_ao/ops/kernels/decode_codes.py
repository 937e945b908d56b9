"""A warp's walk over packed codes, loaded as the tensor core's operands want them.

Within a tile, words may stand in any order that queries and results share. In these orders each thread's words of a
key or value lie together in memory, so that codes go from memory to operands in vectors, without an exchange between
threads. Nibbles are masked into fp16 bits and left there: as subnormals they are whole multiples of 2^-24, exactly.

Shape suffixes: R rows (query x query head), S slots of a tile, N words of a head, P prefix tokens of a tile.
"""

import triton
import triton.language as tl

from pq_ao.ops.kernels.decode_parts import HIDDEN, LOWEST, VALUE_GAIN
from pq_ao.ops.kernels.widen import small_plane

# scores and results count in units of fp16's smallest number
SMALLEST = tl.constexpr(2.0**-24)


@triton.jit
def _of_planes(dims, BITS: tl.constexpr, WORDS: tl.constexpr, BY_VALUE: tl.constexpr):
    """[D, X], dims of a head in their own order, to the order of the key or value operand, plane after plane."""
    HALVES: tl.constexpr = 2 if BITS == 4 else 1
    X: tl.constexpr = dims.shape[1]
    if BY_VALUE:
        dims = tl.reshape(dims, [HALVES, WORDS // 16, 8, 2, 4, X])
        dims = tl.permute(dims, (4, 0, 1, 3, 2, 5))
    else:
        dims = tl.reshape(dims, [HALVES, WORDS // 16, 4, 2, 2, 4, X])
        dims = tl.permute(dims, (5, 0, 1, 3, 2, 4, 6))
    return tl.reshape(dims, [HALVES * 4 * WORDS, X])


@triton.jit
def of_dims(planes, BITS: tl.constexpr, WORDS: tl.constexpr):
    """The way back from the order of the value operand."""
    HALVES: tl.constexpr = 2 if BITS == 4 else 1
    X: tl.constexpr = planes.shape[1]
    planes = tl.reshape(planes, [4, HALVES, WORDS // 16, 2, 8, X])
    return tl.reshape(tl.permute(planes, (1, 2, 4, 3, 0, 5)), [HALVES * 4 * WORDS, X])


@triton.jit
def _take_apart(x, BITS: tl.constexpr, WORDS: tl.constexpr):
    """[planes * N, R] to planes of [N, R]."""
    R: tl.constexpr = x.shape[1]
    if BITS == 4:
        even, odd = tl.split(tl.permute(tl.reshape(x, [2, 2, 2, WORDS, R]), (3, 4, 0, 1, 2)))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        x00, x04 = tl.split(x0)
        x01, x05 = tl.split(x1)
        x02, x06 = tl.split(x2)
        x03, x07 = tl.split(x3)
        planes = (x00, x01, x02, x03, x04, x05, x06, x07)
    else:
        even, odd = tl.split(tl.permute(tl.reshape(x, [2, 2, WORDS, R]), (2, 3, 0, 1)))
        x00, x02 = tl.split(even)
        x01, x03 = tl.split(odd)
        planes = (x00, x01, x02, x03)
    return planes


@triton.jit
def _put_together(planes, BITS: tl.constexpr, WORDS: tl.constexpr):
    """The way back."""
    R: tl.constexpr = planes[0].shape[1]
    even = tl.join(planes[0], planes[2])
    odd = tl.join(planes[1], planes[3])
    if BITS == 4:
        even = tl.permute(tl.join(even, tl.join(planes[4], planes[6])), (0, 1, 3, 2))
        odd = tl.permute(tl.join(odd, tl.join(planes[5], planes[7])), (0, 1, 3, 2))
        x = tl.reshape(tl.permute(tl.join(even, odd), (2, 3, 4, 0, 1)), [8 * WORDS, R])
    else:
        x = tl.reshape(tl.permute(tl.join(even, odd), (2, 3, 0, 1)), [4 * WORDS, R])
    return x


@triton.jit
def _key_offsets(TILE: tl.constexpr, WORDS: tl.constexpr):
    """[4, 8, S / 8, N / 16, 4]: the first two dims are a warp's threads, the last is a thread's vector."""
    lane = tl.arange(0, 4)[:, None, None, None, None]
    slot = tl.arange(0, 8)[None, :, None, None, None] + 8 * tl.arange(0, TILE // 8)[None, None, :, None, None]
    part = tl.arange(0, WORDS // 16)[None, None, None, :, None]
    return slot, part * 16 + lane * 4 + tl.arange(0, 4)[None, None, None, None, :]


@triton.jit
def _key_operand(words, TILE: tl.constexpr, WORDS: tl.constexpr):
    words = tl.reshape(words, [4, 8, TILE // 8, WORDS // 16, 2, 2])
    return tl.reshape(tl.permute(words, (2, 1, 3, 4, 0, 5)), [TILE, WORDS])


@triton.jit
def _value_offsets(TILE: tl.constexpr, WORDS: tl.constexpr):
    """[4, 8, S / 4, N / 16, 2], likewise; a thread's slots come in pairs, which one register of the operand holds."""
    lane = tl.arange(0, 4)[:, None, None, None, None]
    step = tl.arange(0, TILE // 4)[None, None, :, None, None]
    part = tl.arange(0, WORDS // 16)[None, None, None, :, None]
    word = tl.arange(0, 8)[None, :, None, None, None] * 2 + tl.arange(0, 2)[None, None, None, None, :]
    return step // 2 * 8 + lane * 2 + step % 2, part * 16 + word


@triton.jit
def _value_operand(words, TILE: tl.constexpr, WORDS: tl.constexpr):
    words = tl.reshape(words, [4, 8, TILE // 8, 2, WORDS // 16, 2])
    return tl.reshape(tl.permute(words, (4, 5, 1, 2, 0, 3)), [WORDS, TILE])


@triton.jit
def _unit_of_planes(HEAD_DIM: tl.constexpr, WORDS: tl.constexpr, HIGH: tl.constexpr):
    """What a code counts in each place of the operands."""
    return tl.where(tl.arange(0, HEAD_DIM) // WORDS % 2 == 0, 1.0, HIGH)


@triton.jit
def codes_part(
    query_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, key_shift_ptr, value_shift_ptr, prefix_key_ptr,
    prefix_value_ptr, visible_ptr, score_gain, prefix_gain, value_gain, prefix_len, start, slots, splits, split,
    prefix_split, owner, batch, group, visible_stride, stride_l, stride_h,
    QUERIES: tl.constexpr, REPEAT: tl.constexpr, HEAD_DIM: tl.constexpr, BITS: tl.constexpr,
    WORDS: tl.constexpr, PER_TOKEN: tl.constexpr, PREFIX_TILE: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Attention over a share of the slots, and over the prefix in share `prefix_split`; share `splits` has no slots.

    Returns:
        maxima [R] in units of `score_gain`, sums [R], and results [R, D] in units of `value_gain`.
    """
    ROWS: tl.constexpr = QUERIES * REPEAT
    R: tl.constexpr = 8
    PLANES: tl.constexpr = 32 // BITS
    # a code that stands in the high nibble counts 16 of the low one's units
    HIGH: tl.constexpr = 16.0 if BITS == 4 else 1.0
    OFFSET: tl.constexpr = 8.0 if BITS == 4 else 128.0
    length = start + QUERIES
    tiles = tl.cdiv(length, TILE)

    dim = tl.arange(0, HEAD_DIM)
    row = tl.arange(0, R)
    row_offset = (row // REPEAT) * stride_l + (group * REPEAT + row % REPEAT) * stride_h
    query_RD = tl.load(query_ptr + row_offset[:, None] + dim[None, :], mask=(row < ROWS)[:, None], other=0.0)
    query_RD = query_RD.to(tl.float32)
    # per plane, so that Triton changes the layout once, before the loop
    queries = ()
    query_planes = _take_apart(_of_planes(tl.trans(query_RD), BITS, WORDS, False), BITS, WORDS)
    correction_R = tl.zeros([R], tl.float32)
    for p in tl.static_range(PLANES):
        query_NR = (query_planes[p] * (1.0 / (HIGH if p % 2 == 1 else 1.0))).to(tl.float16)
        # what the offset of codes adds to the scores of a row
        correction_R -= tl.sum(query_NR.to(tl.float32), 0) * ((HIGH if p % 2 == 1 else 1.0) * OFFSET * SMALLEST)
        queries += (query_NR,)

    m_R = tl.full([R], LOWEST, tl.float32)
    l_R = tl.zeros([R], tl.float32)
    acc_ER = tl.zeros([HEAD_DIM, R], tl.float32)
    # the sum of shares as operands, which the offset of codes weighs by: a product with ones
    weight_NR = tl.zeros([16, R], tl.float32)

    if PREFIX_TILE > 0:
        if split == prefix_split:
            key_shift_D = tl.zeros([HEAD_DIM], tl.float32)
            value_shift_D = tl.zeros([HEAD_DIM], tl.float32)
            if key_shift_ptr is not None:
                key_shift_D = tl.load(key_shift_ptr + group * HEAD_DIM + dim)
            if value_shift_ptr is not None:
                value_shift_D = tl.load(value_shift_ptr + group * HEAD_DIM + dim)
            for first in tl.range(0, prefix_len, PREFIX_TILE, num_stages=1):
                token = first + tl.arange(0, PREFIX_TILE)
                is_token = token < prefix_len
                offset_PD = ((group * prefix_len + token) * HEAD_DIM)[:, None] + dim[None, :]
                key_PD = tl.load(prefix_key_ptr + offset_PD, mask=is_token[:, None], other=0.0).to(tl.float32)
                value_PD = tl.load(prefix_value_ptr + offset_PD, mask=is_token[:, None], other=0.0).to(tl.float32)
                key_PD = (key_PD - key_shift_D[None, :]).to(tl.float16)
                value_PD = ((value_PD - value_shift_D[None, :]) * (1.0 / value_gain)).to(tl.float16)
                score_PR = tl.dot(key_PD, tl.trans(query_RD.to(tl.float16)))
                score_PR = tl.where(is_token[:, None], score_PR * (prefix_gain * SMALLEST), HIDDEN)
                new_m_R = tl.maximum(m_R, tl.max(score_PR, 0))
                share_PR = tl.exp2((score_PR - new_m_R[None, :]) * (score_gain / SMALLEST))
                decay_R = tl.exp2((m_R - new_m_R) * (score_gain / SMALLEST))
                l_R = l_R * decay_R + tl.sum(share_PR, 0)
                m_R = new_m_R
                value_EP = _of_planes(tl.trans(value_PD), BITS, WORDS, True)
                acc_ER = tl.dot(value_EP, share_PR.to(tl.float16), acc=acc_ER * decay_R[None, :])
            unit_E = _unit_of_planes(HEAD_DIM, WORDS, HIGH)
            acc_ER *= unit_E[:, None] * SMALLEST

    accs = _take_apart(acc_ER, BITS, WORDS)
    keys_ptr += owner.to(tl.int64) * slots * WORDS
    values_ptr += owner.to(tl.int64) * slots * WORDS
    if PER_TOKEN:
        key_scale_ptr += owner.to(tl.int64) * slots
        value_scale_ptr += owner.to(tl.int64) * slots
    if visible_ptr is not None:
        visible_ptr += batch.to(tl.int64) * visible_stride
    slot_in_tile = tl.arange(0, TILE)
    last_slot_R = start + row // REPEAT
    key_slot, key_word = _key_offsets(TILE, WORDS)
    value_slot, its_word = _value_offsets(TILE, WORDS)
    ones_NS = tl.full([16, TILE], 1.0, tl.float16)

    last_tile = tl.minimum((split + 1) * tiles // splits, tiles)
    for tile in tl.range(split * tiles // splits, last_tile, num_stages=STAGES):
        slot_S = tile * TILE + slot_in_tile
        is_slot_S = slot_S < length
        # codes are finite whatever their bits: cheaper to read some slot than none
        if EVEN:
            key_words = tl.load(keys_ptr + tile * (TILE * WORDS) + (key_slot * WORDS + key_word))
        else:
            key_words = tl.load(keys_ptr + (tl.minimum(tile * TILE + key_slot, slots - 1) * WORDS + key_word))
        key_SN = _key_operand(key_words, TILE, WORDS)
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
        gained_m_R = new_m_R * (score_gain / SMALLEST)
        share_SR = tl.exp2(score_SR * (score_gain / SMALLEST) - gained_m_R[None, :])
        decay_R = tl.exp2(m_R * (score_gain / SMALLEST) - gained_m_R)
        m_R = new_m_R
        l_R = l_R * decay_R
        if PER_TOKEN:
            l_R += tl.sum(share_SR, 0)
            share_SR *= (tl.load(value_scale_ptr + slot_S, mask=is_slot_S, other=0.0) * VALUE_GAIN)[:, None]
        share_SR = share_SR.to(tl.float16)
        if EVEN:
            value_words = tl.load(values_ptr + tile * (TILE * WORDS) + (value_slot * WORDS + its_word))
        else:
            value_words = tl.load(values_ptr + (tl.minimum(tile * TILE + value_slot, slots - 1) * WORDS + its_word))
        value_NS = _value_operand(value_words, TILE, WORDS)
        weight_NR = tl.dot(ones_NS, share_SR, acc=weight_NR * decay_R[None, :])
        new_accs = ()
        for p in tl.static_range(PLANES):
            new_accs += (tl.dot(small_plane(value_NS, p, BITS), share_SR, acc=accs[p] * decay_R[None, :]),)
        accs = new_accs

    weight_R = tl.sum(tl.where(tl.arange(0, 16)[:, None] == 0, weight_NR, 0.0), 0)
    if not PER_TOKEN:
        l_R += weight_R
    acc_ER = _put_together(accs, BITS, WORDS)
    acc_ER = acc_ER * (1 / (_unit_of_planes(HEAD_DIM, WORDS, HIGH) * SMALLEST))[:, None] - (weight_R * OFFSET)[None, :]
    return m_R / SMALLEST, l_R, tl.trans(of_dims(acc_ER, BITS, WORDS))
