"""Hooks attention into transformers: the registered name, its mask, and the step from cache to the attention op."""

import warnings

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask

from pq_ao.cache_layer import PrefixStaticLayer
from pq_ao.ops import dequantize, prefix_attention
from pq_ao.ops.attention import attend_causally, attend_plainly

ATTENTION_NAME = "prefixquant"


class UnpackedCacheWarning(UserWarning):
    """A quantized model writes into a cache that cannot hold packed keys and values."""


def _refuse(module: nn.Module, *args, **kwargs):
    raise RuntimeError(
        f"attn_implementation={ATTENTION_NAME!r} belongs to models prepared by `pq_ao.calibrate`; "
        f"{type(module).__name__} is not one of their attention modules. Choose another attn_implementation."
    )


def _compact_mask(*args, mask_function=causal_mask_function, attention_mask=None, **kwargs) -> Tensor | None:
    """What attention has to know beyond causality: None, the padding bool [B, S], or a whole mask bool [B, 1, L, S]."""
    if mask_function is not causal_mask_function:
        kwargs["allow_is_causal_skip"] = False
        return sdpa_mask(*args, mask_function=mask_function, attention_mask=attention_mask, **kwargs)
    return prepare_padding_mask(attention_mask, kwargs["kv_length"], kwargs.get("kv_offset", 0))


AttentionInterface.register(ATTENTION_NAME, _refuse)
AttentionMaskInterface.register(ATTENTION_NAME, _compact_mask)


def check_attention(module: nn.Module, mask: Tensor | None) -> None:
    """Refuses what would bypass the prefix or the padding.

    Raises:
        ValueError: another attention implementation was forced on the model.
        TypeError: a mask that is not boolean.
    """
    chosen = module.model_config._attn_implementation
    if chosen != ATTENTION_NAME:
        raise ValueError(
            f"attn_implementation={chosen!r}: a calibrated model attends to its prefix with {ATTENTION_NAME!r} only; "
            f"call model.set_attn_implementation({ATTENTION_NAME!r})."
        )
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(
            f"attention_mask: a boolean mask [B, 1, L, S] is required here, got {mask.dtype}; pass a 2-d padding mask "
            "to the model and let it build this one."
        )


def _dense_mask(mask: Tensor | None, start: Tensor | int, queries: int, slots: int, device: torch.device) -> Tensor:
    """bool [B or 1, 1, L, S] of a compact mask, for queries that begin at slot `start`."""
    if mask is not None and mask.ndim == 4:
        return mask
    slot = torch.arange(slots, device=device)
    causal = slot <= (torch.arange(queries, device=device) + start).unsqueeze(-1)
    return causal[None, None] if mask is None else causal & mask[:, None, None, :slots]


def packed_layer(module: nn.Module, cache) -> PrefixStaticLayer | None:
    """The layer of a `PrefixStaticCache` that belongs to an attention module; None for other caches, or without one."""
    index = module.layer_idx
    layer = cache.layers[index] if cache is not None and index < len(cache.layers) else None
    return layer if isinstance(layer, PrefixStaticLayer) else None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    mask: Tensor | None,
    cache,
) -> Tensor:
    """Stores this step's keys and values where there is a cache, then attends over [prefix | body], unfused.

    For floating point, the reference path, the caches of transformers and masks of a user's own.

    Args:
        module: a `PrefixAttention`.
        query: [B, H, L, D].
        key, value: [B, G, L, D], int8 codes (shift off) with scales, or floats without.
        key_scale, value_scale: float32 [G] (static) or [B, G, L] (dynamic), or None.
        mask: None (causal), bool [B, S] (causal, and False is padding) or bool [B, 1, L, S].
        cache: a `PrefixStaticCache`, a stock cache of transformers, or None.

    Returns:
        float32 [B, L, H, D].
    """
    if cache is None and mask is None and key_scale is None:
        return attend_causally(query, key, value, module.prefix_k, module.prefix_v, module.scaling)
    start: Tensor | int = 0
    without_shift = key_scale is not None  # as codes are, and what a stock cache keeps of them
    if cache is not None:
        index = module.layer_idx
        held = cache.get_seq_length(index)
        start = held.clone() if isinstance(held, Tensor) else held  # the tensor is about to move on
        if packed_layer(module, cache) is not None:
            layer, _ = cache.update(key, value, index, key_scale=key_scale, value_scale=value_scale)
            key, value = layer.keys, layer.values
            if layer.key_scale is not None:
                key_scale, value_scale = layer.key_scale, layer.value_scale
        else:
            if key_scale is not None:
                _warn_unpacked(cache)
                if key_scale.ndim > 1:  # a stock cache has no room for one scale a token
                    key, value = dequantize(key, key_scale.unsqueeze(-1)), dequantize(value, value_scale.unsqueeze(-1))
                    key_scale = value_scale = None
            key, value = cache.update(key, value, index)
    mask = _dense_mask(mask, start, query.shape[2], key.shape[2], query.device)
    prefix_k, prefix_v, value_shift = module.prefix_k, module.prefix_v, None
    if without_shift:
        value_shift = module.kv.value_shift
        prefix_k, prefix_v = prefix_k - module.kv.key_shift, prefix_v - value_shift
    attention = attend_plainly if query.requires_grad else prefix_attention
    out_BLHD = attention(query, key, value, key_scale, value_scale, prefix_k, prefix_v, mask, module.scaling)
    if value_shift is None:
        return out_BLHD
    return out_BLHD + value_shift.squeeze(1).repeat_interleave(query.shape[1] // key.shape[1], dim=0)


def _warn_unpacked(cache) -> None:
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"{type(cache).__name__} keeps quantized keys and values unpacked: same results, more memory. "
            "For the packed cache pass past_key_values=pq_ao.PrefixStaticCache(model, batch_size, max_cache_len).",
            UnpackedCacheWarning,
            stacklevel=2,
        )
