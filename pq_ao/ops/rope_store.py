"""pq_ao::rope_store, all that stands between qkv_proj and attention: head norms, RoPE, R3, quantization, the cache.

Shape suffixes: B batch, L tokens, S cache slots, H query heads, G KV heads, D head dim.
"""

import torch
from torch import Tensor

from pq_ao.hadamard import hadamard_transform
from pq_ao.ops.accumulators import check_accumulators, scaled
from pq_ao.ops.packing import pack_int4
from pq_ao.ops.quantize import check_clip, quantize, quantize_per_row


def _check(
    qkv: Tensor, cos: Tensor, sin: Tensor, rotation: Tensor | None, norms: tuple, keys: Tensor, values: Tensor,
    token_scales: tuple, scales: tuple, clips: tuple, shifts: tuple, start: Tensor, query_heads: int, bits: int,
    accumulators: tuple,
) -> int:  # fmt: skip
    """The head dim, or an error."""
    stored = {4: (torch.uint8,), 8: (torch.int8,), 16: (torch.bfloat16, torch.float16, torch.float32)}.get(bits)
    if stored is None:
        raise ValueError(f"rope_store: bits={bits}; 4, 8 or 16 are possible.")
    if keys.dtype not in stored or values.dtype != keys.dtype:
        raise TypeError(f"rope_store: keys are {keys.dtype}, values {values.dtype}; for bits={bits} one of {stored}.")
    groups = keys.shape[1]
    heads = query_heads + 2 * groups
    head_dim = qkv.shape[-1] // heads
    if qkv.ndim != 3 or head_dim * heads != qkv.shape[-1] or head_dim % 2:
        raise ValueError(
            f"rope_store: qkv has shape {list(qkv.shape)}; [B, L, (H + 2G) * D] with an even D is required, "
            f"here H={query_heads} and G={groups}."
        )
    batch, length = qkv.shape[:2]
    width = head_dim // 2 if bits == 4 else head_dim
    if keys.ndim != 4 or keys.shape[0] != batch or keys.shape[3] != width or values.shape != keys.shape:
        raise ValueError(
            f"rope_store: keys have shape {list(keys.shape)}, values {list(values.shape)}; both must be "
            f"[{batch}, {groups}, S, {width}]."
        )
    if cos.shape not in ((batch, length, head_dim), (1, length, head_dim)) or sin.shape != cos.shape:
        raise ValueError(
            f"rope_store: cos has shape {list(cos.shape)}, sin {list(sin.shape)}; both must be "
            f"[{batch} or 1, {length}, {head_dim}]."
        )
    if rotation is not None:
        order = rotation.shape[0] if rotation.ndim == 2 and rotation.shape[0] == rotation.shape[1] else 0
        walsh = head_dim // max(order, 1)
        if order * walsh != head_dim or walsh & (walsh - 1) or order == 0:
            raise ValueError(
                f"rope_store: rotation has shape {list(rotation.shape)}; hadamard_base({head_dim}) is required."
            )
    check_accumulators("rope_store", qkv, *accumulators)
    if (norms[0] is None) != (norms[1] is None):
        raise ValueError("rope_store: query_norm and key_norm go together.")
    for norm in norms:
        if norm is not None and (norm.shape != (head_dim,) or norm.dtype != qkv.dtype):
            raise ValueError(
                f"rope_store: a head norm is {norm.dtype} {list(norm.shape)}; {qkv.dtype} [{head_dim}] is required."
            )
    dynamic = bits < 16 and scales[0] is None
    for kind, tensors, shape, wanted in (
        ("token scales", token_scales, (batch, groups, keys.shape[2]), dynamic),
        ("scales", scales, (groups,), bits < 16 and not dynamic),
        ("clips", clips, (groups,), dynamic),
        ("shifts", shifts, (groups, 1, head_dim), bits < 16),
    ):
        for tensor in tensors:
            if (tensor is not None) != wanted:
                raise ValueError(
                    f"rope_store: {kind} {'are missing' if wanted else 'do not belong here'}; bits < 16 take key and "
                    "value scales (static), or token scales and clips (dynamic), and shifts; bits = 16 take none."
                )
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"rope_store: {kind} of shape {list(tensor.shape)}; {list(shape)} is required.")
    for name, clip in zip(("key_clip", "value_clip"), clips, strict=True):
        if clip is not None:
            check_clip("rope_store", name, clip, (groups,))
    for name, tensor in (("keys", keys), ("values", values), *(("token scales", t) for t in token_scales)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"rope_store: {name} must be contiguous, for they are written in place.")
    if start.dtype != torch.int64 or start.numel() != 1:
        raise TypeError(f"rope_store: start is {start.dtype} {list(start.shape)}; one int64 is required.")
    return head_dim


def _normalize(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm of each head, as Qwen3 rounds it."""
    if weight is None:
        return x
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + eps)
    return weight * h.to(weight.dtype)


def _rotate(x_BLHD: Tensor, cos: Tensor, sin: Tensor, rotation: Tensor | None) -> Tensor:
    """RoPE and R3, float32 [B, H, L, D]."""
    x = x_BLHD.transpose(1, 2).float()
    first, second = x.chunk(2, dim=-1)
    x = x * cos.float().unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.float().unsqueeze(1)
    return x if rotation is None else hadamard_transform(x, rotation)


def _store(
    x_BGLD: Tensor, cache: Tensor, token_scale: Tensor | None, scale: Tensor | None, clip: Tensor | None,
    shift: Tensor | None, slots: Tensor, bits: int,
) -> None:  # fmt: skip
    """Quantizes, packs and writes those tokens that have a slot."""
    has_slot = (slots >= 0) & (slots < cache.shape[2])
    slots = slots[has_slot]
    if bits == 16:
        codes = x_BGLD.to(cache.dtype)
    elif token_scale is not None:
        codes, row_scale = quantize_per_row(x_BGLD.float() - shift, clip.view(-1, 1, 1), bits)
        token_scale.index_copy_(2, slots, row_scale.squeeze(-1)[:, :, has_slot])
    else:
        codes = quantize(x_BGLD.float() - shift, scale.view(-1, 1, 1), bits)
    if bits == 4:
        codes = pack_int4(codes)
    cache.index_copy_(2, slots, codes[:, :, has_slot])


# Any strides will do: asked for exact ones, Inductor computes cos and sin anew for every layer.
@torch.library.custom_op(
    "pq_ao::rope_store",
    mutates_args=("keys", "values", "key_token_scale", "value_token_scale"),
    tags=(torch.Tag.flexible_layout,),
)
def rope_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotation: Tensor | None,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    norm_eps: float,
    keys: Tensor,
    values: Tensor,
    key_token_scale: Tensor | None,
    value_token_scale: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    key_clip: Tensor | None,
    value_clip: Tensor | None,
    key_shift: Tensor | None,
    value_shift: Tensor | None,
    start: Tensor,
    query_heads: int,
    bits: int,
    in_scale: Tensor | None = None,
    in_bias: Tensor | None = None,
) -> Tensor:
    """Writes keys and values of L tokens into the cache and returns the queries, ready for attention.

    Queries and keys: norm of each head (if given), RoPE and R3 in float32; values: as they are. Tokens whose slot lies
    outside the cache are not written.

    Args:
        qkv: [B, L, (H + 2G) * D] floating point, from one linear; D even.
        cos, sin: [B or 1, L, D] floating point.
        rotation: float32 [K, K], `hadamard_base(D)`, for R3; None for no rotation.
        query_norm, key_norm: [D] in the dtype of qkv, gains of a RMSNorm over each head, or None.
        norm_eps: its epsilon.
        keys, values: the cache, changed in place: uint8 [B, G, S, D / 2] (4 bits), int8 [B, G, S, D] (8 bits) or
            floats [B, G, S, D] (16 bits).
        key_token_scale, value_token_scale: float32 [B, G, S], changed in place, in dynamic mode; else None.
        key_scale, value_scale: float32 [G] in static mode; else None.
        key_clip, value_clip: float32 [G], above 0, in dynamic mode: a token's scale is clip times that of its absmax,
            shift off (see `pq_ao.ops.quantize_per_row`); else None.
        key_shift, value_shift: float32 [G, 1, D], taken off before quantizing; None at 16 bits.
        start: int64, one element: the slot of the first token.
        query_heads: H.
        bits: 4, 8 or 16.
        in_scale: float32 [(H + 2G) * D] if qkv holds accumulators, in bfloat16: qkv * in_scale + in_bias in float32 is
            then meant. None if qkv is as it should be.
        in_bias: float32 [(H + 2G) * D] or None; goes with in_scale.

    Returns:
        [B, L, H, D] in the dtype of qkv.

    Raises:
        TypeError: a dtype that does not go with `bits`.
        ValueError: shapes that do not fit together, or scales of both modes or neither; on the CPU, where it costs no
            wait, a clip of 0 or less.
    """
    head_dim = _check(
        qkv, cos, sin, rotation, (query_norm, key_norm), keys, values, (key_token_scale, value_token_scale),
        (key_scale, value_scale), (key_clip, value_clip), (key_shift, value_shift), start, query_heads, bits,
        (in_scale, in_bias),
    )  # fmt: skip
    groups, length = keys.shape[1], qkv.shape[1]
    heads_BLHD = scaled(qkv, in_scale, in_bias).view(*qkv.shape[:2], -1, head_dim)
    query, key, value = heads_BLHD.split((query_heads, groups, groups), dim=-2)
    query = _rotate(_normalize(query, query_norm, norm_eps), cos, sin, rotation)
    key = _rotate(_normalize(key, key_norm, norm_eps), cos, sin, rotation)
    slots = torch.arange(length, device=start.device) + start
    _store(key, keys, key_token_scale, key_scale, key_clip, key_shift, slots, bits)
    _store(value.transpose(1, 2), values, value_token_scale, value_scale, value_clip, value_shift, slots, bits)
    return query.to(qkv.dtype).transpose(1, 2).contiguous()


@rope_store.register_fake
def _(
    qkv, cos, sin, rotation, query_norm, key_norm, norm_eps, keys, values, key_token_scale, value_token_scale,
    key_scale, value_scale, key_clip, value_clip, key_shift, value_shift, start, query_heads, bits, in_scale=None,
    in_bias=None,
):  # fmt: skip
    head_dim = qkv.shape[-1] // (query_heads + 2 * keys.shape[1])
    return qkv.new_empty(*qkv.shape[:2], query_heads, head_dim)


@rope_store.register_kernel("cuda")
def _(
    qkv, cos, sin, rotation, query_norm, key_norm, norm_eps, keys, values, key_token_scale, value_token_scale,
    key_scale, value_scale, key_clip, value_clip, key_shift, value_shift, start, query_heads, bits, in_scale=None,
    in_bias=None,
):  # fmt: skip
    from pq_ao.ops.kernels.rope_store import launch

    head_dim = _check(
        qkv, cos, sin, rotation, (query_norm, key_norm), keys, values, (key_token_scale, value_token_scale),
        (key_scale, value_scale), (key_clip, value_clip), (key_shift, value_shift), start, query_heads, bits,
        (in_scale, in_bias),
    )  # fmt: skip
    query = qkv.new_empty(*qkv.shape[:2], query_heads, head_dim)
    launch(
        qkv.contiguous(), cos.contiguous(), sin.contiguous(), rotation, query_norm, key_norm, norm_eps, keys, values,
        key_token_scale, value_token_scale, key_scale, value_scale, key_clip, value_clip, key_shift, value_shift,
        start, query, bits, in_scale=in_scale, in_bias=in_bias,
    )  # fmt: skip
    return query
