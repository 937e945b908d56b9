"""Bytes of a calibrated or quantized model, and of everything that is alive.

They are counted on the tensors that hold the data: a `PackedWeight` shows the shape and dtype of the weight that it
stands for, so its own `nbytes` is that of a dense tensor.
"""

import dataclasses
import gc
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from pq_ao.cache import PrefixStaticCache
from pq_ao.linears import CalibratedLinear, KeptEmbedding, KeptLinear
from pq_ao.modules import PrefixAttention, attention_modules

BF16_BYTES = 2


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of a calibrated or quantized model, see `memory`.

    Attributes:
        linear_bytes: the linears of the decoder blocks: weights (codes and scales once quantized), biases, and the
            shifts and static scales or clip factors of their inputs. Before `quantize_` floating-point weight and
            codes are both held.
        linear_bf16_bytes: the same weights in bfloat16.
        kept_bytes: embedding and head.
        kv_bytes: what the cache holds, the prefix's keys and values, the shifts of all others and their static scales
            or clip factors; None without a cache.
        kv_bf16_bytes: keys and values of a StaticCache in bfloat16, same batch and length; None without a cache.
    """

    linear_bytes: int
    linear_bf16_bytes: int
    kept_bytes: int
    kv_bytes: int | None = None
    kv_bf16_bytes: int | None = None

    @property
    def linear_ratio(self) -> float:
        """linear_bytes over linear_bf16_bytes."""
        return self.linear_bytes / self.linear_bf16_bytes

    @property
    def kv_ratio(self) -> float | None:
        """kv_bytes over kv_bf16_bytes; None without a cache."""
        return None if self.kv_bytes is None else self.kv_bytes / self.kv_bf16_bytes


def memory(model: PreTrainedModel, cache: PrefixStaticCache | None = None) -> MemoryReport:
    """Counts the bytes of a calibrated or quantized model, and of a cache made for it.

    Raises:
        ValueError: the model is not calibrated.
        TypeError: `cache` is another kind of cache.

    Example::

        report = pq_ao.memory(model, pq_ao.PrefixStaticCache(model, batch_size=1, max_cache_len=1024))
        report.linear_ratio, report.kv_ratio
    """
    attentions = attention_modules(model)
    linears = [linear for _, linear in calibrated_linears(model)]
    kept = [parameter for module in kept_modules(model).values() for parameter in module.parameters()]
    report = MemoryReport(
        linear_bytes=sum(bytes_of_linear(linear) for linear in linears),
        linear_bf16_bytes=sum(linear.weight.numel() * BF16_BYTES for linear in linears),
        kept_bytes=sum(map(bytes_of, kept)),
    )
    if cache is None:
        return report
    if not isinstance(cache, PrefixStaticCache):
        raise TypeError(
            f"cache: got {type(cache).__name__}; pass a pq_ao.PrefixStaticCache, the one that holds packed keys and "
            "values, or leave it out."
        )
    return dataclasses.replace(
        report,
        kv_bytes=cache.nbytes + sum(bytes_of_prefix(attention) for attention in attentions),
        kv_bf16_bytes=sum(
            2 * layer.batch_size * layer.num_heads * layer.max_cache_len * layer.k_head_dim * BF16_BYTES
            for layer in cache.layers
        ),
    )


def live_bytes() -> Counter[str]:
    """Bytes of every tensor that is alive in this process, by dtype such as "uint8".

    A storage counts once, as the first dtype that it was found with, and counts whole even if only a slice of it is in
    use. Tensor subclasses count as the tensors inside them. Tensors that no Python object refers to, such as scratch
    memory of a kernel at work, are not seen, and a tensor on the meta device has no bytes.

    Example::

        before = live_bytes()
        model(ids)
        (live_bytes() - before).total()  # 0: the forward leaves nothing behind
    """
    gc.collect()
    total: Counter[str] = Counter()
    seen: set[int] = set()
    for item in gc.get_objects():
        # type(), not isinstance: that asks the object for __class__, which lazy ones answer with an import
        if (
            not issubclass(type(item), Tensor)
            or is_traceable_wrapper_subclass(item)
            or item.layout is not torch.strided
        ):
            continue
        storage = item.untyped_storage()
        # the compiler's fake tensors show a device, and only their storage tells that they have no bytes
        if storage.device.type != "meta" and storage._cdata not in seen:
            seen.add(storage._cdata)
            total[str(item.dtype).removeprefix("torch.")] += storage.nbytes()
    return total


def calibrated_linears(model: nn.Module) -> list[tuple[str, CalibratedLinear]]:
    """The linears of the decoder blocks and their names."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, CalibratedLinear)]


def kept_modules(model: nn.Module) -> dict[str, KeptEmbedding | KeptLinear]:
    """Embedding and head by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, KeptEmbedding | KeptLinear)}


def bytes_of(tensor: Tensor | None) -> int:
    """Bytes that hold the data of a tensor; 0 for None."""
    if tensor is None:
        return 0
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return sum(bytes_of(getattr(tensor, name)) for name in names)
    return tensor.nbytes


def bytes_of_linear(linear: CalibratedLinear) -> int:
    """Weight, bias, and scale, clip factor and shift of its input."""
    site = linear.quantizers[0]
    weight = (linear.weight, linear.bias, linear.packed, linear.packed_bias)
    return sum(map(bytes_of, (*weight, site.scale, site.clip, site.shift)))


def bytes_of_prefix(attention: PrefixAttention) -> int:
    """Keys and values of the prefix, and scales, clip factors and shifts of all others."""
    return sum(map(bytes_of, (attention.prefix_k, attention.prefix_v, *attention.kv.buffers())))


def bytes_of_model(model: nn.Module) -> int:
    """Everything that the model holds; what several modules share counts once."""
    return sum(map(bytes_of, (*model.parameters(), *model.buffers())))
