"""What `benchmarks.kernels` measures of a decoder block beside its linears, and what bf16 does instead of each.

Shape suffixes: B batch, S slots, H heads, G KV heads, D head dim, M rows (tokens), K features.
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.baselines import best_attention
from benchmarks.kernel_cases import SCALE, Case, Sizes, Work, bf16, compiled, random
from benchmarks.timing import launch_us, rotation
from pq_ao.hadamard import hadamard_base
from pq_ao.ops import quantize
from pq_ao.ops.cache_attention import cache_attention
from pq_ao.ops.rope_store import rope_store as rope_store_op
from pq_ao.ops.silu_hadamard import silu_hadamard as silu_hadamard_op

# tokens beyond which linears may leave their accumulators unscaled, see `pq_ao.ops.linear_paths`
_MANY = 2048


def norm_quantize(sizes: Sizes, options: argparse.Namespace) -> Iterator[Case]:
    """Residual addition, RMSNorm and static quantization, fused by Inductor."""

    def ours(x: Tensor, residual: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        residual = residual + x
        h = residual.float()
        h = h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + 1e-5)
        return residual, quantize(h - shift, scale, 4, codes="spread")

    def plain(x: Tensor, residual: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        residual = residual + x
        h = residual.float()
        h = h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + 1e-5)
        return residual, gain * h.to(x.dtype)

    def build(rows: int, device: torch.device) -> Work:
        count = rotation(4 * rows * sizes.hidden, device)
        pairs = [[bf16((rows, sizes.hidden), device) for _ in range(2)] for _ in range(count)]
        shift, scale = random((sizes.hidden,), torch.float32, device), torch.full((1,), SCALE, device=device)
        gain = bf16((sizes.hidden,), device)
        fused, unfused = compiled(ours, device), compiled(plain, device)

        def baseline() -> float:
            return launch_us([lambda p=pair: unfused(*p, gain) for pair in pairs], device)

        return Work([lambda p=pair: fused(*p, shift, scale) for pair in pairs], baseline)

    for rows in _few(options.tokens):
        nbytes = rows * sizes.hidden * (3 * 2 + 1)  # two inputs and the sum in bf16, codes in 8 bits
        yield Case("norm_quantize", "inductor", {"m": rows, "k": sizes.hidden}, nbytes, lambda d, m=rows: build(m, d))


def _few(tokens: list[int]) -> list[int]:
    """Tokens that pointwise ops are measured at: one, a batch, a prompt."""
    return sorted({min(tokens), *(m for m in tokens if m == 128), max(tokens)})


def _inputs(rows: int) -> tuple[tuple[str, bool], ...]:
    """What stands ahead of an op, and whether that is accumulators: for many tokens they may come unscaled."""
    return (("static", False), ("static, of accumulators", True)) if rows > _MANY else (("static", False),)


def _epilogue(width: int, raw: bool, device: torch.device) -> tuple:
    """Scales and biases of accumulators; nothing unless `raw`."""
    if not raw:
        return ()
    return torch.full((width,), SCALE, device=device), random((width,), torch.float32, device)


def silu_hadamard(sizes: Sizes, options: argparse.Namespace) -> Iterator[Case]:
    """SiLU, product, rotation R4 and static quantization; bf16 has no rotation and does not quantize."""

    def build(rows: int, raw: bool, device: torch.device) -> Work:
        width = sizes.intermediate
        base = hadamard_base(width).to(device)
        inputs = [bf16((rows, 2 * width), device) for _ in range(rotation(4 * rows * width, device))]
        scale, shift = torch.full((1,), SCALE, device=device), random((width,), torch.float32, device)
        epilogue = _epilogue(2 * width, raw, device)
        site = (base, scale, None, shift, 4, torch.int8, *epilogue)
        launches = [lambda x=x: silu_hadamard_op(x, *site, codes="spread") for x in inputs]

        def plain(x: Tensor) -> Tensor:
            gate, up = x.chunk(2, dim=-1)
            return F.silu(gate) * up

        def baseline() -> float:
            fused = compiled(plain, device)
            return launch_us([lambda x=x: fused(x) for x in inputs], device)

        return Work(launches, baseline)

    for rows in _few(options.tokens):
        nbytes = rows * sizes.intermediate * (2 * 2 + 1)
        shape = {"m": rows, "k": sizes.intermediate}
        for path, raw in _inputs(rows):
            yield Case("silu_hadamard", path, shape, nbytes, lambda d, m=rows, raw=raw: build(m, raw, d))


def rope_store(sizes: Sizes, options: argparse.Namespace) -> Iterator[Case]:
    """RoPE, rotation R3, static quantization of keys and values and their place in the cache."""
    heads, kv_heads, head_dim = sizes.heads, sizes.kv_heads, sizes.head_dim

    def build(batch: int, length: int, raw: bool, device: torch.device) -> Work:
        width = (heads + 2 * kv_heads) * head_dim
        inputs = [bf16((batch, length, width), device) for _ in range(rotation(2 * batch * length * width, device))]
        cos, sin = (bf16((1, length, head_dim), device) for _ in range(2))
        base = hadamard_base(head_dim).to(device)
        slots = (batch, kv_heads, length)
        keys, values = (random((*slots, head_dim // 2), torch.uint8, device) for _ in range(2))
        scale = torch.full((kv_heads,), SCALE, device=device)
        shift = random((kv_heads, 1, head_dim), torch.float32, device)
        start = torch.zeros((), dtype=torch.int64, device=device)
        epilogue = _epilogue(width, raw, device)

        def ours(qkv: Tensor) -> Tensor:
            return rope_store_op(
                qkv, cos, sin, base, None, None, 0.0, keys, values, None, None, scale, scale, None, None, shift, shift,
                start, heads, 4, *epilogue,
            )  # fmt: skip

        def plain(qkv: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
            split = qkv.view(batch, length, -1, head_dim).transpose(1, 2).split((heads, kv_heads, kv_heads), dim=1)
            query, key = (x * cos + torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1) * sin for x in split[:2])
            places = torch.arange(length, device=qkv.device) + start
            for held, new in zip(cache, (key, split[2]), strict=True):
                held.index_copy_(2, places, new)
            return query

        def baseline() -> float:
            cache = tuple(bf16((*slots, head_dim), device) for _ in range(2))
            step = compiled(plain, device)
            return launch_us([lambda x=x: step(x, cache) for x in inputs], device)

        return Work([lambda x=x: ours(x) for x in inputs], baseline)

    for rows in _few(options.tokens):
        batch, length = (rows // 2048, 2048) if rows % 2048 == 0 else (rows, 1)
        nbytes = rows * head_dim * (2 * (heads + 2 * kv_heads) + 2 * heads + kv_heads)
        shape = {"m": rows, "k": (heads + 2 * kv_heads) * head_dim}
        for path, raw in _inputs(rows):
            yield Case("rope_store", path, shape, nbytes, lambda d, b=batch, t=length, raw=raw: build(b, t, raw, d))


def _attention_shapes(options: argparse.Namespace) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(batch, context) of decode and of prefill."""
    if options.model == "tiny":
        return [(1, 32), (2, 16)], [(2, 16)]
    return [(1, 1024), (1, 8192), (8, 2048), (32, 8192), (128, 2048)], [(1, 2048), (4, 2048), (16, 2048)]


def attention(sizes: Sizes, options: argparse.Namespace) -> Iterator[Case]:
    """Attention over the packed INT4 cache and a prefix of one token, its result quantized."""
    heads, kv_heads, head_dim = sizes.heads, sizes.kv_heads, sizes.head_dim

    def build(batch: int, context: int, queries: int, device: torch.device) -> Work:
        slots = (batch, kv_heads, context, head_dim // 2)
        shift = random((kv_heads, 1, head_dim), torch.float32, device) * SCALE
        scale = torch.full((kv_heads,), SCALE, device=device)
        prefix = bf16((kv_heads, 1, head_dim), device)
        start = torch.tensor(context - queries, device=device)
        out_scale, out_shift = (
            torch.full((1,), SCALE, device=device),
            random((heads * head_dim,), torch.float32, device),
        )
        launches = []
        for _ in range(rotation(2 * batch * kv_heads * context * head_dim // 2, device)):
            query = bf16((batch, queries, heads, head_dim), device)
            keys, values = (random(slots, torch.uint8, device) for _ in range(2))
            launches.append(
                lambda q=query, k=keys, v=values: cache_attention(
                    q,
                    k,
                    v,
                    scale,
                    scale,
                    shift,
                    shift,
                    prefix,
                    prefix,
                    start,
                    None,
                    head_dim**-0.5,
                    out_scale,
                    out_shift,
                    4,
                    torch.int8,
                )  # fmt: skip
            )

        def baseline() -> float:
            return best_attention(heads, kv_heads, head_dim, batch, context, queries == 1, device).us

        return Work(launches, baseline)

    decode, prefill = _attention_shapes(options)
    for batch, context in decode:
        cached = batch * context * kv_heads * head_dim  # half a byte for a key, half a byte for a value
        yield Case(
            "attention_decode",
            "kv4",
            {"batch": batch, "context": context},
            cached + batch * heads * head_dim * 3,
            lambda d, b=batch, c=context: build(b, c, 1, d),
        )
    for batch, context in prefill:
        yield Case(
            "attention_prefill",
            "kv4",
            {"batch": batch, "context": context},
            batch * context * (kv_heads + 3 * heads) * head_dim,
            lambda d, b=batch, c=context: build(b, c, c, d),
            2.0 * batch * heads * context * context * head_dim,  # half of the scores: they are causal
            16,
        )
