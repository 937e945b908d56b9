"""Attention of many queries over [prefix | cache]: flash attention whose keys and values are the stored codes.

A pass before widens the codes (`prefill_operands`). Then a program owns a block of rows (query x query head of one KV
head) and walks the slots that its queries see, then the prefix. Scales act on scores and results, so prefill sees the
very numbers that decode will see.

An owner is one KV head of one batch row.
Shape suffixes: M rows, S slots of a tile, P prefix tokens of a tile, D head dim (padded).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pq_ao.ops.kernels import prefill_operands
from pq_ao.ops.kernels.codes import nearest_code, stored_code
from pq_ao.ops.kernels.interpret import INTERPRETED
from pq_ao.ops.kernels.prefill_operands import split
from pq_ao.ops.kernels.stored import LOG2E, last_dim_dense
from pq_ao.ops.kernels.workspace import has_descriptors
from pq_ao.ops.quantize import code_range

# as in decode_attention: hidden scores lie far below the lowest maximum
_HIDDEN = tl.constexpr(-1e30)
_LOWEST = tl.constexpr(-5e29)
_VALUE_GAIN = tl.constexpr(64.0)

_PREFIX_TILE = 16  # tokens

# Owners whose operands exceed this many bytes go one part after another through one scratch.
SCRATCH_LIMIT = 1 << 28
# Programs that run together read few owners' operands, which then stay in the L2 cache ...
_TOGETHER = 8
_TOGETHER_BYTES = 32 << 20  # ... and take at most this much of it


class Tiles(NamedTuple):
    """How prefill is cut.

    Attributes:
        rows: of a program, queries x query heads of a KV head.
        slots: of a tile.
        warps: of a program.
        stages: tiles in flight.
        tma: tiles come by descriptor (compute capability 9.0 and newer).
    """

    rows: int
    slots: int
    warps: int
    stages: int
    tma: bool = False

    def shared_bytes(self, row_bytes: int) -> int:
        """Shared memory of a program: queries, keys and values, and barriers."""
        return row_bytes * (self.rows + 2 * self.slots * self.stages) + 1024


# Best first; the first that fits is taken. By descriptors two programs of 64 rows fill a processor's time better than
# one of 128; by pointers it is the other way round.
_TILES = (
    Tiles(64, 64, 4, 3, tma=True),
    Tiles(128, 64, 8, 3),
    Tiles(128, 64, 8, 2),
    Tiles(64, 64, 4, 2),
    Tiles(64, 32, 4, 2),
    Tiles(32, 16, 4, 1),
)


def choose_tiles(rows: int, row_bytes: int, shared_bytes: int, tma: bool) -> Tiles:
    """Tiles of prefill.

    Args:
        rows: queries x query heads of a KV head.
        row_bytes: of the keys of one slot, widened.
        shared_bytes: of a block's shared memory.
        tma: whether descriptors can be used.
    """
    for tiles in _TILES:
        is_large = tiles.rows > 64 and rows <= 64
        if tiles.shared_bytes(row_bytes) <= shared_bytes and not is_large and (tma or not tiles.tma):
            return tiles
    return _TILES[-1]


@triton.jit
def _prefix(
    acc_MD, m_M, l_M, query_MD, prefix_ptr, stride, prefix_len, score_gain, key_scale, HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr, PREFIX_TILE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """The prefix into the running softmax, whose scores count in codes. Nothing is rounded to operands."""
    for first in tl.range(0, prefix_len, PREFIX_TILE, num_stages=1):
        tile_ptr = prefix_ptr + first * HEAD_DIM
        key_high_PD = _load(tile_ptr, 0, 0, HEAD_DIM, DIM_PADDED, PREFIX_TILE, False).to(OPERAND)
        key_low_PD = _load(tile_ptr + stride, 0, 0, HEAD_DIM, DIM_PADDED, PREFIX_TILE, False).to(OPERAND)
        value_high_PD = _load(tile_ptr + 2 * stride, 0, 0, HEAD_DIM, DIM_PADDED, PREFIX_TILE, False).to(OPERAND)
        value_low_PD = _load(tile_ptr + 3 * stride, 0, 0, HEAD_DIM, DIM_PADDED, PREFIX_TILE, False).to(OPERAND)
        score_MP = tl.dot(query_MD, tl.trans(key_low_PD))
        score_MP = tl.dot(query_MD, tl.trans(key_high_PD), acc=score_MP)
        is_token = first + tl.arange(0, PREFIX_TILE) < prefix_len
        score_MP = tl.where(is_token[None, :], score_MP / key_scale, _HIDDEN)
        new_m_M = tl.maximum(m_M, tl.max(score_MP, 1))
        share_MP = tl.exp2((score_MP - new_m_M[:, None]) * score_gain)
        decay_M = tl.exp2((m_M - new_m_M) * score_gain)
        l_M = l_M * decay_M + tl.sum(share_MP, 1)
        m_M = new_m_M
        high_MP, low_MP = split(share_MP, OPERAND)
        acc_MD = tl.dot(low_MP, value_high_PD, acc=acc_MD * decay_M[:, None])
        acc_MD = tl.dot(high_MP, value_low_PD, acc=acc_MD)
        acc_MD = tl.dot(high_MP, value_high_PD, acc=acc_MD)
    return acc_MD, m_M, l_M


@triton.jit
def _load(source, row, first, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr, TILE: tl.constexpr, TMA: tl.constexpr):
    """Operands [TILE, DIM_PADDED] from slot `first` on, up to a whole tile always filled."""
    if TMA:
        out = source.load([row + first, 0])
    else:
        dim = tl.arange(0, DIM_PADDED)
        offset = (first + tl.arange(0, TILE))[:, None] * HEAD_DIM + dim[None, :]
        if DIM_PADDED == HEAD_DIM:
            out = tl.load(source + offset)
        else:
            out = tl.load(source + offset, mask=(dim < HEAD_DIM)[None, :], other=0.0)
    return out


@triton.jit
def _tile(
    acc_MD, m_M, l_M, query_MD, keys, values, key_scale_ptr, value_scale_ptr, visible_ptr, row, first, plain, end,
    last_slot_M, score_gain, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr, PER_TOKEN: tl.constexpr,
    TILE: tl.constexpr, TMA: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """One tile into the running softmax. Before slot `plain` every row sees every slot, but for padding."""
    slot = first + tl.arange(0, TILE)
    is_slot = slot < end
    key_SD = _load(keys, row, first, HEAD_DIM, DIM_PADDED, TILE, TMA).to(OPERAND)
    score_MS = tl.dot(query_MD, tl.trans(key_SD))
    if PER_TOKEN:
        score_MS *= tl.load(key_scale_ptr + slot, mask=is_slot, other=1.0)[None, :]
    if visible_ptr is not None:
        is_visible = tl.load(visible_ptr + slot, mask=is_slot, other=0) != 0
        score_MS = tl.where((slot[None, :] <= last_slot_M[:, None]) & is_visible[None, :], score_MS, _HIDDEN)
    elif first >= plain:
        score_MS = tl.where(slot[None, :] <= last_slot_M[:, None], score_MS, _HIDDEN)
    new_m_M = tl.maximum(m_M, tl.max(score_MS, 1))
    share_MS = tl.exp2(score_MS * score_gain - (new_m_M * score_gain)[:, None])
    decay_M = tl.exp2((m_M - new_m_M) * score_gain)
    l_M = l_M * decay_M + tl.sum(share_MS, 1)
    if PER_TOKEN:
        share_MS *= (tl.load(value_scale_ptr + slot, mask=is_slot, other=0.0) * _VALUE_GAIN)[None, :]
    value_SD = _load(values, row, first, HEAD_DIM, DIM_PADDED, TILE, TMA).to(OPERAND)
    acc_MD = tl.dot(share_MS.to(OPERAND), value_SD, acc=acc_MD * decay_M[:, None])
    return acc_MD, new_m_M, l_M


@triton.jit(do_not_specialize=["first_owner", "owners", "together", "prefix_len", "num_queries"])
def prefill_kernel(
    query_ptr, keys, values, key_scale_ptr, value_scale_ptr, value_shift_ptr, prefix_ptr, start_ptr, visible_ptr,
    out_scale_ptr, out_shift_ptr, out_ptr,
    scaling_log2e, first_owner, owners, together, slots, total, prefix_len, num_queries, visible_stride, stride_b,
    stride_l, stride_h,
    HEADS: tl.constexpr, REPEAT: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    PER_TOKEN: tl.constexpr, PREFIX_TILE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """`keys`, `values`: the scratch [owners, T, D], by descriptors of tiles or by pointers; `prefix_ptr`: its parts
    (see `prefix_parts`)."""
    GROUPS: tl.constexpr = HEADS // REPEAT
    KIND: tl.constexpr = keys.dtype if TMA else keys.dtype.element_ty
    # the interpreter multiplies the bits of bfloat16
    OPERAND: tl.constexpr = tl.float32 if INTERPRETED and KIND == tl.bfloat16 else KIND
    # The last queries see the most slots: of owners that run together, they go first.
    blocks = tl.cdiv(num_queries * REPEAT, ROWS)
    part = tl.program_id(0) // (blocks * together)
    within = tl.program_id(0) - part * (blocks * together)
    width = tl.minimum(owners - part * together, together)
    block = blocks - 1 - within // width
    scratch_owner = part * together + within % width
    owner = first_owner + scratch_owner
    batch = owner // GROUPS
    group = owner % GROUPS
    start = tl.load(start_ptr).to(tl.int32)

    row = block * ROWS + tl.arange(0, ROWS)
    query = row // REPEAT
    head = group * REPEAT + row % REPEAT
    last_slot_M = start + query
    dim = tl.arange(0, DIM_PADDED)
    is_dim = dim < HEAD_DIM
    is_cell_MD = (query < num_queries)[:, None] & is_dim[None, :]
    query_ptr += batch.to(tl.int64) * stride_b
    query_offset_MD = (query * stride_l + head * stride_h)[:, None] + dim[None, :]
    query_MD = tl.load(query_ptr + query_offset_MD, mask=is_cell_MD, other=0.0).to(OPERAND)

    key_scale = 1.0
    value_gain = 1.0
    if PER_TOKEN:
        value_gain = 1.0 / _VALUE_GAIN
        key_scale_ptr += owner.to(tl.int64) * slots
        value_scale_ptr += owner.to(tl.int64) * slots
    elif key_scale_ptr is not None:
        key_scale = tl.load(key_scale_ptr + group)
        value_gain = tl.load(value_scale_ptr + group)
    score_gain = scaling_log2e * key_scale
    if value_shift_ptr is not None:
        value_shift_ptr += group * HEAD_DIM
    if visible_ptr is not None:
        visible_ptr += batch.to(tl.int64) * visible_stride
    first_row = scratch_owner * total
    if not TMA:
        keys += scratch_owner.to(tl.int64) * total * HEAD_DIM
        values += scratch_owner.to(tl.int64) * total * HEAD_DIM

    m_M = tl.full([ROWS], _LOWEST, tl.float32)
    l_M = tl.zeros([ROWS], tl.float32)
    acc_MD = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    end = start + tl.minimum((block * ROWS + ROWS - 1) // REPEAT + 1, num_queries)
    plain = (start + block * ROWS // REPEAT + 1) // TILE * TILE
    for first in tl.range(0, end, TILE, num_stages=STAGES):
        acc_MD, m_M, l_M = _tile(
            acc_MD, m_M, l_M, query_MD, keys, values, key_scale_ptr, value_scale_ptr, visible_ptr, first_row, first,
            plain, end, last_slot_M, score_gain, HEAD_DIM, DIM_PADDED, PER_TOKEN, TILE, TMA, OPERAND,
        )  # fmt: skip
    if PREFIX_TILE > 0:  # last, for its loads would delay those of the first tiles
        padded = tl.cdiv(prefix_len, PREFIX_TILE) * PREFIX_TILE * HEAD_DIM
        acc_MD, m_M, l_M = _prefix(
            acc_MD * value_gain, m_M, l_M, query_MD, prefix_ptr + group * padded, GROUPS * padded, prefix_len,
            score_gain, key_scale, HEAD_DIM, DIM_PADDED, PREFIX_TILE, OPERAND,
        )  # fmt: skip
        value_gain = 1.0

    gain_M = value_gain / tl.where(l_M > 0, l_M, 1.0)  # zeros where nothing is seen
    cell_MD = head[:, None] * HEAD_DIM + dim[None, :]
    offset_MD = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    if value_shift_ptr is not None:
        offset_MD += tl.load(value_shift_ptr + dim, mask=is_dim, other=0.0)[None, :]
    if out_scale_ptr is not None:
        part = tl.div_rn(1.0, tl.load(out_scale_ptr))
        if out_shift_ptr is not None:
            offset_MD -= tl.load(out_shift_ptr + cell_MD, mask=is_cell_MD, other=0.0)
        out_MD = tl.fma(acc_MD, (gain_M * part)[:, None], offset_MD * part)
        out_MD = stored_code(nearest_code(out_MD, LOW, HIGH), out_ptr.dtype.element_ty)
    else:
        out_MD = tl.fma(acc_MD, gain_M[:, None], offset_MD)
    out_ptr += batch.to(tl.int64) * num_queries * (HEADS * HEAD_DIM)
    out_offset_MD = query[:, None] * (HEADS * HEAD_DIM) + cell_MD
    tl.store(out_ptr + out_offset_MD, out_MD, mask=is_cell_MD)


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
    """`pq_ao::cache_attention` for any number of queries; arguments as there.

    Args:
        tiles: how to cut the work; chosen by shape when None.
    """
    batch, queries, heads, head_dim = query.shape
    groups, slots = keys.shape[1:3]
    repeat, prefix_len = heads // groups, prefix_key.shape[1]
    query, visible = last_dim_dense(query), None if visible is None else last_dim_dense(visible)
    kind = prefill_operands.operand_dtype(query.dtype, keys.dtype)
    padded = max(16, triton.next_power_of_2(head_dim))
    if tiles is None:
        # of 2-byte numbers; rows of a descriptor are multiples of 16 bytes
        tma = kind.itemsize == 2 and head_dim % 8 == 0 and has_descriptors(query.device)
        tiles = choose_tiles(queries * repeat, padded * kind.itemsize, _shared_bytes(query.device), tma)
    total = prefill_operands.whole_tiles(slots)
    owner_bytes = 2 * total * head_dim * kind.itemsize
    together = min(_TOGETHER, max(1, _TOGETHER_BYTES // owner_bytes))
    at_once = min(batch * groups, max(1, SCRATCH_LIMIT // owner_bytes))
    out = torch.empty(
        batch, queries, heads * head_dim, dtype=torch.float32 if out_scale is None else encoding, device=query.device
    )
    scratch = torch.empty(2, at_once, total, head_dim, dtype=kind, device=query.device)
    low, high = code_range(bits, codes)
    prefix = None
    if prefix_len:
        prefix = prefill_operands.prefix_parts(prefix_key, prefix_value, key_shift, value_shift, kind, _PREFIX_TILE)
    for first_owner in range(0, batch * groups, at_once):
        owners = min(at_once, batch * groups - first_owner)
        wide = (scratch[0, :owners], scratch[1, :owners])
        prefill_operands.fill(wide, keys, values, start, queries, first_owner)
        if tiles.tma:
            block = [tiles.slots, padded]
            wide = tuple(TensorDescriptor.from_tensor(w.view(owners * total, head_dim), block) for w in wide)
        prefill_kernel[(triton.cdiv(queries * repeat, tiles.rows) * owners,)](
            query, *wide, key_scale, value_scale, value_shift, prefix, start, visible, out_scale, out_shift, out,
            scaling * LOG2E, first_owner, owners, together, slots, total, prefix_len, queries,
            0 if visible is None else visible.stride(0), query.stride(0), query.stride(1), query.stride(2),
            HEADS=heads, REPEAT=repeat, HEAD_DIM=head_dim, DIM_PADDED=padded,
            PER_TOKEN=key_scale is not None and key_scale.ndim == 3, PREFIX_TILE=_PREFIX_TILE if prefix_len else 0,
            LOW=low, HIGH=high, ROWS=tiles.rows, TILE=tiles.slots, STAGES=tiles.stages, TMA=tiles.tma,
            num_warps=tiles.warps,
        )  # fmt: skip
    return out


def _shared_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return 1 << 17
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
