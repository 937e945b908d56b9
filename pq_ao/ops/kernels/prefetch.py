"""Asking L2 for memory that is read later; nothing waits for it."""

import triton
import triton.language as tl

from pq_ao.ops.kernels.interpret import INTERPRETED

_LINE = tl.constexpr(128)  # bytes


@triton.jit
def prefetch(ptr, BYTES: tl.constexpr, part=0, PARTS: tl.constexpr = 1):
    """So many bytes at ptr, by lines; those of `part` where PARTS programs share them."""
    LINES: tl.constexpr = (BYTES + _LINE - 1) // _LINE
    MINE: tl.constexpr = triton.next_power_of_2((LINES + PARTS - 1) // PARTS)
    if not INTERPRETED:
        places = tl.minimum((part * MINE + tl.arange(0, MINE)) * _LINE, BYTES - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptr.to(tl.pointer_type(tl.int8)) + places],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
