"""What prefill multiplies: the cache in a scratch of whole tiles, codes widened to the type that the queries have.

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
