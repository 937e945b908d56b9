"""Attention of a few queries over the whole cache: split over its slots, reduced by the last program to arrive.

A program owns one KV head of one sequence and a share of its slots, and all query heads and queries that read them.
Codes whose words fill the tensor core's tiles are walked by one warp (`decode_codes`), all else by `decode_walk`.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pq_ao.ops.kernels.decode_codes import codes_part
from pq_ao.ops.kernels.decode_parts import LOWEST, VALUE_GAIN, finish, merge_prefix, store_out, write_part
from pq_ao.ops.kernels.decode_walk import walk_part
from pq_ao.ops.kernels.early import launch_options, launches_early, wait
from pq_ao.ops.kernels.prefetch import prefetch
from pq_ao.ops.kernels.stored import LOG2E, Stored, last_dim_dense, stored_as
from pq_ao.ops.kernels.workspace import COUNTERS, counters
from pq_ao.ops.quantize import code_range

MAX_ROWS = 16  # of the tensor core's tile

MAX_COLUMNS = 8  # of its smallest

MAX_SPLITS = 63  # the last program to arrive reads them all, and the part of the prefix

_SCHEDULERS = 4  # of a multiprocessor
_TOGETHER = 2  # programs of one warp that a scheduler takes best where memory decides; more fit


class Tiles(NamedTuple):
    """How a decode step is cut.

    Attributes:
        warps: of a program.
        slots: of a warp's tile.
        stages: tiles in flight.
        splits: programs a KV head.
        slots_first: slots are the rows of the tensor core's tiles and queries its columns, at most `MAX_COLUMNS`.
        registers: most a thread may use; None leaves it to the compiler.
        prefix_apart: the prefix has one more program; where codes fill tiles it may do without.
        early: launched before the kernel in front has ended, where the GPU can.
    """

    warps: int
    slots: int
    stages: int
    splits: int
    slots_first: bool = True
    registers: int | None = None
    prefix_apart: bool = True
    early: bool = False


_LARGEST_HEAD = 512  # whose scores int32 holds: widened codes are at most 128, queries 32,639


def fills_tiles(stored: Stored, head_dim: int) -> bool:
    """Whether `decode_codes` can walk what is stored: codes whose words fill the tensor core's tiles."""
    whole = stored.words % 16 == 0 and stored.words == stored.words_padded and head_dim <= _LARGEST_HEAD
    return stored.planes >= 4 and whole and stored.words * stored.planes == head_dim


def choose_tiles(kv_heads: int, slots: int, rows: int, stored: Stored, head_dim: int, processors: int) -> Tiles:
    """Tiles for `kv_heads` (batch x heads) caches of `slots` slots on a GPU of that many multiprocessors."""
    if stored.bits == 16:
        # floats need no widening, which is what slots as rows make cheap, and move better along their rows
        wanted = min(triton.cdiv(processors, kv_heads), triton.cdiv(slots, 64), 16)
        return Tiles(warps=2, slots=32, stages=3, splits=wanted, slots_first=False)
    if rows > MAX_COLUMNS:
        wanted = min(2 * processors // kv_heads, triton.cdiv(slots, 128), 16)
        return Tiles(warps=4, slots=32, stages=3, splits=max(1, wanted), slots_first=False)
    if fills_tiles(stored, head_dim):
        return _tiles_of_codes(kv_heads, slots, stored.bits, processors)
    # where many heads keep the GPU busy a program gets some tiles, or its beginning and end would be most of it
    tiles = triton.cdiv(slots, 64)
    wanted = min(9 * processors // kv_heads - 1, tiles // 5 if kv_heads > 16 else tiles, 32)
    return Tiles(warps=1, slots=64, stages=3, splits=max(1, wanted))


def _tiles_of_codes(kv_heads: int, slots: int, bits: int, processors: int) -> Tiles:
    """From a sweep on an H200: packed INT4, head dim 128, 8 to 1,024 KV heads, 1,024 to 8,192 slots."""
    codes = Tiles(warps=1, slots=32, stages=3, splits=1)
    # the walk of one share and the sum of all parts are shortest together at about this many
    wanted = max(1, min(math.isqrt(slots // 4), triton.cdiv(slots, codes.slots), MAX_SPLITS))
    at_once = _SCHEDULERS * processors  # a second program would slow the first
    splits = max(1, min(wanted, at_once // kv_heads))
    if kv_heads > at_once or (splits < wanted and slots > 1024 * splits):
        # bound by bandwidth; launched early they would take places unevenly
        splits = max(1, min(wanted, _TOGETHER * at_once // kv_heads))
        return codes._replace(splits=splits, registers=144 if bits == 4 else 168, prefix_apart=False)
    # a walk alone on its scheduler, where it is long enough, wants more in flight; codes of 8 bits leave no room for it
    stages = 4 if bits == 4 and slots >= 512 * splits else 3
    # the prefix's program, too, wants a scheduler of its own; launched early, more than one program a multiprocessor
    # took longer
    early = kv_heads * splits <= processors
    return codes._replace(stages=stages, splits=splits, prefix_apart=kv_heads * (splits + 1) <= at_once, early=early)


@triton.jit(do_not_specialize=["parts", "prefix_len"])
def decode_kernel(
    query_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, key_shift_ptr, value_shift_ptr, prefix_key_ptr,
    prefix_value_ptr, start_ptr, visible_ptr, out_scale_ptr, out_shift_ptr, out_ptr, scratch_ptr, counters_ptr,
    scaling_log2e, slots, prefix_len, parts, visible_stride, stride_b, stride_l, stride_h,
    QUERIES: tl.constexpr, HEADS: tl.constexpr, REPEAT: tl.constexpr, HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr, PLANES: tl.constexpr, WORDS: tl.constexpr, WORDS_PADDED: tl.constexpr,
    PER_TOKEN: tl.constexpr, CODES: tl.constexpr, PREFIX: tl.constexpr, PREFIX_APART: tl.constexpr,
    ONE_PART: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, WARPS: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr, SLOTS_FIRST: tl.constexpr, EVEN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = HEADS // REPEAT
    ROWS: tl.constexpr = QUERIES * REPEAT
    # the last program where the prefix has one of its own
    splits = parts - 1 if PREFIX_APART else parts
    split = tl.program_id(0) % parts
    owner = tl.program_id(0) // parts
    batch = owner // GROUPS
    group = owner % GROUPS
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
    if EARLY:
        # what `store_out` reads when all else is done
        if value_shift_ptr is not None:
            prefetch(value_shift_ptr + group * HEAD_DIM, 4 * HEAD_DIM)
        if out_scale_ptr is not None:
            prefetch(out_scale_ptr, 4)
        if out_shift_ptr is not None:
            prefetch(out_shift_ptr + group * REPEAT * HEAD_DIM, 4 * REPEAT * HEAD_DIM)
    wait(EARLY)
    start = tl.load(start_ptr).to(tl.int32)

    if CODES:
        m_R, l_R, acc_RD = codes_part(
            query_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, visible_ptr, score_gain, start, slots,
            splits, split, owner, batch, group, visible_stride, stride_l, stride_h, QUERIES, REPEAT, BITS, WORDS,
            PER_TOKEN, TILE, STAGES, EVEN,
        )  # fmt: skip
        if PREFIX and split == (splits if PREFIX_APART else 0):
            m_R, l_R, acc_RD = merge_prefix(
                m_R, l_R, acc_RD, query_ptr, key_shift_ptr, value_shift_ptr, prefix_key_ptr, prefix_value_ptr,
                score_gain, prefix_gain, value_gain, prefix_len, group, stride_l, stride_h, ROWS, REPEAT, HEAD_DIM,
            )  # fmt: skip
        if ONE_PART:
            store_out(
                value_shift_ptr, out_scale_ptr, out_shift_ptr, out_ptr, l_R, acc_RD, value_gain, group, ROWS, REPEAT,
                HEAD_DIM, HEADS, LOW, HIGH,
            )  # fmt: skip
        else:
            write_part(scratch_ptr, m_R, l_R, acc_RD, parts, split, ROWS, HEAD_DIM)
    elif PREFIX_APART and split == splits:
        R: tl.constexpr = triton.next_power_of_2(ROWS)
        m_R, l_R, acc_RD = merge_prefix(
            tl.full([R], LOWEST, tl.float32), tl.zeros([R], tl.float32),
            tl.zeros([R, triton.next_power_of_2(HEAD_DIM)], tl.float32), query_ptr, key_shift_ptr, value_shift_ptr,
            prefix_key_ptr, prefix_value_ptr, score_gain, prefix_gain, value_gain, prefix_len, group, stride_l,
            stride_h, ROWS, REPEAT, HEAD_DIM,
        )  # fmt: skip
        write_part(scratch_ptr, m_R, l_R, acc_RD, parts, split, ROWS, HEAD_DIM)
    else:
        walk_part(
            query_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr, visible_ptr, scratch_ptr, score_gain,
            start, slots, parts, splits, split, owner, batch, group, visible_stride, stride_l, stride_h, QUERIES,
            REPEAT, HEAD_DIM, BITS, PLANES, WORDS, WORDS_PADDED, PER_TOKEN, WARPS, TILE, STAGES, SLOTS_FIRST, EVEN,
        )  # fmt: skip

    if not (CODES and ONE_PART):
        tl.debug_barrier()  # all of this program's stores stand before its arrival
        arrived = tl.atomic_add(counters_ptr + owner, 1, sem="acq_rel", scope="gpu")
        if arrived == parts - 1:
            tl.store(counters_ptr + owner, 0)
            finish(
                value_shift_ptr, scratch_ptr, out_scale_ptr, out_shift_ptr, out_ptr, score_gain, value_gain, parts,
                group, ROWS, REPEAT, HEAD_DIM, HEADS, LOW, HIGH,
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
    codes: str = "even",
) -> Tensor:
    """`pq_ao::cache_attention` for at most `MAX_ROWS` query heads x queries a KV head; arguments as there.

    Args:
        tiles: how to cut the work; chosen by shape when None.

    Raises:
        ValueError: too many rows for one tile, or tiles that are not allowed.
    """
    batch, queries, heads, head_dim = query.shape
    groups, slots = keys.shape[1:3]
    repeat = heads // groups
    rows = queries * repeat
    if rows > MAX_ROWS:
        raise ValueError(
            f"query: {queries} queries of {repeat} heads a KV head; at most {MAX_ROWS} rows fit, "
            "use the prefill kernel."
        )
    if batch * groups > COUNTERS:
        raise ValueError(f"keys: {batch} x {groups} KV heads; at most {COUNTERS} are allowed.")
    stored = stored_as(keys, head_dim)
    query, visible = last_dim_dense(query), None if visible is None else last_dim_dense(visible)
    if tiles is None:
        tiles = choose_tiles(batch * groups, slots, rows, stored, head_dim, _processors(keys.device))
    if not 1 <= tiles.splits <= MAX_SPLITS:
        raise ValueError(f"tiles: splits={tiles.splits}; 1 to {MAX_SPLITS} are allowed.")
    if tiles.slots_first and rows > MAX_COLUMNS:
        raise ValueError(f"tiles: slots_first with {rows} rows; at most {MAX_COLUMNS} are allowed.")
    prefix_len = prefix_key.shape[1]
    by_codes = tiles.warps == 1 and tiles.slots_first and fills_tiles(stored, head_dim)
    apart = prefix_len > 0 and (tiles.prefix_apart or not by_codes)
    parts = tiles.splits + apart
    out = torch.empty(
        batch, queries, heads * head_dim, dtype=torch.float32 if out_scale is None else encoding, device=query.device
    )
    scratch = torch.empty(batch * groups * parts * rows * (2 + head_dim), dtype=torch.float32, device=query.device)
    low, high = code_range(bits, codes)
    early = tiles.early and launches_early(query.device)
    options = launch_options(early) | ({} if tiles.registers is None else {"maxnreg": tiles.registers})
    decode_kernel[(batch * groups * parts,)](
        query, stored.view(keys), stored.view(values), key_scale, value_scale, key_shift, value_shift,
        prefix_key.contiguous(), prefix_value.contiguous(), start, visible, out_scale, out_shift, out, scratch,
        counters(query.device), scaling * LOG2E, slots, prefix_len, parts,
        0 if visible is None else visible.stride(0), query.stride(0), query.stride(1), query.stride(2),
        QUERIES=queries, HEADS=heads, REPEAT=repeat, HEAD_DIM=head_dim, BITS=stored.bits, PLANES=stored.planes,
        WORDS=stored.words, WORDS_PADDED=stored.words_padded, PER_TOKEN=key_scale is not None and key_scale.ndim == 3,
        CODES=by_codes, PREFIX=prefix_len > 0, PREFIX_APART=apart, ONE_PART=parts == 1, LOW=low, HIGH=high,
        WARPS=tiles.warps, TILE=tiles.slots, STAGES=tiles.stages, SLOTS_FIRST=tiles.slots_first,
        EVEN=slots % (tiles.warps * tiles.slots) == 0, EARLY=early, num_warps=tiles.warps, **options,
    )  # fmt: skip
    return out


def _processors(device: torch.device) -> int:
    return 132 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
