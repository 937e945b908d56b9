"""Attention of many queries over [prefix | cache]: flash attention whose keys and values are the stored codes.

A program owns a block of rows (query x query head of one KV head) and walks the prefix, then the slots that its
queries see. Codes are widened to fp16, which holds them exactly, either tile by tile here or in a pass before
(`widen_kernel`); scales act on scores and results. So prefill sees the very numbers that decode will see.

Shape suffixes: M rows, S slots of a tile, P prefix tokens of a tile, N words of a plane, D head dim (padded).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pq_ao.ops.kernels.interpret import quantize
from pq_ao.ops.kernels.stored import LOG2E, last_dim_dense, stored_as, stored_as_bytes
from pq_ao.ops.kernels.widen import operand_type, plane, plane_column
from pq_ao.ops.quantize import code_range

# as in decode_attention: hidden scores lie far below the lowest maximum
_HIDDEN = tl.constexpr(-1e30)
_LOWEST = tl.constexpr(-5e29)
_VALUE_GAIN = tl.constexpr(64.0)

# A pass that widens the whole cache takes 4 bytes of memory a code; beyond this many bytes tiles are widened instead.
WIDEN_LIMIT = 1 << 30


class Tiles(NamedTuple):
    """How prefill is cut.

    Attributes:
        rows: of a program, queries x query heads of a KV head.
        slots: of a tile.
        warps: of a program.
        stages: tiles in flight.
        widen_first: codes become fp16 in a pass before; otherwise tile by tile.
    """

    rows: int
    slots: int
    warps: int
    stages: int
    widen_first: bool


# Best first; the first that fits into shared memory is taken.
_TILES = ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 16, 4, 1))


def choose_tiles(rows: int, row_bytes: int, widened_bytes: int, shared_bytes: int) -> Tiles:
    """Tiles of prefill.

    Args:
        rows: queries x query heads of a KV head.
        row_bytes: of the keys of one slot, widened.
        widened_bytes: what widening the whole cache would take; 0 where it needs no widening.
        shared_bytes: of a block's shared memory.
    """

    def fits(tile_rows: int, slots: int, warps: int, stages: int) -> bool:
        return row_bytes * (tile_rows + 2 * slots * stages) <= shared_bytes and (tile_rows <= 64 or rows > 64)

    chosen = next((tiles for tiles in _TILES if fits(*tiles)), _TILES[-1])
    # a pass of its own pays where many blocks of rows read what it wrote
    return Tiles(*chosen, widen_first=widened_bytes <= WIDEN_LIMIT and rows > 256)


@triton.jit
def widen_kernel(
    keys_ptr, values_ptr, wide_keys_ptr, wide_values_ptr, start_ptr, slots, queries,
    BITS: tl.constexpr, PLANES: tl.constexpr, WORDS: tl.constexpr, WORDS_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Codes of all slots in use to fp16: bytes [B, G, S, WORDS] to [B, G, S, D]."""
    length = tl.load(start_ptr).to(tl.int32) + queries
    tiles = tl.cdiv(slots, TILE)
    owner = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles) * TILE
    if first < length:
        slot = first + tl.arange(0, TILE)
        byte = tl.arange(0, WORDS_PADDED)
        is_stored = (slot < slots)[:, None] & (byte < WORDS)[None, :]
        source = owner * slots * WORDS + (slot[:, None] * WORDS + byte[None, :])
        key_SN = tl.load(keys_ptr + source, mask=is_stored, other=0)
        value_SN = tl.load(values_ptr + source, mask=is_stored, other=0)
        for p in tl.static_range(PLANES):
            column = plane_column(byte, p, PLANES, BITS, (HEAD_DIM + 1) // 2)[None, :]
            target = owner * slots * HEAD_DIM + (slot[:, None] * HEAD_DIM + column)
            is_code = is_stored & (column < HEAD_DIM)
            tl.store(wide_keys_ptr + target, plane(key_SN, p, PLANES, BITS), mask=is_code)
            tl.store(wide_values_ptr + target, plane(value_SN, p, PLANES, BITS), mask=is_code)


@triton.jit
def _tile(
    acc_MD, m_M, l_M, queries, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, visible_ptr, first, length, slots,
    last_slot_M, score_gain, PLANES: tl.constexpr, WORDS: tl.constexpr, WORDS_PADDED: tl.constexpr,
    BITS: tl.constexpr, HEAD_DIM: tl.constexpr, PER_TOKEN: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    OPERAND: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of slots into the running softmax. Without MASKED every row sees every slot of it."""
    slot = first + tl.arange(0, TILE)
    word = tl.arange(0, WORDS_PADDED)
    offset_SN = slot[:, None] * WORDS + word[None, :]
    is_slot = slot < length
    if MASKED or WORDS != WORDS_PADDED:
        is_stored_SN = is_slot[:, None] & (word < WORDS)[None, :]
        key_SN = tl.load(keys_ptr + offset_SN, mask=is_stored_SN, other=0)
    else:
        key_SN = tl.load(keys_ptr + offset_SN)
    score_MS = tl.zeros([ROWS, TILE], tl.float32)
    for p in tl.static_range(PLANES):
        score_MS = tl.dot(queries[p], tl.trans(plane(key_SN, p, PLANES, BITS).to(OPERAND)), acc=score_MS)
    if PER_TOKEN:
        score_MS *= tl.load(key_scale_ptr + slot, mask=is_slot, other=1.0)[None, :]
    if MASKED:
        seen_MS = slot[None, :] <= last_slot_M[:, None]
        if visible_ptr is not None:
            seen_MS = seen_MS & (tl.load(visible_ptr + slot, mask=is_slot, other=0) != 0)[None, :]
        score_MS = tl.where(seen_MS, score_MS, _HIDDEN)
    new_m_M = tl.maximum(m_M, tl.max(score_MS, 1))
    share_MS = tl.exp2(score_MS * score_gain - (new_m_M * score_gain)[:, None])
    decay_M = tl.exp2((m_M - new_m_M) * score_gain)
    l_M = l_M * decay_M + tl.sum(share_MS, 1)
    if PER_TOKEN:
        share_MS *= (tl.load(value_scale_ptr + slot, mask=is_slot, other=0.0) * _VALUE_GAIN)[None, :]
    share_MS = share_MS.to(OPERAND)
    if MASKED or WORDS != WORDS_PADDED:
        value_SN = tl.load(values_ptr + offset_SN, mask=is_slot[:, None] & (word < WORDS)[None, :], other=0)
    else:
        value_SN = tl.load(values_ptr + offset_SN)
    new_accs = ()
    for p in tl.static_range(PLANES):
        acc_MN = acc_MD[p] * decay_M[:, None]
        new_accs += (tl.dot(share_MS, plane(value_SN, p, PLANES, BITS).to(OPERAND), acc=acc_MN),)
    return new_accs, new_m_M, l_M


@triton.jit(do_not_specialize=["num_queries", "prefix_len"])
def prefill_kernel(
    query_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, key_shift_ptr, value_shift_ptr, prefix_key_ptr,
    prefix_value_ptr, start_ptr, visible_ptr, out_scale_ptr, out_shift_ptr, out_ptr,
    scaling_log2e, slots, prefix_len, num_queries, visible_stride, stride_b, stride_l, stride_h,
    HEADS: tl.constexpr, REPEAT: tl.constexpr, HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr, PLANES: tl.constexpr, WORDS: tl.constexpr, WORDS_PADDED: tl.constexpr,
    PER_TOKEN: tl.constexpr, PREFIX_TILE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = HEADS // REPEAT
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    OPERAND: tl.constexpr = operand_type(keys_ptr.dtype.element_ty, BITS)
    blocks = tl.cdiv(num_queries * REPEAT, ROWS)
    owners = tl.num_programs(0) // blocks
    # the last queries see the most slots: they go first
    block = blocks - 1 - tl.program_id(0) // owners
    owner = tl.program_id(0) % owners
    batch = owner // GROUPS
    group = owner % GROUPS
    start = tl.load(start_ptr).to(tl.int32)

    row = block * ROWS + tl.arange(0, ROWS)
    query = row // REPEAT
    head = group * REPEAT + row % REPEAT
    is_row = query < num_queries
    last_slot_M = start + query

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

    word = tl.arange(0, WORDS_PADDED)
    query_ptr += batch.to(tl.int64) * stride_b
    queries = ()
    accs = ()
    for p in tl.static_range(PLANES):
        column = plane_column(word, p, PLANES, BITS, HALF)
        is_query_MN = is_row[:, None] & ((word < WORDS) & (column < HEAD_DIM))[None, :]
        offset_MN = (query * stride_l + head * stride_h)[:, None] + column[None, :]
        queries += (tl.load(query_ptr + offset_MN, mask=is_query_MN, other=0.0).to(OPERAND),)
        accs += (tl.zeros([ROWS, WORDS_PADDED], tl.float32),)
    m_M = tl.full([ROWS], _LOWEST, tl.float32)
    l_M = tl.zeros([ROWS], tl.float32)

    if PREFIX_TILE > 0:
        for first_token in tl.range(0, prefix_len, PREFIX_TILE, num_stages=1):
            token = first_token + tl.arange(0, PREFIX_TILE)
            is_token = token < prefix_len
            prefix_offset = (group * prefix_len + token) * HEAD_DIM
            score_MP = tl.zeros([ROWS, PREFIX_TILE], tl.float32)
            for p in tl.static_range(PLANES):
                column = plane_column(word, p, PLANES, BITS, HALF)
                is_column = (word < WORDS) & (column < HEAD_DIM)
                key_PN = tl.load(
                    prefix_key_ptr + prefix_offset[:, None] + column[None, :],
                    mask=is_token[:, None] & is_column[None, :],
                    other=0.0,
                ).to(tl.float32)
                if key_shift_ptr is not None:
                    key_PN -= tl.load(key_shift_ptr + group * HEAD_DIM + column, mask=is_column, other=0.0)[None, :]
                score_MP = tl.dot(queries[p], tl.trans(key_PN.to(OPERAND)), acc=score_MP)
            score_MP = tl.where(is_token[None, :], score_MP * prefix_gain, _HIDDEN)
            prefix_m_M = tl.maximum(m_M, tl.max(score_MP, 1))
            share_MP = tl.exp2((score_MP - prefix_m_M[:, None]) * score_gain)
            decay_M = tl.exp2((m_M - prefix_m_M) * score_gain)
            l_M = l_M * decay_M + tl.sum(share_MP, 1)
            m_M = prefix_m_M
            share_MP = share_MP.to(OPERAND)
            prefix_accs = ()
            for p in tl.static_range(PLANES):
                column = plane_column(word, p, PLANES, BITS, HALF)
                is_column = (word < WORDS) & (column < HEAD_DIM)
                value_PN = tl.load(
                    prefix_value_ptr + prefix_offset[:, None] + column[None, :],
                    mask=is_token[:, None] & is_column[None, :],
                    other=0.0,
                ).to(tl.float32)
                if value_shift_ptr is not None:
                    value_PN -= tl.load(value_shift_ptr + group * HEAD_DIM + column, mask=is_column, other=0.0)[None, :]
                prefix_accs += (tl.dot(share_MP, value_PN.to(OPERAND), acc=accs[p] * decay_M[:, None]),)
            accs = prefix_accs
        # from here on results count in codes
        code_accs = ()
        for p in tl.static_range(PLANES):
            code_accs += (accs[p] / value_gain,)
        accs = code_accs

    keys_ptr += owner.to(tl.int64) * slots * WORDS
    values_ptr += owner.to(tl.int64) * slots * WORDS
    if PER_TOKEN:
        key_scale_ptr += owner.to(tl.int64) * slots
        value_scale_ptr += owner.to(tl.int64) * slots
    if visible_ptr is not None:
        visible_ptr += batch.to(tl.int64) * visible_stride
    length = start + tl.minimum((block * ROWS + ROWS - 1) // REPEAT + 1, num_queries)
    # tiles that the block's first query sees whole need no mask
    plain = 0 if visible_ptr is not None else (start + block * ROWS // REPEAT + 1) // TILE * TILE
    if visible_ptr is None:
        for first_slot in tl.range(0, plain, TILE, num_stages=STAGES):
            accs, m_M, l_M = _tile(
                accs, m_M, l_M, queries, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, visible_ptr, first_slot,
                length, slots, last_slot_M, score_gain, PLANES, WORDS, WORDS_PADDED, BITS, HEAD_DIM, PER_TOKEN, ROWS,
                TILE, OPERAND, False,
            )  # fmt: skip
    for first_slot in tl.range(plain, length, TILE, num_stages=STAGES):
        accs, m_M, l_M = _tile(
            accs, m_M, l_M, queries, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, visible_ptr, first_slot,
            length, slots, last_slot_M, score_gain, PLANES, WORDS, WORDS_PADDED, BITS, HEAD_DIM, PER_TOKEN, ROWS,
            TILE, OPERAND, True,
        )  # fmt: skip

    gain_M = value_gain / tl.where(l_M > 0, l_M, 1.0)  # zeros where nothing is seen
    out_ptr += batch.to(tl.int64) * num_queries * (HEADS * HEAD_DIM)
    for p in tl.static_range(PLANES):
        column = plane_column(word, p, PLANES, BITS, HALF)
        is_column = (word < WORDS) & (column < HEAD_DIM)
        out_MN = accs[p] * gain_M[:, None]
        if value_shift_ptr is not None:
            out_MN += tl.load(value_shift_ptr + group * HEAD_DIM + column, mask=is_column, other=0.0)[None, :]
        is_cell_MN = is_row[:, None] & is_column[None, :]
        cell_MN = head[:, None] * HEAD_DIM + column[None, :]
        if out_scale_ptr is not None:
            if out_shift_ptr is not None:
                out_MN -= tl.load(out_shift_ptr + cell_MN, mask=is_cell_MN, other=0.0)
            out_MN = quantize(out_MN, tl.load(out_scale_ptr), LOW, HIGH)
        out_offset_MN = query[:, None] * (HEADS * HEAD_DIM) + cell_MN
        tl.store(out_ptr + out_offset_MN, out_MN.to(out_ptr.dtype.element_ty), mask=is_cell_MN)


def _widen(keys: Tensor, values: Tensor, start: Tensor, queries: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """fp16 codes [B, G, S, D] of both; slots that no query sees are left unwritten."""
    batch, groups, slots, _ = keys.shape
    stored = stored_as_bytes(keys)
    wide = [torch.empty(batch, groups, slots, head_dim, dtype=torch.float16, device=keys.device) for _ in range(2)]
    tile = 64
    widen_kernel[(batch * groups * triton.cdiv(slots, tile),)](
        stored.view(keys), stored.view(values), *wide, start, slots, queries, BITS=stored.bits, PLANES=stored.planes,
        WORDS=stored.words, WORDS_PADDED=stored.words_padded, HEAD_DIM=head_dim, TILE=tile, num_warps=4,
    )  # fmt: skip
    return wide[0], wide[1]


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
    """`pq_ao::cache_attention` for any number of queries; arguments as there.

    Args:
        tiles: how to cut the work; chosen by shape when None.
    """
    batch, queries, heads, head_dim = query.shape
    groups, slots = keys.shape[1:3]
    repeat = heads // groups
    query, visible = last_dim_dense(query), None if visible is None else last_dim_dense(visible)
    stored = stored_as(keys, head_dim)
    if tiles is None:
        row_bytes = triton.next_power_of_2(head_dim) * (4 if keys.dtype == torch.float32 else 2)
        widened_bytes = 0 if stored.bits == 16 else 4 * batch * groups * slots * head_dim
        tiles = choose_tiles(queries * repeat, row_bytes, widened_bytes, _shared_bytes(query.device))
    if stored.bits < 16 and tiles.widen_first:
        keys, values = _widen(keys, values, start, queries, head_dim)
        stored = stored_as(keys, head_dim)
    elif stored.bits < 16:
        stored = stored_as_bytes(keys)  # planes of bytes make longer matrix steps than planes of words
    out = torch.empty(
        batch, queries, heads * head_dim, dtype=torch.float32 if out_scale is None else encoding, device=query.device
    )
    prefix_len = prefix_key.shape[1]
    low, high = code_range(bits)
    prefill_kernel[(triton.cdiv(queries * repeat, tiles.rows) * batch * groups,)](
        query, stored.view(keys), stored.view(values), key_scale, value_scale, key_shift, value_shift,
        prefix_key.contiguous(), prefix_value.contiguous(), start, visible, out_scale, out_shift, out,
        scaling * LOG2E, slots, prefix_len, queries, 0 if visible is None else visible.stride(0),
        query.stride(0), query.stride(1), query.stride(2),
        HEADS=heads, REPEAT=repeat, HEAD_DIM=head_dim, BITS=stored.bits, PLANES=stored.planes, WORDS=stored.words,
        WORDS_PADDED=stored.words_padded, PER_TOKEN=key_scale is not None and key_scale.ndim == 3,
        PREFIX_TILE=16 if prefix_len else 0, LOW=low, HIGH=high, ROWS=tiles.rows, TILE=tiles.slots,
        STAGES=tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip
    return out


def _shared_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return 1 << 17
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
