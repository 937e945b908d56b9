"""What kernels need to know of Triton's interpreter: it has no inline assembly and no libdevice."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# adding and taking off 1.5 * 2^23 leaves a float32 rounded to an integer, half to even
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def round_half_even(x):
    """float32 to the nearest integer, half to even, as torch.round does. Needs |x| < 2^22: clamp before."""
    return (x + _ROUNDER) - _ROUNDER


@triton.jit
def quantize(x, scale, low: tl.constexpr, high: tl.constexpr):
    """clamp(round(x / scale)) in float32: the codes as whole floats."""
    # clamping to whole numbers first changes no code, and keeps the rounding in its range
    return round_half_even(tl.minimum(tl.maximum(tl.div_rn(x, scale), low), high))
