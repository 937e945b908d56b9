"""Tensor subclasses of a quantized decoder: packed weights, and activations between an op and its linear."""

from pq_ao.tensors.packed_weight import PackedWeight
from pq_ao.tensors.quantized_activation import QuantizedActivation

__all__ = ["PackedWeight", "QuantizedActivation"]
