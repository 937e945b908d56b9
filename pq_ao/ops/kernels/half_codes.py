"""Codes of 4 bits from words of two float16, see `halves`: even ones, and those called "spread".

Words come in parts of the codes' range, from an origin: the lowest of even codes, the middle of spread ones.
"""

import torch
import triton
import triton.language as tl

from pq_ao.ops.kernels.codes import LARGEST_SPREAD, nearest_code
from pq_ao.ops.kernels.halves import halves
from pq_ao.ops.kernels.interpret import INTERPRETED
from pq_ao.ops.quantize import OUTER_CODES


def _words(dtype: torch.dtype, sign: int) -> list[int]:
    """The eight spread codes above the middle, or those below it, nearest first, four a word."""
    even, *outer = OUTER_CODES["spread"]
    codes = [*range(even + 1), *outer]
    codes = torch.tensor(codes if sign > 0 else [-1 - code for code in codes]).to(dtype)
    return codes.view(torch.uint8).view(torch.int32).tolist()


_INT8_NEAR, _INT8_FAR = (tl.constexpr(word) for word in _words(torch.int8, 1))
_FLOAT8_NEAR, _FLOAT8_FAR = (tl.constexpr(word) for word in _words(torch.float8_e4m3fn, 1))
_FLOAT8_NEAR_BELOW, _FLOAT8_FAR_BELOW = (tl.constexpr(word) for word in _words(torch.float8_e4m3fn, -1))


@triton.jit
def origin(LOW: tl.constexpr, HIGH: tl.constexpr):
    """How far the origin of words lies below code 0, in codes."""
    return 0.5 if HIGH == LARGEST_SPREAD else -LOW


@triton.jit
def half_codes(y, offsets, dtype: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """What `four_codes` takes, of words y + offsets.

    Even codes: them, as bytes; int8 in bytes 0 and 2, float8 in 0 and 1. Spread ones: how manieth each is from the
    middle, in the last three bits of bytes 0 and 2; and y + offsets, for its signs. (The interpreter: all codes in
    bytes 0 and 1.)
    """
    if INTERPRETED:
        a, b = halves(y)
        c, d = halves(offsets)
        a = _code(a.to(tl.float32) + c.to(tl.float32), dtype, LOW, HIGH)
        b = _code(b.to(tl.float32) + d.to(tl.float32), dtype, LOW, HIGH)
        x = a | (b << 8)
        return x, x
    if HIGH == LARGEST_SPREAD:
        # That number is linear in the distance a from the middle, of slope 1 to the sixth code, 1/2 to the seventh,
        # 1/3 to the last: 21a - 0.5, 10.5a + 2.25, 7a + 3.5. Adding 1032 rounds.
        x, y = tl.inline_asm_elementwise(
            "{ .reg .b32 a, p, q, m, n; add.rn.f16x2 $1, $2, $3; and.b32 a, $1, 0x7FFF7FFF;"
            " mov.b32 m, 0x4D404D40; mov.b32 n, 0xB800B800; fma.rn.f16x2 p, a, m, n;"
            " mov.b32 m, 0x49404940; mov.b32 n, 0x40804080; fma.rn.f16x2 q, a, m, n; min.f16x2 p, p, q;"
            " mov.b32 m, 0x47004700; mov.b32 n, 0x43004300; fma.rn.f16x2 q, a, m, n; min.f16x2 p, p, q;"
            " min.f16x2 p, p, m; mov.b32 n, 0x64086408; add.rn.f16x2 $0, p, n; }",
            "=&r,=&r,r,r", [y, offsets], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        return x, y
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
    return x, x


@triton.jit
def _code(part, dtype: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The interpreter's: one code in the low byte of an int32."""
    part = tl.minimum(tl.maximum(part, -1.0), 1.0).to(tl.float16).to(tl.float32)
    code = nearest_code(part * (HIGH - LOW) - origin(LOW, HIGH), LOW, HIGH)
    if dtype == tl.int8:
        return code.to(tl.int32) & 0xFF
    return code.to(dtype).to(tl.uint8, bitcast=True).to(tl.int32)


@triton.jit
def _look_up(first, second, near, far):
    """Bytes of two words of codes, by the last three bits of bytes 0 and 2 of others, which are made a selector."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 w, s, z; mov.b32 z, 0; prmt.b32 w, $1, $2, 0x6420; shr.u32 s, w, 4; or.b32 s, s, w;"
        " prmt.b32 s, s, z, 0x4420; and.b32 s, s, 0x7777; prmt.b32 $0, $3, $4, s; }",
        "=r,r,r,r,r", [first, second, near, far], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def four_codes(first, second, first_signs, second_signs, dtype: tl.constexpr, HIGH: tl.constexpr):
    """Two results of `half_codes` as a word of four codes."""
    if INTERPRETED:
        return (first & 0xFFFF) | (second << 16)
    if HIGH == LARGEST_SPREAD:
        below = tl.inline_asm_elementwise(  # of each sign all bits of a byte
            "prmt.b32 $0, $1, $2, 0xFDB9;", "=r,r,r", [first_signs, second_signs], dtype=tl.int32, is_pure=True, pack=1
        )
        if dtype == tl.int8:  # -1 - code has all its bits turned
            return _look_up(first, second, _INT8_NEAR, _INT8_FAR) ^ below
        codes = _look_up(first, second, _FLOAT8_NEAR, _FLOAT8_FAR)
        return codes ^ ((codes ^ _look_up(first, second, _FLOAT8_NEAR_BELOW, _FLOAT8_FAR_BELOW)) & below)
    if dtype == tl.int8:
        x = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x6420;", "=r,r,r", [first, second], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        x = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [first, second], dtype=tl.int32, is_pure=True, pack=1
        )
    return x
