"""The walk over stored codes or floats of any shape, by several warps.

Each warp walks its own slots with its own softmax (a batch dimension of `tl.dot` that Triton gives to the warps), so
that nothing is exchanged between warps before the end. Codes go from shared memory to registers in the layout that
the tensor core wants, still packed, and are widened there.

Shape suffixes: W warps, R rows (query x query head), S slots of a warp's tile, N words of a plane.
"""

import triton
import triton.language as tl

from pq_ao.ops.kernels.decode_parts import HIDDEN, LOWEST, VALUE_GAIN
from pq_ao.ops.kernels.widen import operand_type, plane, plane_column, plane_gain, plane_offset, raw_plane


@triton.jit
def _load(pointers, mask):
    if mask is None:
        loaded = tl.load(pointers)
    else:
        loaded = tl.load(pointers, mask=mask, other=0)
    return loaded


@triton.jit
def _of_rows(x_WR, SLOTS_FIRST: tl.constexpr):
    """What stands once a row, spread over scores or results."""
    return x_WR[:, None, :] if SLOTS_FIRST else x_WR[:, :, None]


@triton.jit
def _of_slots(x_WS, SLOTS_FIRST: tl.constexpr):
    """What stands once a slot, spread over scores."""
    return x_WS[:, :, None] if SLOTS_FIRST else x_WS[:, None, :]


@triton.jit
def walk_part(
    query_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, visible_ptr, scratch_ptr, score_gain, start, slots,
    parts, splits, split, owner, batch, group, visible_stride, stride_l, stride_h,
    QUERIES: tl.constexpr, REPEAT: tl.constexpr, HEAD_DIM: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr,
    WORDS: tl.constexpr, WORDS_PADDED: tl.constexpr, PER_TOKEN: tl.constexpr, WARPS: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr, SLOTS_FIRST: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Attention over a share of the slots, as one part."""
    ROWS: tl.constexpr = QUERIES * REPEAT
    R: tl.constexpr = 8 if SLOTS_FIRST and ROWS <= 8 else 16
    AXIS: tl.constexpr = 1 if SLOTS_FIRST else 2  # of slots in scores
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    OPERAND: tl.constexpr = operand_type(keys_ptr.dtype.element_ty, BITS)
    length = start + QUERIES
    tiles = tl.cdiv(length, WARPS * TILE)

    word = tl.arange(0, WORDS_PADDED)
    row = tl.arange(0, R)
    row_offset = (row // REPEAT) * stride_l + (group * REPEAT + row % REPEAT) * stride_h
    queries = ()
    correction_R = tl.zeros([R], tl.float32)
    for p in tl.static_range(PLANES):
        column = plane_column(word, p, PLANES, BITS, HALF)
        is_query_RN = (row < ROWS)[:, None] & ((word < WORDS) & (column < HEAD_DIM))[None, :]
        query_RN = tl.load(query_ptr + row_offset[:, None] + column[None, :], mask=is_query_RN, other=0.0)
        query_RN = (query_RN.to(tl.float32) * plane_gain(p, PLANES, BITS)).to(OPERAND)
        # what the offset of raw planes adds to the scores of a row
        correction_R -= tl.sum(query_RN.to(tl.float32), 1) * (
            plane_offset(p, PLANES, BITS) / plane_gain(p, PLANES, BITS)
        )
        if SLOTS_FIRST:
            queries += (tl.broadcast_to(tl.trans(query_RN)[None, :, :], [WARPS, WORDS_PADDED, R]),)
        else:
            queries += (tl.broadcast_to(query_RN[None, :, :], [WARPS, R, WORDS_PADDED]),)

    m_WR = tl.full([WARPS, R], LOWEST, tl.float32)
    l_WR = tl.zeros([WARPS, R], tl.float32)
    accs = ()
    for _ in tl.static_range(PLANES):
        if SLOTS_FIRST:
            accs += (tl.zeros([WARPS, WORDS_PADDED, R], tl.float32),)
        else:
            accs += (tl.zeros([WARPS, R, WORDS_PADDED], tl.float32),)

    slot_in_tile_WS = tl.arange(0, WARPS)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    keys_ptr += owner.to(tl.int64) * slots * WORDS
    values_ptr += owner.to(tl.int64) * slots * WORDS
    if PER_TOKEN:
        key_scale_ptr += owner.to(tl.int64) * slots
        value_scale_ptr += owner.to(tl.int64) * slots
    if visible_ptr is not None:
        visible_ptr += batch.to(tl.int64) * visible_stride
    last_slot_R = start + row // REPEAT

    for tile in tl.range(split * tiles // splits, (split + 1) * tiles // splits, num_stages=STAGES):
        slot_WS = tile * (WARPS * TILE) + slot_in_tile_WS
        is_slot_WS = slot_WS < length
        if BITS == 16:
            # past the text there may be anything, NaN too
            offset_WSN = slot_WS[:, :, None] * WORDS + word[None, None, :]
            is_stored_WSN = is_slot_WS[:, :, None] & (word < WORDS)[None, None, :]
        else:
            # codes are finite whatever their bits: cheaper to read some slot than none
            stored_WS = slot_WS if EVEN else tl.minimum(slot_WS, slots - 1)
            offset_WSN = stored_WS[:, :, None] * WORDS + word[None, None, :]
            is_stored_WSN = None if WORDS == WORDS_PADDED else (word < WORDS)[None, None, :]
        key_WSN = _load(keys_ptr + offset_WSN, is_stored_WSN)
        seen = _of_slots(is_slot_WS, SLOTS_FIRST)
        if visible_ptr is not None:
            is_visible_WS = tl.load(visible_ptr + slot_WS, mask=is_slot_WS, other=0) != 0
            seen = seen & _of_slots(is_visible_WS, SLOTS_FIRST)
        if QUERIES > 1:
            seen = seen & (_of_slots(slot_WS, SLOTS_FIRST) <= _of_rows(last_slot_R[None, :], SLOTS_FIRST))
        score = _of_rows(correction_R[None, :], SLOTS_FIRST)
        if PER_TOKEN or SLOTS_FIRST:
            score = tl.broadcast_to(score, [WARPS, TILE, R] if SLOTS_FIRST else [WARPS, R, TILE])
        if not PER_TOKEN:
            score = tl.where(seen, score, HIDDEN)
        for p in tl.static_range(PLANES):
            if SLOTS_FIRST:
                score = tl.dot(raw_plane(key_WSN, p, PLANES, BITS).to(OPERAND), queries[p], acc=score)
            else:
                key_WNS = raw_plane(tl.trans(key_WSN, (0, 2, 1)), p, PLANES, BITS).to(OPERAND)
                score = tl.dot(queries[p], key_WNS, acc=score)
        if PER_TOKEN:
            score *= _of_slots(tl.load(key_scale_ptr + slot_WS, mask=is_slot_WS, other=1.0), SLOTS_FIRST)
            score = tl.where(seen, score, HIDDEN)
        new_m_WR = tl.maximum(m_WR, tl.max(score, AXIS))
        share = tl.exp2(score * score_gain - _of_rows(new_m_WR * score_gain, SLOTS_FIRST))
        decay_WR = tl.exp2((m_WR - new_m_WR) * score_gain)
        l_WR = l_WR * decay_WR + tl.sum(share, AXIS)
        m_WR = new_m_WR
        if PER_TOKEN:
            gain_WS = tl.load(value_scale_ptr + slot_WS, mask=is_slot_WS, other=0.0) * VALUE_GAIN
            share *= _of_slots(gain_WS, SLOTS_FIRST)
        share = share.to(OPERAND)
        value_WSN = _load(values_ptr + offset_WSN, is_stored_WSN)
        new_accs = ()
        for p in tl.static_range(PLANES):
            acc = accs[p] * _of_rows(decay_WR, SLOTS_FIRST)
            if SLOTS_FIRST:
                value_WNS = plane(tl.trans(value_WSN, (0, 2, 1)), p, PLANES, BITS).to(OPERAND)
                new_accs += (tl.dot(value_WNS, share, acc=acc),)
            else:
                new_accs += (tl.dot(share, plane(value_WSN, p, PLANES, BITS).to(OPERAND), acc=acc),)
        accs = new_accs

    # the warps' results into one
    m_R = tl.max(m_WR, 0)
    share_WR = tl.exp2((m_WR - m_R[None, :]) * score_gain)
    tl.store(scratch_ptr + split * (2 * ROWS) + row, m_R, mask=row < ROWS)
    tl.store(scratch_ptr + split * (2 * ROWS) + ROWS + row, tl.sum(l_WR * share_WR, 0), mask=row < ROWS)
    for p in tl.static_range(PLANES):
        acc = tl.sum(accs[p] * _of_rows(share_WR, SLOTS_FIRST), 0)
        column = plane_column(word, p, PLANES, BITS, HALF)
        is_cell_RN = (row < ROWS)[:, None] & ((word < WORDS) & (column < HEAD_DIM))[None, :]
        cell_RN = parts * (2 * ROWS) + split * (ROWS * HEAD_DIM) + row[:, None] * HEAD_DIM + column[None, :]
        if SLOTS_FIRST:
            tl.store(scratch_ptr + tl.trans(cell_RN), acc, mask=tl.trans(is_cell_RN))
        else:
            tl.store(scratch_ptr + cell_RN, acc, mask=is_cell_RN)
