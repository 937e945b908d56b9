"""What kernels need to know of Triton's interpreter: it has no inline assembly and no libdevice."""

import triton
import triton.language as tl

from pq_ao.ops.quantize import E2M1_LARGEST

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# adding and taking off 1.5 * 2^23 leaves a float32 rounded to an integer, half to even
_ROUNDER = tl.constexpr(12582912.0)

E2M1 = tl.constexpr(E2M1_LARGEST)


@triton.jit
def round_half_even(x):
    """float32 to the nearest integer, half to even, as torch.round does. Needs |x| < 2^22: clamp before."""
    return (x + _ROUNDER) - _ROUNDER


@triton.jit
def nearest_code(x, low: tl.constexpr, high: tl.constexpr):
    """The code nearest to a float32 quotient, as a whole float; the range of e2m1 says that it is one of those."""
    # clamping to whole numbers first changes no code, and keeps the rounding in its range
    x = tl.minimum(tl.maximum(x, low), high)
    if high == E2M1:
        size = tl.abs(x)
        step = tl.where(size < 4.0, 1.0, tl.where(size < 8.0, 2.0, 4.0))
        part = tl.where(size < 4.0, 1.0, tl.where(size < 8.0, 0.5, 0.25))
        return round_half_even(x * part) * step
    return round_half_even(x)


@triton.jit
def quantize(x, scale, low: tl.constexpr, high: tl.constexpr):
    """clamp(round(x / scale)) in float32: the codes as whole floats."""
    return nearest_code(tl.div_rn(x, scale), low, high)
