"""Operators of a quantized decoder. Needs torch alone: neither torchao nor transformers is imported."""

from pq_ao.ops.attention import prefix_attention
from pq_ao.ops.hadamard import hadamard
from pq_ao.ops.int_linear import int_accumulate, int_linear
from pq_ao.ops.packing import pack_int4, unpack_int4
from pq_ao.ops.quantize import code_range, dequantize, quantize, quantize_per_row

__all__ = [
    "code_range",
    "dequantize",
    "hadamard",
    "int_accumulate",
    "int_linear",
    "pack_int4",
    "prefix_attention",
    "quantize",
    "quantize_per_row",
    "unpack_int4",
]
