"""float16 by twos: a word, int32, holds two of them, the low half first, and an instruction does both.

Conversions from float32 saturate: what is beyond float16's range becomes its largest number, not infinity.
"""

import triton
import triton.language as tl

from pq_ao.ops.kernels.interpret import INTERPRETED

_LARGEST = tl.constexpr(65504.0)


@triton.constexpr_function
def _log2(n):
    return n.bit_length() - 1


@triton.jit
def word(low, high):
    """A word of two float32."""
    if INTERPRETED:
        low = _saturated(low).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return low | (_saturated(high).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return tl.inline_asm_elementwise(
        "cvt.rn.satfinite.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def halves(x):
    """The two float16 of a word."""
    if INTERPRETED:
        low, high = (x & 0xFFFF).to(tl.int16), (x >> 16).to(tl.int16)
        return low.to(tl.float16, bitcast=True), high.to(tl.float16, bitcast=True)
    return tl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=1
    )


@triton.jit
def _saturated(x):
    return tl.minimum(tl.maximum(x, -_LARGEST), _LARGEST).to(tl.float16)


@triton.jit
def to_half(x):
    """float32 to float16; neighbours are converted together."""
    if INTERPRETED:
        return _saturated(x)
    return tl.inline_asm_elementwise(
        "cvt.rn.satfinite.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.float16, is_pure=True, pack=2
    )


@triton.jit
def dot_half(a, b):
    """a @ b in float32; the interpreter gets the same numbers in float32."""
    acc = tl.zeros((a.shape[0], a.shape[1], b.shape[2]), tl.float32)
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def _add(x, y):
    if INTERPRETED:
        a, b = halves(x)
        c, d = halves(y)
        return word(a.to(tl.float32) + c.to(tl.float32), b.to(tl.float32) + d.to(tl.float32))
    return tl.inline_asm_elementwise("add.rn.f16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _less(x, y):
    if INTERPRETED:
        return _add(x, y ^ -0x7FFF8000)  # both signs turned
    return tl.inline_asm_elementwise("sub.rn.f16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _butterfly(h, STEP: tl.constexpr, SIZE: tl.constexpr):
    done = ()
    for i in tl.static_range(SIZE):
        if i & STEP:
            done = done + (_less(h[i - STEP], h[i]),)
        else:
            done = done + (_add(h[i], h[i + STEP]),)
    return done


@triton.jit
def half_butterflies(h, SIZE: tl.constexpr):
    """Walsh transform along a tuple of SIZE tensors of words."""
    for stage in tl.static_range(_log2(SIZE)):
        h = _butterfly(h, 1 << stage, SIZE)
    return h


@triton.jit
def times_plus(x, factors):
    """float32 x times the low float16 of the words `factors`, plus the high one, rounded once to float32."""
    scale, bias = halves(factors)
    return tl.fma(x, scale.to(tl.float32), bias.to(tl.float32))
