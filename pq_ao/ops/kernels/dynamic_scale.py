"""The scale of dynamic mode, as `pq_ao.ops.quantize_per_row` computes it."""

import triton
import triton.language as tl

from pq_ao.ops.quantize import _OFF_THE_EDGE as OFF_THE_EDGE
from pq_ao.ops.quantize import MAX_SCALE, MIN_SCALE

_OFF_THE_EDGE = tl.constexpr(OFF_THE_EDGE)
_MIN_SCALE, _MAX_SCALE = tl.constexpr(MIN_SCALE), tl.constexpr(MAX_SCALE)


@triton.jit
def dynamic_scale(absmax, clip, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The scale of values up to absmax, to the bit: its factors are multiplied in the order of the plain quantizer."""
    scale = absmax * _OFF_THE_EDGE * clip * (2 / (HIGH - LOW))
    return tl.minimum(tl.maximum(scale, _MIN_SCALE), _MAX_SCALE)
