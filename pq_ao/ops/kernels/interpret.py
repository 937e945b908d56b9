"""What kernels need to know of Triton's interpreter: it has no inline assembly and no libdevice."""

import triton
import triton.language as tl

from pq_ao.ops.quantize import OUTER_CODES

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# adding and taking off 1.5 * 2^23 leaves a float32 rounded to an integer, half to even
_ROUNDER = tl.constexpr(12582912.0)


@triton.constexpr_function
def outer_codes(high):
    """Of the codes whose largest is `high`: where even steps end, and what follows; none if they never end."""
    return next((codes for codes in OUTER_CODES.values() if codes[-1] == high), ())


@triton.constexpr_function
def outer_count(high):
    """Number of codes that `outer_codes` has behind the even ones."""
    return max(0, len(outer_codes.fn(high)) - 1)


@triton.constexpr_function
def _last_even(high):
    return float(outer_codes.fn(high)[0])


@triton.constexpr_function
def _edge(high, i):
    return sum(outer_codes.fn(high)[i : i + 2]) / 2


@triton.constexpr_function
def _step(high, i):
    codes = outer_codes.fn(high)
    return float(codes[i + 1] - codes[i])


@triton.jit
def round_half_even(x):
    """float32 to the nearest integer, half to even, as torch.round does. Needs |x| < 2^22: clamp before."""
    return (x + _ROUNDER) - _ROUNDER


@triton.jit
def nearest_code(x, low: tl.constexpr, high: tl.constexpr):
    """The code nearest to a float32 quotient, as a whole float; the range says of which codes."""
    if outer_count(high) == 0:
        # clamping to whole numbers first changes no code, and keeps the rounding in its range
        return round_half_even(tl.minimum(tl.maximum(x, low), high))
    code = round_half_even(tl.minimum(tl.maximum(x, -1.0 - _last_even(high)), _last_even(high)))
    for i in tl.static_range(outer_count(high)):
        code += tl.where(x > _edge(high, i), _step(high, i), 0.0)
        code -= tl.where(x < -1.0 - _edge(high, i), _step(high, i), 0.0)
    return code


@triton.jit
def quantize(x, scale, low: tl.constexpr, high: tl.constexpr):
    """clamp(round(x / scale)) in float32: the codes as whole floats."""
    return nearest_code(tl.div_rn(x, scale), low, high)
