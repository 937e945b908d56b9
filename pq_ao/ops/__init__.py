"""Operators of a quantized decoder. Needs torch alone: neither torchao nor transformers is imported."""

from pq_ao.ops.attention import prefix_attention
from pq_ao.ops.cache_attention import cache_attention
from pq_ao.ops.hadamard import hadamard
from pq_ao.ops.int_linear import int_accumulate, int_linear, unscaled_linear
from pq_ao.ops.linear_paths import LinearPath, encoding, forced_path, linear_path
from pq_ao.ops.packing import pack_int4, unpack_int4
from pq_ao.ops.quantize import code_range, dequantize, quantize, quantize_per_row
from pq_ao.ops.rope_store import rope_store
from pq_ao.ops.silu_hadamard import silu_hadamard

__all__ = [
    "LinearPath",
    "cache_attention",
    "code_range",
    "dequantize",
    "encoding",
    "forced_path",
    "hadamard",
    "int_accumulate",
    "int_linear",
    "linear_path",
    "pack_int4",
    "prefix_attention",
    "quantize",
    "quantize_per_row",
    "rope_store",
    "silu_hadamard",
    "unpack_int4",
    "unscaled_linear",
]
