"""What kernels need to know of Triton's interpreter: it has no inline assembly and no libdevice."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
