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


@triton.jit
def half_codes(y, offsets, dtype: tl.constexpr):
    """Words of two codes of 4 bits, as bytes: int8 in bytes 0 and 2, float8 in 0 and 1.

    y + offsets is 0 to 1 from the lowest code to the highest, and saturates there.
    """
    if INTERPRETED:
        a, b = halves(y)
        c, d = halves(offsets)
        a = _code(a.to(tl.float32) + c.to(tl.float32), dtype)
        b = _code(b.to(tl.float32) + d.to(tl.float32), dtype)
        return a | (b << (16 if dtype == tl.int8 else 8))
    if dtype == tl.int8:  # 1272 = 1024 + 256 - 8: from 1024 on the last bits are the integer
        x = tl.inline_asm_elementwise(
            "{ .reg .b32 t, n, m; mov.b32 n, 0x4B804B80; mov.b32 m, 0x64F864F8;"
            " add.rn.sat.f16x2 t, $1, $2; fma.rn.f16x2 $0, t, n, m; }",
            "=r,r,r", [y, offsets], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:  # 1536 rounds, 1544 takes off 8 more
        x = tl.inline_asm_elementwise(
            "{ .reg .b32 t, n, m; .reg .b16 e; mov.b32 n, 0x4B804B80; mov.b32 m, 0x66006600;"
            " add.rn.sat.f16x2 t, $1, $2; fma.rn.f16x2 t, t, n, m; mov.b32 m, 0x66086608;"
            " sub.rn.f16x2 t, t, m; cvt.rn.satfinite.e4m3x2.f16x2 e, t; cvt.u32.u16 $0, e; }",
            "=r,r,r", [y, offsets], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return x


@triton.jit
def _code(part, dtype: tl.constexpr):
    """The interpreter's: one code in the low byte of an int32."""
    part = tl.minimum(tl.maximum(part, 0.0), 1.0).to(tl.float16).to(tl.float32)
    code = part * 15.0 + 12582912.0 - 12582912.0 - 8.0
    if dtype == tl.int8:
        return code.to(tl.int32) & 0xFF
    return code.to(dtype).to(tl.uint8, bitcast=True).to(tl.int32)


@triton.jit
def four_codes(first, second, dtype: tl.constexpr):
    """Two results of `half_codes` as a word of four codes."""
    if INTERPRETED:
        if dtype == tl.int8:
            first, second = first | (first >> 8), second | (second >> 8)
        return (first & 0xFFFF) | (second << 16)
    if dtype == tl.int8:
        x = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x6420;", "=r,r,r", [first, second], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        x = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [first, second], dtype=tl.int32, is_pure=True, pack=1
        )
    return x
