"""What the kernels of pq_ao::rope_store share: the codes of a true division."""

import triton
import triton.language as tl

from pq_ao.ops.kernels.codes import nearest_code, quantize
from pq_ao.ops.kernels.interpret import INTERPRETED


@triton.jit
def divide_and_round(x, scale, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The codes of a true division, as whole floats, from one reciprocal a head: a division an element is slow."""
    if INTERPRETED:  # its fma rounds twice
        return quantize(x, scale, LOW, HIGH)
    reciprocal = tl.div_rn(1.0, scale)
    # off by an ulp at most, which the exact remainder mends (P. Markstein, IBM J. Res. Dev. 34, 1990)
    quotient = tl.minimum(tl.maximum(x * reciprocal, LOW - 1.0), HIGH + 1.0)
    quotient = tl.fma(tl.fma(-quotient, scale, x), reciprocal, quotient)
    return nearest_code(quotient, LOW, HIGH)
