"""Attention of a few queries over the whole cache: split over its slots, reduced by the last program to arrive.

A program owns one KV head of one sequence and a share of its slots, and all query heads and queries that read them.
Codes whose rows fill the tensor core's tiles are walked by one warp (decode_codes), all else by several (decode_walk).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pq_ao.ops.kernels.decode_codes import codes_part
from pq_ao.ops.kernels.decode_parts import VALUE_GAIN, finish, prefix_part, store_out, write_part
from pq_ao.ops.kernels.decode_walk import walk_part
from pq_ao.ops.kernels.stored import LOG2E, Stored, last_dim_dense, stored_as
from pq_ao.ops.kernels.workspace import COUNTERS, counters
from pq_ao.ops.quantize import code_range

MAX_ROWS = 16  # the tensor core's tile has 16 rows whatever is asked of it

MAX_SPLITS = 63  # the last program to arrive reads them all, and the part of the prefix


class Tiles(NamedTuple):
    """How a decode step is cut.

    Attributes:
        warps: of a program.
        slots: of a warp's tile.
        stages: tiles in flight.
        splits: programs a KV head.
        slots_first: slots are the rows of the tensor core's tiles and queries its columns, at most 8 of them.
        registers: most a thread may use; None leaves it to the compiler.
    """

    warps: int
    slots: int
    stages: int
    splits: int
    slots_first: bool = True
    registers: int | None = None


def choose_tiles(kv_heads: int, slots: int, bits: int, processors: int, rows: int = 4) -> Tiles:
    """Tiles for `kv_heads` (batch x heads) caches of `slots` slots on a GPU of that many multiprocessors.

    On an H200 codes ran best by programs of one warp; registers and shared memory let 12 of them reside on a
    multiprocessor, and more would make a second wave. Floats, bound by memory, want two programs of two warps.
    """
    if bits == 16:
        wanted = min(2 * processors // kv_heads, triton.cdiv(slots, 64), 16)
        return Tiles(2, 32, 3, max(1, wanted), slots_first=False)
    if rows > 8:
        wanted = min(2 * processors // kv_heads, triton.cdiv(slots, 128), 16)
        return Tiles(4, 32, 3, max(1, wanted), slots_first=False)
    tiles = triton.cdiv(slots, 64)
    shares = triton.cdiv(tiles, max(1, min(12 * processors // kv_heads, 32)))
    return Tiles(1, 64, 3, triton.cdiv(tiles, shares), registers=144 if bits == 4 else 168)


@triton.jit(do_not_specialize=["parts", "prefix_len"])
def decode_kernel(
    query_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, key_shift_ptr, value_shift_ptr, prefix_key_ptr,
    prefix_value_ptr, start_ptr, visible_ptr, out_scale_ptr, out_shift_ptr, out_ptr, scratch_ptr, counters_ptr,
    scaling_log2e, slots, prefix_len, parts, visible_stride, stride_b, stride_l, stride_h,
    QUERIES: tl.constexpr, HEADS: tl.constexpr, REPEAT: tl.constexpr, HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr, PLANES: tl.constexpr, WORDS: tl.constexpr, WORDS_PADDED: tl.constexpr,
    PER_TOKEN: tl.constexpr, PREFIX_TILE: tl.constexpr, PARTS_PADDED: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, WARPS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    SLOTS_FIRST: tl.constexpr, EVEN: tl.constexpr, PREFIX_APART: tl.constexpr, CODES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    GROUPS: tl.constexpr = HEADS // REPEAT
    ROWS: tl.constexpr = QUERIES * REPEAT
    ROWS_PADDED: tl.constexpr = triton.next_power_of_2(ROWS)
    # the last program where the prefix has one of its own
    splits = parts - 1 if PREFIX_APART else parts
    split = tl.program_id(0) % parts
    owner = tl.program_id(0) // parts
    batch = owner // GROUPS
    group = owner % GROUPS
    start = tl.load(start_ptr).to(tl.int32)
    query_ptr += batch.to(tl.int64) * stride_b
    out_ptr += batch.to(tl.int64) * (QUERIES * HEADS * HEAD_DIM)
    scratch_ptr += owner.to(tl.int64) * parts * (ROWS * (2 + HEAD_DIM))

    score_gain = scaling_log2e
    prefix_gain = 1.0
    value_gain = 1.0
    if PER_TOKEN:
        value_gain = 1.0 / VALUE_GAIN
    elif key_scale_ptr is not None:
        key_scale = tl.load(key_scale_ptr + group)
        score_gain = scaling_log2e * key_scale
        prefix_gain = 1.0 / key_scale
        value_gain = tl.load(value_scale_ptr + group)

    if CODES:
        m_R, l_R, acc_RD = codes_part(
            query_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, key_shift_ptr, value_shift_ptr,
            prefix_key_ptr, prefix_value_ptr, visible_ptr, score_gain, prefix_gain, value_gain, prefix_len, start,
            slots, splits, split, splits if PREFIX_APART else 0, owner, batch, group, visible_stride, stride_l,
            stride_h, QUERIES, REPEAT, HEAD_DIM, BITS, WORDS, PER_TOKEN, PREFIX_TILE, TILE, STAGES, EVEN,
        )  # fmt: skip
        if PARTS_PADDED == 1:
            store_out(value_shift_ptr, out_scale_ptr, out_shift_ptr, out_ptr, l_R, acc_RD, value_gain, group, ROWS,
                      REPEAT, HEAD_DIM, HEADS, LOW, HIGH)  # fmt: skip
        else:
            write_part(scratch_ptr, m_R, l_R, acc_RD, parts, split, ROWS, HEAD_DIM)
    elif PREFIX_APART and split == splits:
        prefix_part(
            query_ptr, prefix_key_ptr, prefix_value_ptr, key_shift_ptr, value_shift_ptr, scratch_ptr, score_gain,
            prefix_gain, value_gain, prefix_len, parts, split, group, stride_l, stride_h, ROWS, ROWS_PADDED, REPEAT,
            HEAD_DIM, PREFIX_TILE,
        )  # fmt: skip
    else:
        walk_part(
            query_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, visible_ptr, scratch_ptr, score_gain,
            start, slots, parts, splits, split, owner, batch, group, visible_stride, stride_l, stride_h, QUERIES,
            REPEAT, HEAD_DIM, BITS, PLANES, WORDS, WORDS_PADDED, PER_TOKEN, WARPS, TILE, STAGES, SLOTS_FIRST, EVEN,
        )  # fmt: skip

    if PARTS_PADDED > 1 or not CODES:
        tl.debug_barrier()  # all of this program's stores stand before its arrival
        arrived = 0
        if PARTS_PADDED > 1:
            arrived = tl.atomic_add(counters_ptr + owner, 1, sem="acq_rel", scope="gpu")
        if arrived == parts - 1:
            if PARTS_PADDED > 1:
                tl.store(counters_ptr + owner, 0)
            finish(
                value_shift_ptr, scratch_ptr, out_scale_ptr, out_shift_ptr, out_ptr, score_gain, value_gain, parts,
                group, ROWS, ROWS_PADDED, REPEAT, HEAD_DIM, HEADS, PARTS_PADDED, LOW, HIGH,
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
    pdl: bool | None = None,
) -> Tensor:
    """`pq_ao::cache_attention` for at most `MAX_ROWS` query heads x queries a KV head; arguments as there.

    Args:
        tiles: how to cut the work; chosen by shape when None.
        pdl: programmatic dependent launch; where the GPU has it (compute capability 9.0) when None.

    Raises:
        ValueError: too many rows for one tile, or tiles that are not allowed.
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
        tiles = choose_tiles(batch * groups, slots, stored.bits, processors, queries * repeat)
    if not 1 <= tiles.splits <= MAX_SPLITS:
        raise ValueError(f"tiles: splits={tiles.splits}; 1 to {MAX_SPLITS} are allowed.")
    if tiles.slots_first and queries * repeat > 8:
        # triton 3.6 compiles 16 columns to wrong results (30 dB)
        raise ValueError(f"tiles: slots_first with {queries * repeat} rows; at most 8 are allowed.")
    if batch * groups > COUNTERS:
        raise ValueError(f"keys: {batch} x {groups} KV heads; at most {COUNTERS} are allowed.")
    prefix_len = prefix_key.shape[1]
    by_codes = _fills_tiles(stored, head_dim, tiles)
    # in a short walk the prefix would be what the others wait for, in a long one its own program costs more
    apart = prefix_len > 0 and (not by_codes or (tiles.splits > 1 and slots < 8 * tiles.slots * tiles.splits))
    parts = tiles.splits + apart
    parts_padded = 1 if parts == 1 else 8 if parts <= 8 else 64  # few variants to compile
    prefix_tile = 16 if by_codes else min(triton.next_power_of_2(prefix_len), 4)
    rows = queries * repeat
    out = torch.empty(
        batch, queries, heads * head_dim, dtype=torch.float32 if out_scale is None else encoding, device=query.device
    )
    scratch = torch.empty(
        0 if by_codes and parts == 1 else batch * groups * parts * rows * (2 + head_dim),
        dtype=torch.float32,
        device=query.device,
    )
    low, high = code_range(bits)
    if pdl is None:
        pdl = query.device.type == "cuda" and torch.cuda.get_device_capability(query.device)[0] >= 9
    options = {"launch_pdl": True} if pdl else {}
    if tiles.registers is not None:
        options["maxnreg"] = tiles.registers
    decode_kernel[(batch * groups * parts,)](
        query, stored.view(keys), stored.view(values), key_scale, value_scale, key_shift, value_shift,
        prefix_key.contiguous(), prefix_value.contiguous(), start, visible, out_scale, out_shift, out, scratch,
        counters(query.device), scaling * LOG2E, slots, prefix_len, parts,
        0 if visible is None else visible.stride(0), query.stride(0), query.stride(1), query.stride(2),
        QUERIES=queries, HEADS=heads, REPEAT=repeat, HEAD_DIM=head_dim, BITS=stored.bits, PLANES=stored.planes,
        WORDS=stored.words, WORDS_PADDED=stored.words_padded, PER_TOKEN=key_scale is not None and key_scale.ndim == 3,
        PREFIX_TILE=prefix_tile if prefix_len else 0, PARTS_PADDED=parts_padded,
        LOW=low, HIGH=high, WARPS=tiles.warps, TILE=tiles.slots, STAGES=tiles.stages, SLOTS_FIRST=tiles.slots_first,
        EVEN=slots % (tiles.warps * tiles.slots) == 0, PREFIX_APART=apart,
        CODES=by_codes, PDL=pdl, num_warps=tiles.warps, **options,
    )  # fmt: skip
    return out


def _fills_tiles(stored: Stored, head_dim: int, tiles: Tiles) -> bool:
    """Whether `codes_part` can walk these codes."""
    whole = stored.words % 16 == 0 and stored.words * stored.planes == head_dim and stored.words == stored.words_padded
    return stored.bits < 16 and stored.planes >= 4 and whole and tiles.warps == 1 and tiles.slots_first


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
