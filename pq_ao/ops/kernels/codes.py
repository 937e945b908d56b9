"""The nearest code, in kernels: as `pq_ao.ops.quantize` finds it, from float32."""

import triton
import triton.language as tl

from pq_ao.ops.quantize import OUTER_CODES
from pq_ao.ops.quantize import ROUNDER as _ROUNDER

# a float32 that it was added to has the nearest whole number in its last bits; taken off again, it leaves that number
ROUNDER = tl.constexpr(_ROUNDER)

_SPREAD = tl.constexpr(OUTER_CODES["spread"])
_WIDE = tl.constexpr(OUTER_CODES["wide"])
LARGEST_SPREAD = tl.constexpr(OUTER_CODES["spread"][-1])
_LARGEST_WIDE = tl.constexpr(OUTER_CODES["wide"][-1])


@triton.jit
def round_half_even(x):
    """float32 to the nearest integer, half to even, as torch.round does. Needs |x| < 2^22: clamp before."""
    return (x + ROUNDER) - ROUNDER


@triton.jit
def is_even(high: tl.constexpr):
    """Whether the codes whose largest is `high` have even steps."""
    return high != LARGEST_SPREAD and high != _LARGEST_WIDE


@triton.jit
def _outer_codes(x, outer: tl.constexpr, COUNT: tl.constexpr):
    """As `pq_ao.ops.quantize.nearest_codes` does, operation by operation."""
    mirrored = x + 0.5
    size = tl.abs(mirrored) - 0.5
    upper = tl.minimum(round_half_even(size), 1.0 * outer[0])
    for i in tl.static_range(1, COUNT):
        upper = tl.where(size > (outer[i - 1] + outer[i]) / 2, 1.0 * outer[i], upper)
    return tl.where(mirrored < 0, -1.0 - upper, upper)


@triton.jit
def nearest_code(x, low: tl.constexpr, high: tl.constexpr):
    """The code nearest to a float32 quotient, as a whole float; the range says of which codes."""
    if high == LARGEST_SPREAD:
        return _outer_codes(x, _SPREAD, 3)
    if high == _LARGEST_WIDE:
        return _outer_codes(x, _WIDE, 5)
    # clamping to whole numbers first changes no code, and keeps the rounding in its range
    return round_half_even(tl.minimum(tl.maximum(x, low), high))


@triton.jit
def quantize(x, scale, low: tl.constexpr, high: tl.constexpr):
    """clamp(round(x / scale)) in float32: the codes as whole floats."""
    return nearest_code(tl.div_rn(x, scale), low, high)


@triton.jit
def stored_code(x, dtype: tl.constexpr):
    """Codes that are whole floats, as a byte each; to int8 without a conversion, which would be slow."""
    if dtype == tl.int8:
        x = (x + ROUNDER).to(tl.int32, bitcast=True)
    return x.to(dtype)
