"""The pass before prefill that widens all codes in use to fp16, so that blocks of queries need not do it again."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pq_ao.ops.kernels.stored import stored_as_bytes
from pq_ao.ops.kernels.widen import plane, plane_column


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


def widen_cache(keys: Tensor, values: Tensor, start: Tensor, queries: int, head_dim: int) -> tuple[Tensor, Tensor]:
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
