"""pq_ao::prefix_attention: attention over [full-precision prefix | quantized body].

Shape suffixes: B batch, L queries, S body slots, P prefix tokens, H query heads, G KV heads, D head dim.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pq_ao.ops.packing import unpack_int4


def _widen(data_BGSx: Tensor, scale: Tensor | None, head_dim: int) -> Tensor:
    """Body keys or values in float32 [B, G, S, D] from packed nibbles, int8 codes or floats."""
    if data_BGSx.dtype == torch.uint8:
        data_BGSx = unpack_int4(data_BGSx, head_dim)
    if scale is None:
        return data_BGSx.float()
    # (G,) static, one a head; [B, G, S] dynamic, one a head and token
    scale = scale.view(1, -1, 1, 1) if scale.ndim == 1 else scale.unsqueeze(-1)
    return data_BGSx.float() * scale


def attend_plainly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    prefix_key: Tensor,
    prefix_value: Tensor,
    mask: Tensor,
    scaling: float,
) -> Tensor:
    """softmax(q [k'; k]^T scaling) [v'; v], the prefix visible to every query; differentiable.

    Args:
        query: [B, H, L, D], floating point.
        key, value: [B, G, S, D] int8 codes or floats, or uint8 [B, G, S, ceil(D / 2)] as `pack_int4` makes it.
        key_scale, value_scale: float32 [G] or [B, G, S]; None where key and value are floats.
        prefix_key, prefix_value: [G, P, D], floating point.
        mask: bool [B or 1, 1, L, S], True where a query sees a body slot.
        scaling: factor on the scores.

    Returns:
        float32 [B, L, H, D], contiguous.
    """
    batch, heads, queries, head_dim = query.shape
    groups, prefix_len = prefix_key.shape[0], prefix_key.shape[1]
    key_BGTD = torch.cat(
        (prefix_key.float().expand(batch, -1, -1, -1), _widen(key, key_scale, head_dim)),
        dim=2,
    )
    value_BGTD = torch.cat(
        (prefix_value.float().expand(batch, -1, -1, -1), _widen(value, value_scale, head_dim)),
        dim=2,
    )
    mask = F.pad(mask, (prefix_len, 0), value=True).expand(batch, -1, -1, -1)
    out_BHLD = F.scaled_dot_product_attention(
        query.float(), key_BGTD, value_BGTD, attn_mask=mask, scale=scaling, enable_gqa=heads != groups
    )
    return out_BHLD.transpose(1, 2).contiguous()


def attend_causally(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, scaling: float
) -> Tensor:
    """`attend_plainly` of whole sequences, query l at slot l, by kernels that need no mask; differentiable.

    Args:
        query: [B, H, L, D], floating point.
        key, value: [B, G, L, D], floating point.
        prefix_key, prefix_value: [G, P, D], floating point.
        scaling: factor on the scores.

    Returns:
        float32 [B, L, H, D], contiguous.
    """
    batch, heads = query.shape[:2]
    groups, prefix_len = prefix_key.shape[:2]

    def behind_prefix(prefix: Tensor, body: Tensor) -> Tensor:
        whole = torch.cat((prefix.float().expand(batch, -1, -1, -1), body.float()), dim=2)
        return whole.repeat_interleave(heads // groups, dim=1)  # the kernels for float32 take no groups

    # queries in the prefix's place make it square, which is all that those kernels know of causality
    query = F.pad(query.float(), (0, 0, prefix_len, 0))
    key, value = behind_prefix(prefix_key, key), behind_prefix(prefix_value, value)
    out_BHLD = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out_BHLD[:, :, prefix_len:].transpose(1, 2).contiguous()


@torch.library.custom_op("pq_ao::prefix_attention", mutates_args=())
def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    prefix_key: Tensor,
    prefix_value: Tensor,
    mask: Tensor,
    scaling: float,
) -> Tensor:
    """`attend_plainly` as one op, without gradients."""
    return attend_plainly(query, key, value, key_scale, value_scale, prefix_key, prefix_value, mask, scaling)


@prefix_attention.register_fake
def _(query, key, value, key_scale, value_scale, prefix_key, prefix_value, mask, scaling):
    batch, heads, queries, head_dim = query.shape
    return torch.empty(batch, queries, heads, head_dim, dtype=torch.float32, device=query.device)
