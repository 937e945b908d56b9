"""Packed INT4 weights to one byte a code, float8_e4m3fn or int8: a pass over 32-bit words, bound by memory."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pq_ao.ops.kernels.asm import e4m3_words, int8_words

WORD = 4  # bytes


@dataclass(frozen=True)
class UnpackConfig:
    """`rows` of a program and `words` of each, powers of two; launch option `warps`."""

    rows: int
    words: int
    warps: int


@triton.jit
def unpack_kernel(
    w_ptr,
    out_ptr,
    outs,
    ROW_WORDS: tl.constexpr,
    FLOAT8: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """int32 words [N, W] of packed codes to [N, 2 W]: low nibbles first, then high ones."""
    COLUMNS: tl.constexpr = (ROW_WORDS + WORDS - 1) // WORDS
    n = (tl.program_id(0) // COLUMNS) * ROWS + tl.arange(0, ROWS)
    word = (tl.program_id(0) % COLUMNS) * WORDS + tl.arange(0, WORDS)
    row = n.to(tl.int64)[:, None] * ROW_WORDS
    mask = (n < outs)[:, None]
    if ROW_WORDS % WORDS != 0:
        mask = mask & (word < ROW_WORDS)[None, :]
    packed = tl.load(w_ptr + row + word[None, :], mask=mask, other=0, eviction_policy="evict_first")
    low, high = e4m3_words(packed) if FLOAT8 else int8_words(packed)
    tl.store(out_ptr + 2 * row + word[None, :], low, mask=mask)
    tl.store(out_ptr + 2 * row + (ROW_WORDS + word[None, :]), high, mask=mask)


def unpack_config(row_words: int) -> UnpackConfig:
    """64 bytes a thread, which is best on an H200 over the layers of Llama-3-8B; more rows where they are short."""
    words = min(512, triton.next_power_of_2(row_words))
    return UnpackConfig(rows=2048 // words, words=words, warps=8)


def unpack(w: Tensor, dtype: torch.dtype, config: UnpackConfig | None = None) -> Tensor:
    """uint8 [N, K / 2] to `dtype` (int8 or float8_e4m3fn) codes [N, K].

    Raises:
        ValueError: K is no multiple of 8, or another dtype is asked for.
    """
    outs, row_bytes = w.shape
    if row_bytes % WORD:
        raise ValueError(f"unpack: w has {row_bytes} bytes a row; a multiple of {WORD} is required (K % 8 == 0).")
    if dtype not in (torch.int8, torch.float8_e4m3fn):
        raise ValueError(f"unpack: dtype is {dtype}; torch.int8 and torch.float8_e4m3fn are supported.")
    out = torch.empty(outs, 2 * row_bytes, dtype=dtype, device=w.device)
    row_words = row_bytes // WORD
    config = config or unpack_config(row_words)
    grid = triton.cdiv(outs, config.rows) * triton.cdiv(row_words, config.words)
    if grid:
        unpack_kernel[(grid,)](
            w.view(torch.int32),
            out.view(torch.int32),
            outs,
            ROW_WORDS=row_words,
            FLOAT8=dtype == torch.float8_e4m3fn,
            ROWS=config.rows,
            WORDS=config.words,
            num_warps=config.warps,
        )
    return out
