"""Pieces that the kernels of pq_ao::silu_hadamard share: SwiGLU and the quantizer."""

import triton
import triton.language as tl

from pq_ao.ops.kernels.interpret import INTERPRETED
from pq_ao.ops.kernels.raw_input import NO_MODIFIER, load_input

# the number whose last bits, once it is added, are the rounded integer
_ROUNDER = tl.constexpr(12582912.0)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)) to some 3 units in the last place; two special-function instructions, and no slow paths."""
    if INTERPRETED:
        return 1.0 / (1.0 + tl.exp(-x))
    return tl.inline_asm_elementwise(
        "{ .reg .f32 t; ex2.approx.ftz.f32 t, $1; add.ftz.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }",
        "=f,f",
        [x * -_LOG2_E],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def silu_times(
    gate_ptr, columns, mask, in_scale_ptr, in_bias_ptr, F: tl.constexpr, IN_DTYPE: tl.constexpr,
    CACHE: tl.constexpr = NO_MODIFIER,
):  # fmt: skip
    """silu(gate) * up in float32 at `columns` of a row of gate_up."""
    gate = load_input(gate_ptr, columns, mask, in_scale_ptr, in_bias_ptr, IN_DTYPE, CACHE)
    up = load_input(gate_ptr, F + columns, mask, in_scale_ptr, in_bias_ptr, IN_DTYPE, CACHE)
    return gate * _sigmoid(gate) * up


@triton.jit
def to_codes(y, scale, dtype: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """y quantized, as `dtype`; float32 stands for y as it is."""
    if dtype == tl.float32:
        return y
    # The order of sums already decides between two codes at their edge, so a true division would buy nothing here.
    # Clamping before the product leaves the product and the rounding to one instruction.
    y = tl.minimum(tl.maximum(y, LOW * scale), HIGH * scale) * (1.0 / scale) + _ROUNDER
    if dtype == tl.int8:
        return y.to(tl.int32, bitcast=True).to(tl.int8)
    return (y - _ROUNDER).to(dtype)
