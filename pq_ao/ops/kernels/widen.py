"""From packed codes to fp16 matrix operands: one plane of codes at a time, picked out of 32-bit words.

A word holds 8 INT4 or 4 INT8 codes of one token. A plane is the same place in every word: plane 2j is the low nibble of
byte j, plane 2j + 1 the high one; of INT8 codes, plane j is byte j. `plane_column` says which head dims a plane holds.
Operands want two neighbours in one register, so a single byte permute brings byte j of two words together, and one
mask puts the exponent of 1024 on top of both: the mantissa of an fp16 between 1024 and 2048 counts in ones.
"""

import triton
import triton.language as tl

from pq_ao.ops.kernels.interpret import INTERPRETED


@triton.constexpr_function
def operand_type(stored, bits):
    """dtype of matrix operands: fp16 holds every code exactly, floats stay as they are stored."""
    if bits < 16:
        return tl.float16
    # the interpreter multiplies the bits of bfloat16
    return tl.float32 if INTERPRETED.value and stored == tl.bfloat16 else stored


@triton.constexpr_function
def plane_gain(plane, planes, bits):
    """`raw_plane` is (code + offset) / gain: fold the gain into the other operand ..."""
    return 0.0625 if bits == 4 and planes == 8 and plane % 2 == 1 else 1.0


@triton.constexpr_function
def plane_offset(plane, planes, bits):
    """... and take the offset, in codes, off the sum."""
    if planes < 4:
        return 0.0
    return 1152.0 if bits == 8 else 72.0 if plane % 2 == 1 else 1032.0


@triton.jit
def plane_column(word, plane, PLANES: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr):
    """The head dim that stands at `word` in a plane: low nibbles are the first half of a head, high ones the second."""
    if BITS == 4:
        column = word * (PLANES // 2) + plane // 2 + (plane % 2) * HALF
    else:
        column = word * PLANES + plane
    return column


@triton.jit
def _nibbles(words, BYTE: tl.constexpr, HIGH: tl.constexpr):
    """1024 + nibble, or 1024 + 16 * nibble of the high ones."""
    if BYTE == 0 and HIGH == 0:
        out = tl.inline_asm_elementwise(
            "{ .reg .b32 t; prmt.b32 t, $1, $2, 0x5410; lop3.b32 $0, t, 0x000F000F, 0x64006400, 0xEA; }",
            "=r,r,r", [words], dtype=tl.float16, is_pure=True, pack=2)  # fmt: skip
    elif BYTE == 0:
        out = tl.inline_asm_elementwise(
            "{ .reg .b32 t; prmt.b32 t, $1, $2, 0x5410; lop3.b32 $0, t, 0x00F000F0, 0x64006400, 0xEA; }",
            "=r,r,r", [words], dtype=tl.float16, is_pure=True, pack=2)  # fmt: skip
    elif BYTE == 1 and HIGH == 0:
        out = tl.inline_asm_elementwise(
            "{ .reg .b32 t; prmt.b32 t, $1, $2, 0x6521; lop3.b32 $0, t, 0x000F000F, 0x64006400, 0xEA; }",
            "=r,r,r", [words], dtype=tl.float16, is_pure=True, pack=2)  # fmt: skip
    elif BYTE == 1:
        out = tl.inline_asm_elementwise(
            "{ .reg .b32 t; prmt.b32 t, $1, $2, 0x6521; lop3.b32 $0, t, 0x00F000F0, 0x64006400, 0xEA; }",
            "=r,r,r", [words], dtype=tl.float16, is_pure=True, pack=2)  # fmt: skip
    elif BYTE == 2 and HIGH == 0:
        out = tl.inline_asm_elementwise(
            "{ .reg .b32 t; prmt.b32 t, $1, $2, 0x7632; lop3.b32 $0, t, 0x000F000F, 0x64006400, 0xEA; }",
            "=r,r,r", [words], dtype=tl.float16, is_pure=True, pack=2)  # fmt: skip
    elif BYTE == 2:
        out = tl.inline_asm_elementwise(
            "{ .reg .b32 t; prmt.b32 t, $1, $2, 0x7632; lop3.b32 $0, t, 0x00F000F0, 0x64006400, 0xEA; }",
            "=r,r,r", [words], dtype=tl.float16, is_pure=True, pack=2)  # fmt: skip
    elif HIGH == 0:
        out = tl.inline_asm_elementwise(
            "{ .reg .b32 t; prmt.b32 t, $1, $2, 0x7733; lop3.b32 $0, t, 0x000F000F, 0x64006400, 0xEA; }",
            "=r,r,r", [words], dtype=tl.float16, is_pure=True, pack=2)  # fmt: skip
    else:
        out = tl.inline_asm_elementwise(
            "{ .reg .b32 t; prmt.b32 t, $1, $2, 0x7733; lop3.b32 $0, t, 0x00F000F0, 0x64006400, 0xEA; }",
            "=r,r,r", [words], dtype=tl.float16, is_pure=True, pack=2)  # fmt: skip
    return out


@triton.jit
def _bytes(words, BYTE: tl.constexpr):
    """1024 + 128 + code: two's complement becomes offset binary by flipping the top bit, in the same mask step."""
    if BYTE == 0:
        out = tl.inline_asm_elementwise(
            "{ .reg .b32 t; prmt.b32 t, $1, $2, 0x5410; lop3.b32 $0, t, 0x00FF00FF, 0x64806480, 0x6A; }",
            "=r,r,r", [words], dtype=tl.float16, is_pure=True, pack=2)  # fmt: skip
    elif BYTE == 1:
        out = tl.inline_asm_elementwise(
            "{ .reg .b32 t; prmt.b32 t, $1, $2, 0x6521; lop3.b32 $0, t, 0x00FF00FF, 0x64806480, 0x6A; }",
            "=r,r,r", [words], dtype=tl.float16, is_pure=True, pack=2)  # fmt: skip
    elif BYTE == 2:
        out = tl.inline_asm_elementwise(
            "{ .reg .b32 t; prmt.b32 t, $1, $2, 0x7632; lop3.b32 $0, t, 0x00FF00FF, 0x64806480, 0x6A; }",
            "=r,r,r", [words], dtype=tl.float16, is_pure=True, pack=2)  # fmt: skip
    else:
        out = tl.inline_asm_elementwise(
            "{ .reg .b32 t; prmt.b32 t, $1, $2, 0x7733; lop3.b32 $0, t, 0x00FF00FF, 0x64806480, 0x6A; }",
            "=r,r,r", [words], dtype=tl.float16, is_pure=True, pack=2)  # fmt: skip
    return out


@triton.jit
def _centred_low(x):
    """1024 + nibble to the code, exactly."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 c; mov.b32 c, 0x64086408; sub.rn.f16x2 $0, $1, c; }",
        "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2)  # fmt: skip


@triton.jit
def _centred_high(x):
    """1024 + 16 * nibble to the code: x / 16 - 72, exactly."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 a, c; mov.b32 a, 0x2C002C00; mov.b32 c, 0xD480D480; fma.rn.f16x2 $0, $1, a, c; }",
        "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2)  # fmt: skip


@triton.jit
def _centred_byte(x):
    """1024 + 128 + code to the code, exactly."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 c; mov.b32 c, 0x64806480; sub.rn.f16x2 $0, $1, c; }",
        "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2)  # fmt: skip


@triton.jit
def _low_of_bytes(packed):
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t, c; and.b32 t, $2, 0x0F0F0F0F; mov.b32 c, 0x64086408;"
        " prmt.b32 $0, t, 0x64646464, 0x4140; prmt.b32 $1, t, 0x64646464, 0x4342;"
        " sub.rn.f16x2 $0, $0, c; sub.rn.f16x2 $1, $1, c; }",
        "=&r,=&r,r", [packed], dtype=tl.float16, is_pure=True, pack=4)  # fmt: skip


@triton.jit
def _high_of_bytes(packed):
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t, c; shr.u32 t, $2, 4; and.b32 t, t, 0x0F0F0F0F; mov.b32 c, 0x64086408;"
        " prmt.b32 $0, t, 0x64646464, 0x4140; prmt.b32 $1, t, 0x64646464, 0x4342;"
        " sub.rn.f16x2 $0, $0, c; sub.rn.f16x2 $1, $1, c; }",
        "=&r,=&r,r", [packed], dtype=tl.float16, is_pure=True, pack=4)  # fmt: skip


@triton.jit
def _whole_bytes(codes):
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t, c; xor.b32 t, $2, 0x80808080; mov.b32 c, 0x64806480;"
        " prmt.b32 $0, t, 0x64646464, 0x4140; prmt.b32 $1, t, 0x64646464, 0x4342;"
        " sub.rn.f16x2 $0, $0, c; sub.rn.f16x2 $1, $1, c; }",
        "=&r,=&r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)  # fmt: skip


@triton.jit
def plane(words, PLANE: tl.constexpr, PLANES: tl.constexpr, BITS: tl.constexpr):
    """fp16 codes of one plane, exact. `words`: int32, 8 or 4 codes each; or bytes; floats pass as they are."""
    if BITS == 16:
        codes = words
    elif PLANES < 4 and INTERPRETED:
        codes = (((words >> (4 * PLANE)) & 15).to(tl.float16) - 8) if BITS == 4 else words.to(tl.float16)
    elif PLANES == 2:
        codes = _low_of_bytes(words) if PLANE == 0 else _high_of_bytes(words)
    elif PLANES == 1:
        codes = _whole_bytes(words)
    elif INTERPRETED:
        if BITS == 4:
            codes = (((words >> (4 * PLANE)) & 15) - 8).to(tl.float16)
        else:
            codes = ((words << (24 - 8 * PLANE)) >> 24).to(tl.float16)
    elif BITS == 8:
        codes = _centred_byte(_bytes(words, PLANE))
    elif PLANE % 2 == 1:
        codes = _centred_high(_nibbles(words, PLANE // 2, 1))
    else:
        codes = _centred_low(_nibbles(words, PLANE // 2, 0))
    return codes


@triton.jit
def raw_plane(words, PLANE: tl.constexpr, PLANES: tl.constexpr, BITS: tl.constexpr):
    """(code + plane_offset) / plane_gain in fp16, exact: one instruction less for two codes than `plane`."""
    if PLANES < 4:
        raw = plane(words, PLANE, PLANES, BITS)
    elif INTERPRETED:
        codes = plane(words, PLANE, PLANES, BITS).to(tl.float32)
        raw = ((codes + plane_offset(PLANE, PLANES, BITS)) / plane_gain(PLANE, PLANES, BITS)).to(tl.float16)
    elif BITS == 8:
        raw = _bytes(words, PLANE)
    else:
        raw = _nibbles(words, PLANE // 2, PLANE % 2)
    return raw
