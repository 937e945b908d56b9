"""A warp's walk over packed codes whose words fill the tensor core's tiles.

Keys are multiplied as integers with queries of 16 bits, one scale a row, in two columns of a byte each. Values are
operands as they are (`decode_planes`): their offset is taken off results behind the walk.

Shape suffixes: R rows (query x query head), C columns of the tensor core, S slots of a tile, K bytes and N words of a
head, D head dim.
"""

import triton
import triton.language as tl

from pq_ao.ops.kernels.asm import widen_bytes
from pq_ao.ops.kernels.decode_parts import HIDDEN, LOWEST, VALUE_GAIN
from pq_ao.ops.kernels.decode_planes import (
    SMALLEST,
    code_offset,
    code_unit,
    in_order_of_dims,
    key_dims,
    key_operand,
    small_plane,
    value_cells,
    value_operand,
)

_LARGEST_QUERY = tl.constexpr(127 * 256 + 127)  # two signed bytes, of which the upper counts 256
_LEAST_ABSMAX = tl.constexpr(94 << 23)  # 2^-33, as bits; smaller rows of queries hardly tell slots apart
_APART = tl.constexpr(61)  # tiles between the beginnings of two KV heads


@triton.jit
def _absmax(query_CK):
    """Bits of the largest magnitude of each row, which order as magnitudes do; NaN is above all."""
    return tl.max(query_CK.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)


@triton.jit
def _byte(query_CK, column):
    """int8: of the rounded queries the upper byte in even columns, the lower in odd ones."""
    whole = tl.floor(query_CK + 0.5).to(tl.int32)
    upper = (whole + 128) >> 8
    return tl.where((column % 2 == 0)[:, None], upper, whole - upper * 256).to(tl.int8)


@triton.jit
def _columns(share_SR):
    """The eight columns of the tensor core's tile: of four rows every other one, for so their scores lie."""
    if share_SR.shape[1] == 8:
        return share_SR
    else:
        return tl.reshape(tl.join(share_SR, tl.zeros_like(share_SR)), (share_SR.shape[0], 8))


@triton.jit
def _of_columns(x_R):
    """The same of each of `_columns`."""
    if x_R.shape[0] == 8:
        return x_R
    else:
        return tl.reshape(tl.join(x_R, x_R), (8,))


@triton.jit
def _rows(acc_NC, R: tl.constexpr):
    """What `_columns` spread."""
    if R == 8:
        return acc_NC
    else:
        return tl.split(tl.reshape(acc_NC, (acc_NC.shape[0], R, 2)))[0]


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
    R: tl.constexpr = 4 if ROWS <= 4 else 8
    PLANES: tl.constexpr = 32 // BITS
    BYTES: tl.constexpr = 4 * WORDS
    tl.static_assert(ROWS <= R)
    length = start + QUERIES
    tiles = tl.cdiv(length, TILE)

    row = tl.arange(0, R)
    column = tl.arange(0, 2 * R)
    query_row = column // 2
    query_ptr += ((query_row // REPEAT) * stride_l + (group * REPEAT + query_row % REPEAT) * stride_h)[:, None]
    dim = key_dims(BYTES)
    is_row = (query_row < ROWS)[:, None]
    low_CK = tl.load(query_ptr + dim[None, :], mask=is_row, other=0.0).to(tl.float32)
    absmax_C = tl.maximum(_absmax(low_CK), _LEAST_ABSMAX)
    if BITS == 4:
        high_CK = tl.load(query_ptr + (dim + BYTES)[None, :], mask=is_row, other=0.0).to(tl.float32)
        absmax_C = tl.maximum(absmax_C, _absmax(high_CK))
    unit_C = absmax_C.to(tl.float32, bitcast=True) / _LARGEST_QUERY
    low_CK = _byte(low_CK / unit_C[:, None], column)
    if BITS == 4:
        high_CK = _byte(high_CK / unit_C[:, None], column)
        unit_C = unit_C * (1.0 / 16)  # widened codes are 16 times too large
    unit_R = tl.split(tl.reshape(unit_C, (R, 2)))[0]
    gain_R = score_gain * unit_R

    m_R = tl.full([R], LOWEST, tl.float32)
    l_R = tl.zeros([R], tl.float32)
    # the sum of shares as operands, which the offset of codes weighs by: a product with ones, all its rows equal
    weight_NC = tl.zeros([16, 8], tl.float32)
    ones_NS = tl.full([16, TILE], 1.0, tl.float16)
    accs = ()
    for _ in tl.static_range(PLANES):
        accs += (tl.zeros([WORDS, 8], tl.float32),)

    keys_ptr = keys_ptr.to(tl.pointer_type(tl.uint8 if BITS == 4 else tl.int8), bitcast=True)
    keys_ptr += owner.to(tl.int64) * slots * BYTES
    values_ptr += owner.to(tl.int64) * slots * WORDS
    if PER_TOKEN:
        key_scale_ptr += owner.to(tl.int64) * slots
        value_scale_ptr += owner.to(tl.int64) * slots
    if visible_ptr is not None:
        visible_ptr += batch.to(tl.int64) * visible_stride
    slot_in_tile = tl.arange(0, TILE)
    last_slot_R = start + row // REPEAT
    key_slot, key_byte = slot_in_tile[:, None], tl.arange(0, BYTES)[None, :]
    value_slot, value_word = value_cells(TILE, WORDS)

    last_tile = tl.minimum((split + 1) * tiles // splits, tiles)
    first_tile = split * tiles // splits
    count = tl.maximum(last_tile - first_tile, 1)
    for index in tl.range(0, last_tile - first_tile, num_stages=STAGES):
        # Caches lie whole powers of two apart, and programs walk in step: begun at the same slot, all of them would ask
        # the same channels of the memory at once.
        tile = first_tile + (index + owner * _APART) % count
        slot_S = tile * TILE + slot_in_tile
        is_slot_S = slot_S < length
        # codes are finite whatever their bits: cheaper to read some slot than none
        if EVEN:
            key_SK = tl.load(keys_ptr + tile * (TILE * BYTES) + (key_slot * BYTES + key_byte))
        else:
            key_SK = tl.load(keys_ptr + (tl.minimum(tile * TILE + key_slot, slots - 1) * BYTES + key_byte))
        key_SK = key_operand(key_SK, TILE, BYTES)
        seen_SR = is_slot_S[:, None]
        if visible_ptr is not None:
            seen_SR = seen_SR & (tl.load(visible_ptr + slot_S, mask=is_slot_S, other=0) != 0)[:, None]
        if QUERIES > 1:
            seen_SR = seen_SR & (slot_S[:, None] <= last_slot_R[None, :])
        if BITS == 4:
            key_low_SK, key_high_SK = widen_bytes(key_SK)
            score_SC = tl.dot(key_low_SK, tl.trans(low_CK), out_dtype=tl.int32)
            score_SC = tl.dot(key_high_SK, tl.trans(high_CK), score_SC, out_dtype=tl.int32)
        else:
            score_SC = tl.dot(key_SK, tl.trans(low_CK), out_dtype=tl.int32)
        upper_SR, lower_SR = tl.split(tl.reshape(score_SC, (TILE, R, 2)))
        score_SR = (upper_SR * 256 + lower_SR).to(tl.float32)
        if PER_TOKEN:
            score_SR *= tl.load(key_scale_ptr + slot_S, mask=is_slot_S, other=1.0)[:, None]
        score_SR = tl.where(seen_SR, score_SR, HIDDEN)
        new_m_R = tl.maximum(m_R, tl.max(score_SR, 0))
        share_SR = tl.exp2(score_SR * gain_R[None, :] - (new_m_R * gain_R)[None, :])
        # first the difference: fused, m * gain - new_m * gain of two equal m is a rounding error, of LOWEST a huge one
        decay_R = tl.exp2((m_R - new_m_R) * gain_R)
        m_R = new_m_R
        l_R = l_R * decay_R
        if PER_TOKEN:
            l_R += tl.sum(share_SR, 0)
            share_SR *= (tl.load(value_scale_ptr + slot_S, mask=is_slot_S, other=0.0) * VALUE_GAIN)[:, None]
        share_SC = _columns(share_SR.to(tl.float16))
        decay_C = _of_columns(decay_R)
        if EVEN:
            value_words = tl.load(values_ptr + tile * (TILE * WORDS) + (value_slot * WORDS + value_word))
        else:
            value_words = tl.load(values_ptr + (tl.minimum(tile * TILE + value_slot, slots - 1) * WORDS + value_word))
        value_NS = value_operand(value_words, TILE, WORDS)
        weight_NC = tl.dot(ones_NS, share_SC, acc=weight_NC * decay_C[None, :])
        new_accs = ()
        for p in tl.static_range(PLANES):
            new_accs += (tl.dot(small_plane(value_NS, p, BITS), share_SC, acc=accs[p] * decay_C[None, :]),)
        accs = new_accs

    weight_R = tl.max(_rows(weight_NC, R), 0)
    if not PER_TOKEN:
        l_R += weight_R
    results = ()
    for p in tl.static_range(PLANES):
        acc_NR = _rows(accs[p], R)
        results += (acc_NR * (1.0 / (code_unit(p, BITS) * SMALLEST)) - (weight_R * code_offset(BITS))[None, :],)
    return m_R * unit_R, l_R, in_order_of_dims(results, BITS, WORDS)
