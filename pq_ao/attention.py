"""Hooks attention into transformers: the registered name, its mask, and the step from cache to the attention op."""

import warnings

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from pq_ao.cache_layer import PrefixStaticLayer
from pq_ao.ops import dequantize, prefix_attention

ATTENTION_NAME = "prefixquant"


class UnpackedCacheWarning(UserWarning):
    """A quantized model writes into a cache that cannot hold packed keys and values."""


def _refuse(module: nn.Module, *args, **kwargs):
    raise RuntimeError(
        f"attn_implementation={ATTENTION_NAME!r} belongs to models prepared by `pq_ao.calibrate`; "
        f"{type(module).__name__} is not one of their attention modules. Choose another attn_implementation."
    )


def _full_mask(*args, **kwargs) -> Tensor:
    # never skipped: our attention needs a real mask for the body and widens it over the prefix itself
    kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, **kwargs)


AttentionInterface.register(ATTENTION_NAME, _refuse)
AttentionMaskInterface.register(ATTENTION_NAME, _full_mask)


def _check(module: nn.Module, mask: Tensor | None) -> None:
    chosen = module.model_config._attn_implementation
    if chosen != ATTENTION_NAME:
        raise ValueError(
            f"attn_implementation={chosen!r}: a calibrated model attends to its prefix with {ATTENTION_NAME!r} only; "
            f"call model.set_attn_implementation({ATTENTION_NAME!r})."
        )
    if mask is None or mask.dtype != torch.bool:
        kind = "None" if mask is None else str(mask.dtype)
        raise TypeError(
            f"attention_mask: a boolean mask [B, 1, L, S] is required here, got {kind}; pass a 2-d padding mask to the "
            "model and let it build this one."
        )


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
    """Stores this step's keys and values where there is a cache, then attends over [prefix | body].

    Args:
        module: a `PrefixAttention`.
        query: [B, H, L, D].
        key, value: [B, G, L, D], int8 codes with scales, or floats without.
        key_scale, value_scale: float32 [G] (static) or [B, G, L] (dynamic), or None.
        mask: bool [B, 1, L, S].
        cache: a `PrefixStaticCache`, a stock cache of transformers, or None.

    Returns:
        float32 [B, L, H, D].

    Raises:
        ValueError: another attention implementation was forced on the model.
        TypeError: no boolean mask.
    """
    _check(module, mask)
    if cache is not None:
        index = module.layer_idx
        layer = cache.layers[index] if index < len(cache.layers) else None
        if isinstance(layer, PrefixStaticLayer):
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
    prefix_k, prefix_v, value_shift = module.prefix_k, module.prefix_v, None
    if module.kv.value_shift is not None and not key.is_floating_point():
        value_shift = module.kv.value_shift
        prefix_k, prefix_v = prefix_k - module.kv.key_shift, prefix_v - value_shift
    out_BLHD = prefix_attention(query, key, value, key_scale, value_scale, prefix_k, prefix_v, mask, module.scaling)
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
