"""Loading a linear's output, or its accumulators, which are scaled on the way: that saves a pass over them."""

import triton
import triton.language as tl

from pq_ao.ops.kernels.interpret import INTERPRETED

NO_MODIFIER = tl.constexpr("")


@triton.jit
def _times(x, scale):
    """A product that no addition is fused with: the linear's own epilogue rounds it."""
    if INTERPRETED:
        return x * scale
    return tl.inline_asm_elementwise(
        "mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, scale], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def load_input(ptr, columns, mask, in_scale_ptr, in_bias_ptr, CACHE: tl.constexpr = NO_MODIFIER):
    """float32 of row `ptr` at `columns`, or with scales, which stand once a column, of x * scale + bias."""
    x = tl.load(ptr + columns, mask=mask, other=0.0, cache_modifier=CACHE).to(tl.float32)
    if in_scale_ptr is not None:
        x = _times(x, tl.load(in_scale_ptr + columns, mask=mask, other=0.0))
        if in_bias_ptr is not None:
            x += tl.load(in_bias_ptr + columns, mask=mask, other=0.0)
    return x
