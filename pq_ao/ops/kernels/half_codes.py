"""Codes of 4 bits from words of two float16, see `halves`: even ones, and those called "spread"."""

import torch
import triton
import triton.language as tl

from pq_ao.ops.kernels.halves import halves
from pq_ao.ops.kernels.interpret import INTERPRETED, LARGEST_SPREAD, nearest_code
from pq_ao.ops.quantize import OUTER_CODES


def _words(dtype: torch.dtype) -> list[int]:
    """The codes called "spread", four a word, the lowest first in the first one."""
    even, *outer = OUTER_CODES["spread"]
    upper = (*range(even + 1), *outer)
    codes = torch.tensor([*(-1 - code for code in reversed(upper)), *upper]).to(dtype)
    return codes.view(torch.uint8).view(torch.int32).tolist()


_INT8_0, _INT8_4, _INT8_8, _INT8_12 = (tl.constexpr(word) for word in _words(torch.int8))
_FLOAT8_0, _FLOAT8_4, _FLOAT8_8, _FLOAT8_12 = (tl.constexpr(word) for word in _words(torch.float8_e4m3fn))


@triton.jit
def _look_up(first, second, codes_0, codes_4, codes_8, codes_12):
    """Codes of places, which are made half bytes of a selector; it looks below the ninth and from there on."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 w, s, a, b, m, z; mov.b32 z, 0; prmt.b32 w, $1, $2, 0x6420;"
        " shr.u32 s, w, 4; or.b32 s, s, w; prmt.b32 s, s, z, 0x4420; and.b32 s, s, 0x7777;"
        " prmt.b32 a, $3, $4, s; prmt.b32 b, $5, $6, s;"
        " shl.b32 m, w, 4; prmt.b32 m, m, z, 0xBA98; lop3.b32 $0, b, a, m, 0xE4; }",
        "=r,r,r,r,r,r,r", [first, second, codes_0, codes_4, codes_8, codes_12], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def half_codes(y, offsets, dtype: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """What `four_codes` takes, of words y; y + offsets is 0 to 1 from LOW to HIGH, and saturates there.

    Even codes as bytes: int8 in bytes 0 and 2, float8 in 0 and 1. Others by their place in their order, in bytes 0
    and 2. (The interpreter has all codes in bytes 0 and 1.)
    """
    if INTERPRETED:
        a, b = halves(y)
        c, d = halves(offsets)
        a = _code(a.to(tl.float32) + c.to(tl.float32), dtype, LOW, HIGH)
        b = _code(b.to(tl.float32) + d.to(tl.float32), dtype, LOW, HIGH)
        return a | (b << 8)
    if HIGH == LARGEST_SPREAD:
        # Places are piecewise linear in codes: of slope 1/3 to the second one, 1/2 to the third, then 1, and so back.
        # By t = y + offsets these pieces are 7t, 10.5t - 0.5, 21t - 3, 10.5t + 5 and 7t + 8. Adding 1024 rounds.
        x = tl.inline_asm_elementwise(
            "{ .reg .b32 t, p, q, m, n; add.rn.sat.f16x2 t, $1, $2;"
            " mov.b32 m, 0x47004700; mul.rn.f16x2 p, t, m;"
            " mov.b32 n, 0x48004800; fma.rn.f16x2 q, t, m, n;"
            " mov.b32 m, 0x4D404D40; mov.b32 n, 0xC200C200; fma.rn.f16x2 m, t, m, n; max.f16x2 p, p, m;"
            " mov.b32 m, 0x49404940; mov.b32 n, 0xB800B800; fma.rn.f16x2 n, t, m, n; max.f16x2 p, p, n;"
            " mov.b32 n, 0x45004500; fma.rn.f16x2 n, t, m, n; min.f16x2 p, p, n; min.f16x2 p, p, q;"
            " mov.b32 n, 0x64006400; add.rn.f16x2 $0, p, n; }",
            "=r,r,r", [y, offsets], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    elif dtype == tl.int8:  # 1272 = 1024 + 256 - 8: from 1024 on the last bits are the integer
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
def _code(part, dtype: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The interpreter's: one code in the low byte of an int32."""
    part = tl.minimum(tl.maximum(part, 0.0), 1.0).to(tl.float16).to(tl.float32)
    code = nearest_code(part * (HIGH - LOW) + LOW, LOW, HIGH)
    if dtype == tl.int8:
        return code.to(tl.int32) & 0xFF
    return code.to(dtype).to(tl.uint8, bitcast=True).to(tl.int32)


@triton.jit
def four_codes(first, second, dtype: tl.constexpr, HIGH: tl.constexpr):
    """Two results of `half_codes` as a word of four codes."""
    if INTERPRETED:
        return (first & 0xFFFF) | (second << 16)
    if HIGH == LARGEST_SPREAD:
        if dtype == tl.int8:
            return _look_up(first, second, _INT8_0, _INT8_4, _INT8_8, _INT8_12)
        return _look_up(first, second, _FLOAT8_0, _FLOAT8_4, _FLOAT8_8, _FLOAT8_12)
    if dtype == tl.int8:
        x = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x6420;", "=r,r,r", [first, second], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        x = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [first, second], dtype=tl.int32, is_pure=True, pack=1
        )
    return x
