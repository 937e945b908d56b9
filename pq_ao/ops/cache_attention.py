"""pq_ao::cache_attention: attention over [full-precision prefix | the cache as it is stored], output quantized.

Shape suffixes: B batch, L queries, S slots, T slots of a padding mask, P prefix tokens, H query heads, G KV heads,
D head dim.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pq_ao.ops.attention import prefix_attention
from pq_ao.ops.quantize import quantize

# Slots that PyTorch's attention for CPUs sums at a time. Whole blocks of them, the rest masked, give the bits that more
# slots would: a program that attends over the whole cache, as AOTInductor's do, agrees to the last bit.
_CPU_BLOCK = 512

_STORED = {4: (torch.uint8,), 8: (torch.int8,), 16: (torch.float32, torch.float16, torch.bfloat16)}


@torch.library.custom_op("pq_ao::cache_attention", mutates_args=())
def cache_attention(
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
    codes: str = "even",
) -> Tensor:
    """softmax(q [k'; k]^T scaling) [v'; v], query l at slot start + l; codes of the result where it has a scale.

    The cache holds keys and values without their shift. One vector off all keys leaves the softmax alone, so the
    prefix's keys lose it too; the values' shift returns after attention, whose probabilities sum to one.

    Args:
        query: [B, L, H, D], floating point, rotated.
        keys, values: uint8 [B, G, S, ceil(D / 2)] as `pack_int4` makes it, int8 [B, G, S, D] codes, or floats.
        key_scale, value_scale: float32 [G] (static) or [B, G, S] (per token); None where the cache holds floats.
        key_shift, value_shift: float32 [G, 1, D] or None.
        prefix_key, prefix_value: [G, P, D], floating point, shift included; P may be 0.
        start: int64 tensor of no dimension, the slot of the first query.
        visible: bool [B, T], T >= start + L: False hides a slot from every query; None hides none.
        scaling: factor on the scores, positive.
        out_scale: float32 (1,), or None for a result in floating point.
        out_shift: float32 [H * D], taken off before quantization; None for none.
        bits: of the result's codes.
        encoding: dtype of the codes, int8 or float8_e4m3fn.
        codes: which, see `quantize`.

    Returns:
        float32 [B, L, H * D] without `out_scale`, codes [B, L, H * D] with it. A query that sees nothing at all gives
        zeros (and the shift).
    """
    _check(query, keys, values, prefix_key, visible, scaling)
    batch, queries, heads, head_dim = query.shape
    first = int(start)
    length, prefix_len = first + queries, prefix_key.shape[1]
    blocks = -(-(prefix_len + length) // _CPU_BLOCK) * _CPU_BLOCK - prefix_len
    empty = min(blocks, keys.shape[2]) - length
    slots = torch.arange(length + empty, device=query.device)
    mask = slots <= first + torch.arange(queries, device=query.device)[:, None]
    mask = mask[None, None]
    if visible is not None:
        mask = mask & F.pad(visible[:, :length], (0, empty))[:, None, None]
    if key_scale is not None and key_scale.ndim == 3:
        key_scale, value_scale = (F.pad(scale[..., :length], (0, empty)) for scale in (key_scale, value_scale))
    out_BLHD = prefix_attention(
        query.transpose(1, 2),
        *(F.pad(stored[:, :, :length], (0, 0, 0, empty)) for stored in (keys, values)),
        key_scale,
        value_scale,
        prefix_key if key_shift is None else prefix_key.float() - key_shift,
        prefix_value if value_shift is None else prefix_value.float() - value_shift,
        mask,
        scaling,
    )
    if value_shift is not None:
        out_BLHD = out_BLHD + value_shift.squeeze(1).repeat_interleave(heads // keys.shape[1], dim=0)
    out = out_BLHD.reshape(batch, queries, heads * head_dim)
    if out_scale is None:
        return out
    if out_shift is not None:
        out = out - out_shift
    return quantize(out, out_scale, bits, encoding, codes)


@cache_attention.register_fake
def _(query, keys, values, key_scale, value_scale, key_shift, value_shift, prefix_key, prefix_value, start, visible,
      scaling, out_scale, out_shift, bits, encoding, codes="even"):  # fmt: skip
    batch, queries, heads, head_dim = query.shape
    return query.new_empty(batch, queries, heads * head_dim, dtype=torch.float32 if out_scale is None else encoding)


@cache_attention.register_kernel("cuda")
def _(query, keys, values, key_scale, value_scale, key_shift, value_shift, prefix_key, prefix_value, start, visible,
      scaling, out_scale, out_shift, bits, encoding, codes="even"):  # fmt: skip
    _check(query, keys, values, prefix_key, visible, scaling)
    from pq_ao.ops.kernels import decode_attention, prefill_attention

    rows = query.shape[1] * (query.shape[2] // keys.shape[1])
    kernel = decode_attention if rows <= decode_attention.MAX_ROWS else prefill_attention
    return kernel.launch(query, keys, values, key_scale, value_scale, key_shift, value_shift, prefix_key, prefix_value,
                         start, visible, scaling, out_scale, out_shift, bits, encoding, codes=codes)  # fmt: skip


def _check(query: Tensor, keys: Tensor, values: Tensor, prefix_key: Tensor, visible: Tensor | None, scaling: float):
    batch, _, heads, head_dim = query.shape
    stored = {dtype: bits for bits, dtypes in _STORED.items() for dtype in dtypes}
    if keys.dtype not in stored or values.dtype != keys.dtype:
        raise TypeError(
            f"keys, values: {keys.dtype} and {values.dtype}; both must be uint8 (packed INT4), int8 or floating point."
        )
    if head_dim % 2:
        raise ValueError(f"query: head dim {head_dim} is odd; an even one is required.")
    width = head_dim // 2 if keys.dtype == torch.uint8 else head_dim
    if keys.shape[0] != batch or keys.shape[3] != width or values.shape != keys.shape or heads % keys.shape[1]:
        raise ValueError(
            f"keys, values: shapes {tuple(keys.shape)} and {tuple(values.shape)} do not fit a query of shape "
            f"{tuple(query.shape)}; [batch, KV heads, slots, {width}] with KV heads that divide {heads} are required."
        )
    if prefix_key.shape[0] != keys.shape[1] or prefix_key.shape[2] != head_dim:
        raise ValueError(
            f"prefix_key: shape {tuple(prefix_key.shape)}; [{keys.shape[1]}, tokens, {head_dim}] is required."
        )
    if visible is not None and (visible.dtype != torch.bool or visible.ndim != 2 or visible.shape[0] != batch):
        raise ValueError(
            f"visible: {visible.dtype} of shape {tuple(visible.shape)}; bool [{batch}, slots] is required."
        )
    if scaling <= 0:
        raise ValueError(f"scaling={scaling}: must be positive.")
