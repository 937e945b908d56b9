"""What prefill multiplies: the cache in a scratch of whole tiles, codes widened to the type that the queries have; and
the prefix.

INT4 and INT8 codes are whole numbers that fp16 and bfloat16 hold exactly. A query goes to the tensor core as it lies in
memory only beside operands of its own type: a converted one would be held in registers and handed over for every tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pq_ao.ops.kernels.stored import Stored, stored_as, stored_as_bytes
from pq_ao.ops.kernels.widen import plane, plane_column

ALIGN = 128  # slots of a scratch: a multiple of every tile's
_TILE = 64


def operand_dtype(query: torch.dtype, stored: torch.dtype) -> torch.dtype:
    """The scratch's dtype: floats stay as they are stored, codes become what the queries are."""
    if stored.is_floating_point:
        return stored
    return query if query in (torch.bfloat16, torch.float16) else torch.float16


def whole_tiles(slots: int) -> int:
    """Slots of a scratch for a cache of `slots`."""
    return triton.cdiv(slots, ALIGN) * ALIGN


@triton.jit(do_not_specialize=["first_owner", "queries"])
def operands_kernel(
    keys_ptr, values_ptr, start_ptr, wide_keys_ptr, wide_values_ptr, first_owner, slots, total, queries,
    BITS: tl.constexpr, PLANES: tl.constexpr, WORDS: tl.constexpr, WORDS_PADDED: tl.constexpr, HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Slots in use, and finite numbers after them up to the next whole tile."""
    end = tl.load(start_ptr).to(tl.int32) + queries
    tiles = tl.cdiv(total, TILE)
    target_owner = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles) * TILE
    kind: tl.constexpr = wide_keys_ptr.dtype.element_ty
    if first < tl.cdiv(end, ALIGN) * ALIGN:
        slot = first + tl.arange(0, TILE)
        word = tl.arange(0, WORDS_PADDED)
        is_word = (word < WORDS)[None, :]
        is_stored = ((slot < end) & (slot < slots))[:, None] & is_word
        is_written = (slot < total)[:, None] & is_word
        source = (first_owner + target_owner) * slots * WORDS + (slot[:, None] * WORDS + word[None, :])
        key_SN = tl.load(keys_ptr + source, mask=is_stored, other=0)
        value_SN = tl.load(values_ptr + source, mask=is_stored, other=0)
        for p in tl.static_range(PLANES):
            column = plane_column(word, p, PLANES, BITS, (HEAD_DIM + 1) // 2)[None, :]
            target = target_owner * total * HEAD_DIM + (slot[:, None] * HEAD_DIM + column)
            is_code = is_written & (column < HEAD_DIM)
            tl.store(wide_keys_ptr + target, plane(key_SN, p, PLANES, BITS).to(kind), mask=is_code)
            tl.store(wide_values_ptr + target, plane(value_SN, p, PLANES, BITS).to(kind), mask=is_code)


def _stored(keys: Tensor, head_dim: int) -> Stored:
    return stored_as(keys, head_dim) if keys.is_floating_point() else stored_as_bytes(keys)


def fill(
    wide: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, start: Tensor, queries: int, first_owner: int = 0
) -> None:
    """Writes keys and values of KV heads `first_owner` (as b * G + g) and on to `wide`, both [owners, T, D]."""
    owners, total, head_dim = wide[0].shape
    stored = _stored(keys, head_dim)
    operands_kernel[(owners * triton.cdiv(total, _TILE),)](
        stored.view(keys), stored.view(values), start, *wide, first_owner, keys.shape[2], total, queries,
        BITS=stored.bits, PLANES=stored.planes, WORDS=stored.words, WORDS_PADDED=stored.words_padded,
        HEAD_DIM=head_dim, TILE=_TILE, ALIGN=ALIGN, num_warps=4,
    )  # fmt: skip


@triton.jit
def split(x, OPERAND: tl.constexpr):
    """float32 as the sum of two operands."""
    high = x.to(OPERAND)
    return high, (x - high.to(tl.float32)).to(OPERAND)


@triton.jit(do_not_specialize=["tokens", "padded"])
def prefix_parts_kernel(
    key_ptr, value_ptr, key_shift_ptr, value_shift_ptr, parts_ptr, tokens, padded,
    HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A program has TILE tokens of one KV head; what follows the last is zeros."""
    kind: tl.constexpr = parts_ptr.dtype.element_ty
    group = tl.program_id(0)
    token = tl.program_id(1) * TILE + tl.arange(0, TILE)
    dim = tl.arange(0, DIM_PADDED)
    is_dim = (dim < HEAD_DIM)[None, :]
    is_cell = (token < tokens)[:, None] & is_dim
    source = group * tokens * HEAD_DIM + token[:, None] * HEAD_DIM + dim[None, :]
    parts_ptr += group * padded * HEAD_DIM + token[:, None] * HEAD_DIM + dim[None, :]
    stride = tl.num_programs(0) * padded * HEAD_DIM
    for which in tl.static_range(2):
        x = tl.load((value_ptr if which else key_ptr) + source, mask=is_cell, other=0.0).to(tl.float32)
        shift_ptr = value_shift_ptr if which else key_shift_ptr
        if shift_ptr is not None:
            x = tl.where(is_cell, x - tl.load(shift_ptr + group * HEAD_DIM + dim[None, :], mask=is_dim, other=0.0), 0.0)
        high, low = split(x, kind)
        tl.store(parts_ptr + 2 * which * stride, high, mask=is_dim)
        tl.store(parts_ptr + (2 * which + 1) * stride, low, mask=is_dim)


def prefix_parts(
    key: Tensor, value: Tensor, key_shift: Tensor | None, value_shift: Tensor | None, kind: torch.dtype, tile: int
) -> Tensor:
    """The prefix less the shifts, whose elements no operand of 2 bytes holds: each is the sum of two.

    Args:
        key: [G, N, D].
        value: [G, N, D].
        key_shift: float32 (G, 1, D) or None.
        value_shift: float32 (G, 1, D) or None.
        kind: dtype of the operands.
        tile: tokens of a tile.

    Returns:
        [4, G, N padded to whole tiles, D] of `kind`: keys and what they leave, values and what they leave.
    """
    groups, tokens, head_dim = key.shape
    padded = triton.cdiv(tokens, tile) * tile
    parts = torch.empty(4, groups, padded, head_dim, dtype=kind, device=key.device)
    prefix_parts_kernel[(groups, padded // tile)](
        key.contiguous(), value.contiguous(), key_shift, value_shift, parts, tokens, padded,
        HEAD_DIM=head_dim, DIM_PADDED=triton.next_power_of_2(head_dim), TILE=tile, num_warps=4,
    )  # fmt: skip
    return parts
