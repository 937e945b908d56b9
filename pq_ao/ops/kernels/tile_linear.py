"""Linear on int8 tensor cores: packed weights are the first operand of `tl.dot`, so unpacked codes stay in registers.

A program takes a tile of weight rows and tokens over a part of K. Parts of K meet in a scratch buffer, and the last of
them to arrive adds them up: integers, so the order does not matter. Large tiles of few programs come by descriptor
where the GPU can (TMA): one thread asks for a whole tile, and shared memory is written without bank conflicts.

Shape suffixes: M rows of x (tokens), N outputs, K inputs or bytes of a weight row.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pq_ao.ops.kernels.asm import widen_bytes
from pq_ao.ops.kernels.early import launch_options, launches_early, wait
from pq_ao.ops.kernels.prefetch import prefetch
from pq_ao.ops.kernels.workspace import COUNTERS, counters, has_descriptors


@dataclass(frozen=True)
class TileConfig:
    """How a launch is cut.

    Attributes:
        outputs, tokens: weight rows and tokens of a tile.
        depth: bytes of weight rows in a step; two inputs a byte when packed.
        split: parts of K.
        warps, stages: launch options.
        tma: tiles come by descriptor (compute capability 9.0 and newer); packed weights whose rows are whole steps.
    """

    outputs: int
    tokens: int
    depth: int
    split: int
    warps: int
    stages: int
    tma: bool = False


@triton.jit
def _bytes(pointers, k, limit, EVEN: tl.constexpr):
    """A tile whose K axis has pointers' shape and ends at `limit`."""
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=k < limit, other=0)


# compiled once for all numbers of tokens
@triton.jit(do_not_specialize=["rows", "token_tiles"])
def tile_kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    y_ptr,
    partial_ptr,
    counter_ptr,
    rows,
    outs,
    inner,
    row_bytes,
    token_tiles,
    PACKED: tl.constexpr,
    PER_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RAW: tl.constexpr,
    EVEN: tl.constexpr,
    TMA: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLIT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """y = x w^T for int8 x [M, K] and w [N, bytes]; RAW stores int32 sums, else scaled and biased.

    With TMA, x_ptr and w_ptr are descriptors of tiles [TOKENS, DEPTH] and [OUTPUTS, DEPTH].
    """
    # tokens change fastest, so that a tile of weights is read again while it is in the cache
    tile = tl.program_id(0) // SPLIT
    part = tl.program_id(0) % SPLIT
    first_n = (tile // token_tiles) * OUTPUTS
    first_m = (tile % token_tiles) * TOKENS
    n = first_n + tl.arange(0, OUTPUTS)
    m = first_m + tl.arange(0, TOKENS)
    if not TMA:
        # rows past the end are read twice rather than masked; they are never stored
        w_row = w_ptr + tl.minimum(n, outs - 1).to(tl.int64)[:, None] * row_bytes
        x_row = x_ptr + tl.minimum(m, rows - 1).to(tl.int64)[None, :] * inner
    depth = tl.arange(0, DEPTH)
    if EARLY and not RAW:  # loaded now, they would take registers all along
        prefetch(w_scale_ptr + first_n, 4 * OUTPUTS)
        if HAS_BIAS:
            prefetch(bias_ptr + first_n, 4 * OUTPUTS)
    wait(EARLY)

    steps = tl.cdiv(row_bytes, DEPTH)
    first = part * tl.cdiv(steps, SPLIT)
    last = tl.minimum(first + tl.cdiv(steps, SPLIT), steps)
    acc = tl.zeros((OUTPUTS, TOKENS), tl.int32)
    for step in range(first, last):
        k = step * DEPTH + depth
        if TMA:
            w = w_ptr.load([first_n, step * DEPTH])
            x = tl.trans(x_ptr.load([first_m, step * DEPTH]))
        else:
            w = _bytes(w_row + k[None, :], k[None, :], row_bytes, EVEN)
            x = _bytes(x_row + k[:, None], k[:, None], row_bytes, EVEN)
        if PACKED:
            if TMA:
                x_high = tl.trans(x_ptr.load([first_m, row_bytes + step * DEPTH]))
            else:
                x_high = _bytes(x_row + (row_bytes + k[:, None]), row_bytes + k[:, None], inner, EVEN)
            w_low, w_high = widen_bytes(w)
            acc = tl.dot(w_low, x, acc, out_dtype=tl.int32)
            acc = tl.dot(w_high, x_high, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(w, x, acc, out_dtype=tl.int32)

    is_last = True
    if SPLIT > 1:
        inside = tl.arange(0, OUTPUTS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        mine = partial_ptr + tile.to(tl.int64) * (SPLIT * OUTPUTS * TOKENS) + inside
        tl.store(mine + part * (OUTPUTS * TOKENS), acc)
        tl.debug_barrier()  # one thread counts for all: what they stored comes before
        is_last = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel") == SPLIT - 1
        if is_last:
            tl.store(counter_ptr + tile, 0)
            acc = tl.zeros((OUTPUTS, TOKENS), tl.int32)
            for other in tl.range(0, SPLIT, num_stages=1):  # unrolled, it would spill
                acc += tl.load(mine + other * (OUTPUTS * TOKENS), cache_modifier=".cg")
    if is_last:
        if PACKED:
            acc = acc >> 4  # widened codes are 16 times too large
        at = y_ptr + m.to(tl.int64)[None, :] * outs + n[:, None]
        stored = (n < outs)[:, None] & (m < rows)[None, :]
        if RAW:
            tl.store(at, acc, mask=stored)
        else:
            x_scale = tl.load(x_scale_ptr + tl.minimum(m, rows - 1) if PER_ROW else x_scale_ptr + m * 0)
            w_scale = tl.load(w_scale_ptr + tl.minimum(n, outs - 1))
            y = acc.to(tl.float32) * (x_scale[None, :] * w_scale[:, None])
            if HAS_BIAS:
                y = y + tl.load(bias_ptr + tl.minimum(n, outs - 1)).to(tl.float32)[:, None]
            tl.store(at, y.to(y_ptr.dtype.element_ty), mask=stored)


# Measured on an H200 with the layers of Llama-3-8B. Two of the larger tiles below fit on each of its multiprocessors.
_MULTIPROCESSORS = 132
_AT_ONCE = 2 * _MULTIPROCESSORS

# tiles for so many tokens at most, where all programs run at once, and where there are more
_NARROW = {
    16: TileConfig(64, 16, 128, 1, 4, 4),
    32: TileConfig(64, 32, 256, 1, 4, 3),
    64: TileConfig(64, 64, 128, 1, 4, 4),
}
_WIDE = {tokens: TileConfig(128, tokens, 128, 1, 8, 4) for tokens in _NARROW}

_LARGEST = TileConfig(128, 128, 64, 1, 8, 4)

# tiles for more tokens, and microseconds of as many as run at once (K = 4096); beyond 256 tokens only these decide
_LARGE = {
    TileConfig(64, 64, 128, 1, 4, 4): 10.9,
    TileConfig(128, 64, 128, 1, 8, 3): 16.3,
    _LARGEST: 27.9,
}

# faster where all programs run at once; where there are more, as fast or slower
_LARGEST_BY_DESCRIPTOR = replace(_LARGEST, warps=4, tma=True)

_MAX_SPLIT = 16
_EARLY_TOKENS = 128  # with more, a program takes too long for its start to matter


def _tiles(config: TileConfig, rows: int, outs: int) -> int:
    return triton.cdiv(outs, config.outputs) * triton.cdiv(rows, config.tokens)


def tile_config(rows: int, outs: int, row_bytes: int, packed: bool = True, tma: bool = False) -> TileConfig:
    """Configuration for a shape: the tile that takes the least time, K split where there are too few of them.

    Args:
        tma: whether descriptors can be used.
    """
    if rows <= max(_NARROW):
        tokens = next(tokens for tokens in _NARROW if rows <= tokens)
        config = _NARROW[tokens]
        # INT8 weights, bound by memory, gain little from wider tiles
        if packed and _tiles(config, rows, outs) > _AT_ONCE:
            config = _WIDE[tokens]
    else:
        config = min(_LARGE, key=lambda large: triton.cdiv(_tiles(large, rows, outs), _AT_ONCE) * _LARGE[large])
    tiles = _tiles(config, rows, outs)
    if tma and packed and config == _LARGEST and tiles <= _AT_ONCE and row_bytes % config.depth == 0:
        config = _LARGEST_BY_DESCRIPTOR
    least = 512 if config.tokens == 16 else 1024  # bytes of a row in a part
    split = 1
    while tiles * split < _MULTIPROCESSORS and split < _MAX_SPLIT and row_bytes >= 2 * split * least:
        split *= 2
    return replace(config, split=split)


_ALIGNMENT = 16  # bytes, of what a descriptor stands for


def _can_describe(x: Tensor, w: Tensor) -> bool:
    """Whether descriptors can stand for packed w and all of x on this GPU, if rows are whole steps."""
    aligned = x.data_ptr() % _ALIGNMENT == 0 and w.data_ptr() % _ALIGNMENT == 0
    return has_descriptors(x.device) and aligned and x.shape[1] == 2 * w.shape[1]


def tile_linear(
    x: Tensor,
    x_scale: Tensor | None,
    w: Tensor,
    w_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    config: TileConfig | None = None,
) -> Tensor:
    """int8 [M, K] times uint8 [N, ceil(K / 2)] or int8 [N, K] transposed, as `pq_ao::packed_linear` says. Any shape.

    Raises:
        ValueError: `config` splits K over more tiles than there are counters, or asks for descriptors where rows of
            weights are not whole steps.
    """
    rows, inner = x.shape
    outs, row_bytes = w.shape
    packed = w.dtype == torch.uint8
    config = config or tile_config(rows, outs, row_bytes, packed, _can_describe(x, w))
    tiles = _tiles(config, rows, outs)
    y = torch.empty(rows, outs, dtype=dtype, device=x.device)
    if tiles == 0:
        return y
    partial = counter = None
    if config.split > 1:
        if tiles > COUNTERS:
            raise ValueError(f"tile_linear: {tiles} tiles with split {config.split}; at most {COUNTERS} can be split.")
        counter = counters(x.device)
        size = tiles * config.split * config.outputs * config.tokens
        partial = torch.empty(size, dtype=torch.int32, device=x.device)
    early = rows <= _EARLY_TOKENS and launches_early(x.device)
    even = row_bytes % config.depth == 0 and inner == row_bytes * (2 if packed else 1)
    if config.tma:
        if not even:
            raise ValueError(
                f"config: tma in steps of {config.depth} bytes, and weights of {row_bytes} bytes a row for {inner} "
                "inputs; rows must be whole steps. Use a configuration without tma."
            )
        x = TensorDescriptor.from_tensor(x, [config.tokens, config.depth])
        w = TensorDescriptor.from_tensor(w, [config.outputs, config.depth])
    tile_kernel[(tiles * config.split,)](
        x,
        x_scale,
        w,
        w_scale,
        bias,
        y,
        partial,
        counter,
        rows,
        outs,
        inner,
        row_bytes,
        triton.cdiv(rows, config.tokens),
        PACKED=packed,
        PER_ROW=x_scale is not None and x_scale.numel() > 1,
        HAS_BIAS=bias is not None,
        RAW=dtype == torch.int32,
        EVEN=even,
        TMA=config.tma,
        OUTPUTS=config.outputs,
        TOKENS=config.tokens,
        DEPTH=config.depth,
        SPLIT=config.split,
        EARLY=early,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=False,  # each operation of the epilogue rounds by itself, as PyTorch's do
        **launch_options(early),
    )
    return y
