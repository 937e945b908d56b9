"""Linear of 1 to 8 rows: packed weights are read once as 32-bit words and multiplied by dp4a.

A program takes a few output rows over all of K, and its threads split K: each thread keeps its words of x in registers
for all those rows. Sixteen bytes a thread and row are one load, and many are in flight before the first is used; what
is constant is on its way before the kernel in front has ended.

Shape suffixes: M rows of x, N outputs, W words of a weight row.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pq_ao.ops.kernels.asm import dp4a, widen_words
from pq_ao.ops.kernels.early import launch_options, launches_early, wait

MAX_ROWS = 8
WORD = 4  # bytes


@dataclass(frozen=True)
class GemvConfig:
    """How a program is cut.

    Attributes:
        outputs: weight rows of a program, a power of two.
        warps: they split K; a warp takes 128 words of a row at once, 16 bytes a thread.
        ahead: steps along K whose weights are loaded before the first is used.
    """

    outputs: int
    warps: int
    ahead: int


@triton.jit
def _weights(w_ptr, n, START: tl.constexpr, WORDS: tl.constexpr, ROW_WORDS: tl.constexpr):
    word = START + tl.arange(0, WORDS)
    pointers = w_ptr + n[:, None] * ROW_WORDS + word[None, :]
    # a weight is used once: leave the cache to what is read again
    if START + WORDS <= ROW_WORDS:
        return tl.load(pointers, eviction_policy="evict_first")
    else:
        return tl.load(pointers, mask=(word < ROW_WORDS)[None, :], other=0, eviction_policy="evict_first")


@triton.jit
def _group(w_ptr, n, FIRST: tl.constexpr, LAST: tl.constexpr, WORDS: tl.constexpr, ROW_WORDS: tl.constexpr):
    """The weights of steps FIRST to LAST, a tensor each."""
    weights = ()
    for step in tl.static_range(FIRST, LAST):
        weights = weights + (_weights(w_ptr, n, step * WORDS, WORDS, ROW_WORDS),)
    return weights


@triton.jit
def _activations(x_ptr, START: tl.constexpr, WORDS: tl.constexpr, ROW_WORDS: tl.constexpr):
    word = START + tl.arange(0, WORDS)
    if START + WORDS <= ROW_WORDS:
        return tl.load(x_ptr + word)
    else:
        return tl.load(x_ptr + word, mask=word < ROW_WORDS, other=0)


@triton.jit
def _four(a, b, c, d):
    """Four [N, W] as one [N, W, 4]."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (a.shape[0], a.shape[1], 4))


@triton.jit
def _reduce(sums, COUNT: tl.constexpr):
    """COUNT (1, 2, 4, 8) tensors [N, W] to sums [N, COUNT]; in one go, for each reduction waits for all warps."""
    if COUNT == 1:
        total = tl.sum(sums[0], axis=1)[:, None]
    elif COUNT == 2:
        total = tl.sum(tl.join(sums[0], sums[1]), axis=1)
    elif COUNT == 4:
        total = tl.sum(_four(sums[0], sums[1], sums[2], sums[3]), axis=1)
    else:
        even = _four(sums[0], sums[2], sums[4], sums[6])
        odd = _four(sums[1], sums[3], sums[5], sums[7])
        total = tl.sum(tl.reshape(tl.join(even, odd), (even.shape[0], even.shape[1], 8)), axis=1)
    return total


@triton.jit
def gemv_kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    y_ptr,
    outs,
    ROWS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    PACKED: tl.constexpr,
    PER_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RAW: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WORDS: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
):
    """y = x w^T for int32 words x [M, 2 W or W] and w [N, W]; RAW stores int32 sums, else scaled and biased."""
    STEPS: tl.constexpr = (ROW_WORDS + WORDS - 1) // WORDS
    PLANES: tl.constexpr = 2 if PACKED else 1
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    # rows past the end are read twice rather than masked; they are never stored
    row = tl.minimum(n, outs - 1)
    weights = _group(w_ptr, row, 0, min(AHEAD, STEPS), WORDS, ROW_WORDS)
    if not RAW:
        w_scale = tl.load(w_scale_ptr + row)
        if not PER_ROW:
            x_scale = tl.load(x_scale_ptr)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + row).to(tl.float32)
    wait(EARLY)

    # room for a power of two of rows; no instruction is spent on those that are not there
    COUNT: tl.constexpr = ROWS if ROWS <= 2 else (4 if ROWS <= 4 else 8)
    sums = ()
    for _m in tl.static_range(COUNT):
        sums = sums + (tl.zeros((OUTPUTS, WORDS), tl.int32),)
    for group in tl.static_range((STEPS + AHEAD - 1) // AHEAD):
        if group > 0:
            weights = _group(w_ptr, row, group * AHEAD, min(group * AHEAD + AHEAD, STEPS), WORDS, ROW_WORDS)
        for step in tl.static_range(group * AHEAD, min(group * AHEAD + AHEAD, STEPS)):
            new = ()
            if PACKED:
                w_low, w_high = widen_words(weights[step - group * AHEAD])
            else:
                w_low = weights[step - group * AHEAD]
            for m in tl.static_range(ROWS):
                base = x_ptr + m * PLANES * ROW_WORDS
                total = dp4a(w_low, _activations(base, step * WORDS, WORDS, ROW_WORDS)[None, :], sums[m])
                if PACKED:
                    total = dp4a(w_high, _activations(base + ROW_WORDS, step * WORDS, WORDS, ROW_WORDS)[None, :], total)
                new = new + (total,)
            for m in tl.static_range(ROWS, COUNT):
                new = new + (sums[m],)
            sums = new

    total = _reduce(sums, COUNT)
    if PACKED:
        total = total >> 4  # widened codes are 16 times too large
    m = tl.arange(0, COUNT)
    at = y_ptr + m[None, :] * outs + n[:, None]
    stored = (n < outs)[:, None] & (m < ROWS)[None, :]
    if RAW:
        tl.store(at, total, mask=stored)
    else:
        if PER_ROW:
            scale = tl.load(x_scale_ptr + tl.minimum(m, ROWS - 1))[None, :] * w_scale[:, None]
        else:
            scale = (x_scale * w_scale)[:, None]
        y = total.to(tl.float32) * scale
        if HAS_BIAS:
            y = y + bias[:, None]
        tl.store(at, y.to(y_ptr.dtype.element_ty), mask=stored)


_WIDE = 16384  # outputs; these layers have programs enough for warps to share a row
_SHORT, _LONG = 512, 2048  # words of a row: what one warp reads in four steps, and what is too long for it


def gemv_config(rows: int, outs: int, row_words: int, packed: bool = True) -> GemvConfig:
    """Configuration for a shape; measured on an H200 with the layers of Llama-3-8B and its INT8 head."""
    short = row_words <= _SHORT
    outputs, ahead = 4, 2
    if rows == 1:
        # nothing to compute: as many threads as the row has room for
        warps = 4 if row_words >= 512 else 2 if row_words >= 256 else 1
        if packed and short and outs >= _WIDE:
            outputs, warps, ahead = 4, 2, 2  # the best of nine over the whole step, not by itself
    elif rows == 2:
        warps, ahead = 1 if short else 2, 4
    elif rows <= 4:
        warps = 2 if outs >= _WIDE or row_words >= _LONG else 1
        ahead = 4 if short and warps == 1 else 2
    else:
        warps = 1 if short else 2
        # eight rows of two planes, or of many steps, leave no registers for more
        outputs = 2 if packed or row_words >= _LONG else 4
    return GemvConfig(outputs=outputs, warps=warps, ahead=ahead)


def gemv(
    x: Tensor,
    x_scale: Tensor | None,
    w: Tensor,
    w_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    config: GemvConfig | None = None,
) -> Tensor:
    """int8 [M, K] times uint8 [N, K / 2] or int8 [N, K] transposed, as `pq_ao::packed_linear` says.

    Raises:
        ValueError: M is not in 1..8, or a row or half row is no multiple of four bytes.
    """
    rows, inner = x.shape
    outs, row_bytes = w.shape
    packed = w.dtype == torch.uint8
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"gemv: x has {rows} rows; 1 to {MAX_ROWS} are supported.")
    if row_bytes % WORD or inner != row_bytes * (2 if packed else 1):
        raise ValueError(
            f"gemv: x has {inner} columns and w {row_bytes} bytes a row; K must be a multiple of "
            f"{2 * WORD if packed else WORD} for {w.dtype}, and the same in both."
        )
    y = torch.empty(rows, outs, dtype=dtype, device=x.device)
    config = config or gemv_config(rows, outs, row_bytes // WORD, packed)
    early = launches_early(x.device)
    gemv_kernel[(triton.cdiv(outs, config.outputs),)](
        x.view(torch.int32),
        x_scale,
        w.view(torch.int32),
        w_scale,
        bias,
        y,
        outs,
        ROWS=rows,
        ROW_WORDS=row_bytes // WORD,
        PACKED=packed,
        PER_ROW=x_scale is not None and x_scale.numel() > 1,
        HAS_BIAS=bias is not None,
        RAW=dtype == torch.int32,
        OUTPUTS=config.outputs,
        WORDS=128 * config.warps,
        AHEAD=config.ahead,
        EARLY=early,
        num_warps=config.warps,
        enable_fp_fusion=False,  # each operation of the epilogue rounds by itself, as PyTorch's do
        **launch_options(early),
    )
    return y
