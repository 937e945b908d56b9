"""Pieces that the kernels of pq_ao::silu_hadamard share: SwiGLU and the quantizer."""

import triton
import triton.language as tl

from pq_ao.ops.kernels.codes import ROUNDER, is_even, nearest_code, stored_code
from pq_ao.ops.kernels.interpret import INTERPRETED
from pq_ao.ops.kernels.raw_input import NO_MODIFIER, load_input

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid_over(x, divisor, STEEPNESS: tl.constexpr = 1.0):
    """sigmoid(STEEPNESS * x) / divisor to some 3 units in the last place, without slow paths; both cost nothing."""
    if INTERPRETED:
        return 1.0 / (divisor + divisor * tl.exp(x * -STEEPNESS))
    power = tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * (-STEEPNESS * _LOG2_E)], dtype=tl.float32, is_pure=True, pack=1
    )
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [tl.fma(power, divisor, divisor)], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def silu_times(gate_ptr, columns, mask, in_scale_ptr, in_bias_ptr, F: tl.constexpr, CACHE: tl.constexpr = NO_MODIFIER):
    """silu(gate) * up in float32 at `columns` of a row of gate_up."""
    gate = load_input(gate_ptr, columns, mask, in_scale_ptr, in_bias_ptr, CACHE)
    up = load_input(gate_ptr, F + columns, mask, in_scale_ptr, in_bias_ptr, CACHE)
    return gate * sigmoid_over(gate, 1.0) * up


@triton.jit
def _saturated(x, factor, offset):
    """x * factor + offset between 0 and 1, in one instruction."""
    if INTERPRETED:
        return tl.minimum(tl.maximum(x * factor + offset, 0.0), 1.0)
    return tl.inline_asm_elementwise(
        "fma.rn.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [x, factor, offset], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def saturated_codes(y, scale, dtype: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """`to_codes` in two instructions, for sums: a y halfway between two codes may become either."""
    if dtype == tl.float32 or not is_even(HIGH):
        return to_codes(y, scale, dtype, LOW, HIGH)
    SPAN: tl.constexpr = HIGH - LOW
    part = _saturated(y, 1.0 / (scale * SPAN), -LOW / SPAN)
    return _from_rounded(tl.fma(part, SPAN + 0.0, LOW + ROUNDER), dtype)


@triton.jit
def to_codes(y, scale, dtype: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """y quantized, as `dtype`; float32 stands for y as it is."""
    if dtype == tl.float32:
        return y
    if not is_even(HIGH):
        return stored_code(nearest_code(y * (1.0 / scale), LOW, HIGH), dtype)
    # The order of sums already decides between two codes at their edge, so a true division would buy nothing here.
    # Clamping before the product leaves the product and the rounding to one instruction.
    y = tl.minimum(tl.maximum(y, LOW * scale), HIGH * scale) * (1.0 / scale) + ROUNDER
    return _from_rounded(y, dtype)


@triton.jit
def _from_rounded(y, dtype: tl.constexpr):
    if dtype == tl.int8:
        return y.to(tl.int32, bitcast=True).to(tl.int8)
    return (y - ROUNDER).to(dtype)
