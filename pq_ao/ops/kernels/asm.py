"""Integer instructions that Triton has no name for, each with a plain form for the interpreter.

INT4 codes are widened as 16 * code: flipping the top bit of an offset-binary nibble makes it two's complement, and a
nibble in the upper half of a byte is that code times 16. No sign extension and no offset remain; sums are shifted
right by 4 at the end, which is exact.
"""

import triton
import triton.language as tl

from pq_ao.ops.kernels.interpret import INTERPRETED


@triton.jit
def _byte(word, place: tl.constexpr):
    """Signed byte `place` of each int32 word."""
    return (word << (24 - 8 * place)) >> 24


@triton.jit
def dp4a(a, b, c):
    """c + the product of four signed bytes of `a` with those of `b`; int32 words."""
    if INTERPRETED:
        for place in tl.static_range(4):
            c = c + _byte(a, place) * _byte(b, place)
        return c
    else:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )


# four bytes at once; lookup 0x6A is (a & b) ^ c. Written as asm for words too: ptxas does not join the two by itself.
_WIDEN = tl.constexpr("""{
    .reg .b32 shifted;
    shl.b32 shifted, $2, 4;
    lop3.b32 $1, $2, 0xF0F0F0F0, 0x80808080, 0x6A;
    lop3.b32 $0, shifted, 0xF0F0F0F0, 0x80808080, 0x6A;
}""")


@triton.jit
def widen_words(words):
    """int32 words of four packed bytes to words of 16 * code: of the low nibbles, and of the high ones."""
    if INTERPRETED:
        # 0xF0F0F0F0 and 0x80808080 as int32
        low = ((words << 4) & -252645136) ^ -2139062144
        high = (words & -252645136) ^ -2139062144
        return low, high
    else:
        return tl.inline_asm_elementwise(_WIDEN, "=r,=r,r", [words], dtype=(tl.int32, tl.int32), is_pure=True, pack=1)


@triton.jit
def widen_bytes(packed):
    """uint8 packed bytes to int8 of 16 * code: of the low nibbles, and of the high ones."""
    if INTERPRETED:
        low = ((packed << 4) ^ 0x80).to(tl.int8, bitcast=True)
        high = ((packed & 0xF0) ^ 0x80).to(tl.int8, bitcast=True)
        return low, high
    else:
        return tl.inline_asm_elementwise(_WIDEN, "=r,=r,r", [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)


@triton.jit
def _e4m3_bits(code):
    """int32 codes in -8..7 to the byte of their float8_e4m3fn."""
    magnitude = tl.abs(code)
    # exponent and first three bits of the fraction of the float32, biased by 7 in place of 127
    bits = (magnitude.to(tl.float32).to(tl.int32, bitcast=True) >> 20) - (120 << 3)
    return tl.where(magnitude == 0, 0, bits) | tl.where(code < 0, 0x80, 0)


@triton.jit
def e4m3_words(words):
    """int32 words of four packed bytes to words of four float8_e4m3fn: of the low nibbles, and of the high ones."""
    if INTERPRETED:
        low = tl.zeros_like(words)
        high = tl.zeros_like(words)
        for place in tl.static_range(4):
            low = low | (_e4m3_bits(((words >> (8 * place)) & 15) - 8) << (8 * place))
            high = high | (_e4m3_bits(((words >> (8 * place + 4)) & 15) - 8) << (8 * place))
        return low, high
    else:
        # prmt looks four nibbles up in eight bytes; a nibble of 8 or more gets the sign of the byte instead, and as
        # no byte of the two tables has one, that is zero. Table of codes -8..-1 without sign, table of codes 0..7.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 flipped, upper, negative, positive, first, second;
            xor.b32 flipped, $2, 0x88888888;
            prmt.b32 negative, 0x4A4C4E50, 0x38404448, $2;
            prmt.b32 positive, 0x44403800, 0x4E4C4A48, flipped;
            or.b32 first, negative, positive;
            shr.u32 upper, $2, 16;
            prmt.b32 negative, 0x4A4C4E50, 0x38404448, upper;
            shr.u32 upper, flipped, 16;
            prmt.b32 positive, 0x44403800, 0x4E4C4A48, upper;
            or.b32 second, negative, positive;
            shl.b32 upper, flipped, 4;
            and.b32 negative, upper, 0x80808080;
            and.b32 positive, flipped, 0x80808080;
            prmt.b32 upper, first, second, 0x6420;
            prmt.b32 first, first, second, 0x7531;
            or.b32 $0, upper, negative;
            or.b32 $1, first, positive;
            }""",
            "=r,=r,r",
            [words],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )


@triton.jit
def int8_words(words):
    """int32 words of four packed bytes to words of four int8 codes: of the low nibbles, and of the high ones."""
    # from 8..23 in a byte no borrow leaves it: ((nibble | 0x80) - 8) ^ 0x80
    low = (((words & 0x0F0F0F0F) | -2139062144) - 0x08080808) ^ -2139062144
    high = ((((words >> 4) & 0x0F0F0F0F) | -2139062144) - 0x08080808) ^ -2139062144
    return low, high
