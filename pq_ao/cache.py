"""PrefixStaticCache: a static cache of transformers that holds packed keys and values behind a hidden prefix.

The cache counts the body only: slot 0 is the first token of the user. The prefix lives in the attention modules and
is never written, so that `generate` with masks, padding and several turns needs to know nothing of it.
"""

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from pq_ao.cache_layer import PrefixStaticLayer
from pq_ao.context import warn_beyond_context
from pq_ao.modules import attention_modules
from pq_ao.ops.kernels.workspace import counters
from pq_ao.quantizers import Path


class PrefixStaticCache(Cache):
    """Static cache with packed keys and values, for `model(...)`, `model.generate(...)` and compiled steps.

    Args:
        model: a calibrated model, quantized or not (before `quantize_` it keeps floats).
        batch_size: rows of the batch.
        max_cache_len: tokens of prompt and reply together, the prefix not counted.
        spare_slots: more slots behind them, for what is written there only to be overwritten.

    Raises:
        ValueError: the model is not calibrated, or a size is not an integer or too small.

    Warns:
        ContextWarning: more tokens than static keys were calibrated for.

    Example::

        cache = pq_ao.PrefixStaticCache(model, batch_size=1, max_cache_len=4096)
        out = model.generate(**inputs, past_key_values=cache)
    """

    def __init__(self, model: PreTrainedModel, batch_size: int, max_cache_len: int, *, spare_slots: int = 0):
        sizes = (("batch_size", batch_size, 1), ("max_cache_len", max_cache_len, 1), ("spare_slots", spare_slots, 0))
        for name, size, least in sizes:
            if not isinstance(size, int) or isinstance(size, bool) or size < least:
                raise ValueError(f"{name}={size!r}: must be an integer of at least {least}.")
        layers = []
        attentions = attention_modules(model)
        warn_beyond_context(model, "max_cache_len", max_cache_len)
        length = torch.zeros((), dtype=torch.int64, device=attentions[0].prefix_k.device)
        for attention in attentions:
            kv = attention.kv
            bits = kv.bits if kv.path is Path.INTEGER else 16
            dtype = {4: torch.uint8, 8: torch.int8, 16: attention.fixed_dtype}[bits]
            layer = PrefixStaticLayer(
                batch_size,
                attention.kv_heads,
                max_cache_len + spare_slots,
                attention.head_dim,
                bits,
                length,
                dtype=dtype,
                device=attention.prefix_k.device,
                per_token_scales=kv.dynamic and bits < 16,
            )
            layers.append(layer)
        counters(length.device)  # must exist before a CUDA graph is recorded
        layers[0].is_first = layers[-1].is_last = True
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and their per-token scales; the prefix, a buffer of the model, is not counted."""
        return sum(
            tensor.nbytes
            for layer in self.layers
            for tensor in (layer.keys, layer.values, layer.key_scale, layer.value_scale)
            if tensor is not None
        )
