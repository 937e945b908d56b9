"""Attention of a few queries over the whole cache: split over its slots, reduced by the last program to arrive.

A program owns one KV head of one sequence and a share of its slots, and all query heads and queries that read them.
Each warp walks its own slots with its own softmax (a batch dimension of `tl.dot` that Triton gives to the warps), so
that nothing is exchanged between warps before the end. Codes go from shared memory to registers in the layout that
the tensor core wants, still packed, and are widened there.

Shape suffixes: W warps, R rows (query x query head), S slots of a warp's tile, N words of a plane, E all head dims in
the order plane after plane, D head dim.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pq_ao.ops.kernels.decode_parts import HIDDEN, LOWEST, finish, prefix_part
from pq_ao.ops.kernels.stored import LOG2E, last_dim_dense, stored_as
from pq_ao.ops.kernels.widen import operand_type, plane, plane_column, plane_gain, plane_offset, raw_plane
from pq_ao.ops.kernels.workspace import COUNTERS, counters
from pq_ao.ops.quantize import code_range

# Columns of the tensor core's smallest tile. (With 16, results were wrong on an H200 with Triton 3.6.)
MAX_ROWS = 8

_RESIDENT = 9  # programs that shared memory has room for on a multiprocessor

MAX_SPLITS = 63  # the last program to arrive reads them all, and the part of the prefix

# Probabilities times scales of values go through fp16: 64 keeps a scale of 1e-4 a normal number.
_VALUE_GAIN = tl.constexpr(64.0)


class Tiles(NamedTuple):
    """How a decode step is cut.

    Attributes:
        warps: of a program.
        slots: of a warp's tile.
        stages: tiles in flight.
        splits: programs a KV head.
        slots_first: slots are the rows of the tensor core's tiles and queries its columns, 8 of them instead of 16.
        registers: most a thread may use; None leaves it to the compiler.
    """

    warps: int
    slots: int
    stages: int
    splits: int
    slots_first: bool = True
    registers: int | None = None


def choose_tiles(kv_heads: int, slots: int, bits: int, processors: int) -> Tiles:
    """Tiles for `kv_heads` (batch x heads) caches of `slots` slots on a GPU of that many multiprocessors."""
    if bits == 16:
        # floats need no widening, which is what slots as rows make cheap, and move better along their rows
        wanted = min(triton.cdiv(processors, kv_heads), triton.cdiv(slots, 64), 16)
        return Tiles(warps=2, slots=32, stages=3, splits=wanted, slots_first=False)
    # programs of one warp, no more than are resident at once, that of the prefix included; where many heads keep the
    # GPU busy a program gets some tiles, or its beginning and end would be most of it
    tiles = triton.cdiv(slots, 64)
    wanted = min(_RESIDENT * processors // kv_heads - 1, tiles // 5 if kv_heads > 16 else tiles, 32)
    return Tiles(warps=1, slots=64, stages=3, splits=max(1, wanted))


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
def _body_part(
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
            gain_WS = tl.load(value_scale_ptr + slot_WS, mask=is_slot_WS, other=0.0) * _VALUE_GAIN
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
    E: tl.constexpr = PLANES * WORDS_PADDED
    tl.store(scratch_ptr + split * (2 * ROWS) + row, m_R, mask=row < ROWS)
    tl.store(scratch_ptr + split * (2 * ROWS) + ROWS + row, tl.sum(l_WR * share_WR, 0), mask=row < ROWS)
    where = parts * (2 * ROWS) + split * (ROWS * E) + row[:, None] * E + word[None, :]
    for p in tl.static_range(PLANES):
        acc = tl.sum(accs[p] * _of_rows(share_WR, SLOTS_FIRST), 0)
        if SLOTS_FIRST:
            tl.store(scratch_ptr + tl.trans(where) + p * WORDS_PADDED, acc, mask=(row < ROWS)[None, :])
        else:
            tl.store(scratch_ptr + where + p * WORDS_PADDED, acc, mask=(row < ROWS)[:, None])


@triton.jit(do_not_specialize=["parts", "prefix_len"])
def decode_kernel(
    query_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, key_shift_ptr, value_shift_ptr, prefix_key_ptr,
    prefix_value_ptr, start_ptr, visible_ptr, out_scale_ptr, out_shift_ptr, out_ptr, scratch_ptr, counters_ptr,
    scaling_log2e, slots, prefix_len, parts, visible_stride, stride_b, stride_l, stride_h,
    QUERIES: tl.constexpr, HEADS: tl.constexpr, REPEAT: tl.constexpr, HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr, PLANES: tl.constexpr, WORDS: tl.constexpr, WORDS_PADDED: tl.constexpr,
    PER_TOKEN: tl.constexpr, PREFIX_TILE: tl.constexpr, PARTS_PADDED: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, WARPS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    SLOTS_FIRST: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = HEADS // REPEAT
    ROWS: tl.constexpr = QUERIES * REPEAT
    ROWS_PADDED: tl.constexpr = triton.next_power_of_2(ROWS)
    # the prefix has a program of its own, the last
    splits = parts - 1 if PREFIX_TILE > 0 else parts
    split = tl.program_id(0) % parts
    owner = tl.program_id(0) // parts
    batch = owner // GROUPS
    group = owner % GROUPS
    start = tl.load(start_ptr).to(tl.int32)
    query_ptr += batch.to(tl.int64) * stride_b
    scratch_ptr += owner.to(tl.int64) * parts * (ROWS * (2 + PLANES * WORDS_PADDED))

    score_gain = scaling_log2e
    prefix_gain = 1.0
    value_gain = 1.0
    if PER_TOKEN:
        value_gain = 1.0 / _VALUE_GAIN
    elif key_scale_ptr is not None:
        key_scale = tl.load(key_scale_ptr + group)
        score_gain = scaling_log2e * key_scale
        prefix_gain = 1.0 / key_scale
        value_gain = tl.load(value_scale_ptr + group)

    if PREFIX_TILE > 0 and split == splits:
        prefix_part(
            query_ptr, prefix_key_ptr, prefix_value_ptr, key_shift_ptr, value_shift_ptr, scratch_ptr, score_gain,
            prefix_gain, value_gain, prefix_len, parts, split, group, stride_l, stride_h, ROWS, ROWS_PADDED, REPEAT,
            HEAD_DIM, PLANES, WORDS, WORDS_PADDED, BITS, PREFIX_TILE,
        )  # fmt: skip
    else:
        _body_part(
            query_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, visible_ptr, scratch_ptr, score_gain,
            start, slots, parts, splits, split, owner, batch, group, visible_stride, stride_l, stride_h, QUERIES,
            REPEAT, HEAD_DIM, BITS, PLANES, WORDS, WORDS_PADDED, PER_TOKEN, WARPS, TILE, STAGES, SLOTS_FIRST, EVEN,
        )  # fmt: skip

    tl.debug_barrier()  # all of this program's stores stand before its arrival
    arrived = 0
    if PARTS_PADDED > 1:
        arrived = tl.atomic_add(counters_ptr + owner, 1, sem="acq_rel", scope="gpu")
    if arrived == parts - 1:
        if PARTS_PADDED > 1:
            tl.store(counters_ptr + owner, 0)
        finish(
            value_shift_ptr, scratch_ptr, out_scale_ptr, out_shift_ptr,
            out_ptr + batch.to(tl.int64) * (QUERIES * HEADS * HEAD_DIM), score_gain, value_gain, parts, group, ROWS,
            ROWS_PADDED, REPEAT, HEAD_DIM, PLANES, WORDS, WORDS_PADDED, HEADS, BITS, PARTS_PADDED, LOW, HIGH,
        )  # fmt: skip


def launch(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    key_shift: Tensor | None,
    value_shift: Tensor | None,
    prefix_key: Tensor,
    prefix_value: Tensor,
    start: Tensor,
    visible: Tensor | None,
    scaling: float,
    out_scale: Tensor | None,
    out_shift: Tensor | None,
    bits: int,
    encoding: torch.dtype,
    tiles: Tiles | None = None,
) -> Tensor:
    """`pq_ao::cache_attention` for at most `MAX_ROWS` query heads x queries a KV head; arguments as there.

    Args:
        tiles: how to cut the work; chosen by shape when None.

    Raises:
        ValueError: too many rows for one tile.
    """
    batch, queries, heads, head_dim = query.shape
    groups, slots = keys.shape[1:3]
    repeat = heads // groups
    if queries * repeat > MAX_ROWS:
        raise ValueError(
            f"query: {queries} queries of {repeat} heads a KV head; at most {MAX_ROWS} rows fit, "
            "use the prefill kernel."
        )
    stored = stored_as(keys, head_dim)
    query, visible = last_dim_dense(query), None if visible is None else last_dim_dense(visible)
    if tiles is None:
        processors = 132 if keys.device.type == "cpu" else _processors(keys.device)
        tiles = choose_tiles(batch * groups, slots, stored.bits, processors)
    if not 1 <= tiles.splits <= MAX_SPLITS:
        raise ValueError(f"tiles: splits={tiles.splits}; 1 to {MAX_SPLITS} are allowed.")
    if batch * groups > COUNTERS:
        raise ValueError(f"keys: {batch} x {groups} KV heads; at most {COUNTERS} are allowed.")
    prefix_len = prefix_key.shape[1]
    parts = tiles.splits + (prefix_len > 0)
    parts_padded = 1 if parts == 1 else 8 if parts <= 8 else 64  # few variants to compile
    rows = queries * repeat
    out = torch.empty(
        batch, queries, heads * head_dim, dtype=torch.float32 if out_scale is None else encoding, device=query.device
    )
    scratch = torch.empty(
        batch * groups * parts * rows * (2 + stored.planes * stored.words_padded),
        dtype=torch.float32,
        device=query.device,
    )
    low, high = code_range(bits)
    options = {} if tiles.registers is None else {"maxnreg": tiles.registers}
    decode_kernel[(batch * groups * parts,)](
        query, stored.view(keys), stored.view(values), key_scale, value_scale, key_shift, value_shift,
        prefix_key.contiguous(), prefix_value.contiguous(), start, visible, out_scale, out_shift, out, scratch,
        counters(query.device), scaling * LOG2E, slots, prefix_len, parts,
        0 if visible is None else visible.stride(0), query.stride(0), query.stride(1), query.stride(2),
        QUERIES=queries, HEADS=heads, REPEAT=repeat, HEAD_DIM=head_dim, BITS=stored.bits, PLANES=stored.planes,
        WORDS=stored.words, WORDS_PADDED=stored.words_padded, PER_TOKEN=key_scale is not None and key_scale.ndim == 3,
        PREFIX_TILE=min(triton.next_power_of_2(prefix_len), 4) if prefix_len else 0, PARTS_PADDED=parts_padded,
        LOW=low, HIGH=high, WARPS=tiles.warps, TILE=tiles.slots, STAGES=tiles.stages, SLOTS_FIRST=tiles.slots_first,
        EVEN=slots % (tiles.warps * tiles.slots) == 0,
        num_warps=tiles.warps, **options,
    )  # fmt: skip
    return out


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
