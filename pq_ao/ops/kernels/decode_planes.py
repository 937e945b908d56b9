"""Packed codes as the tensor core's operands, without an exchange between threads.

Within a tile, bytes and words may stand in any order that queries and results share. In these orders what a thread
holds of a key or value lies together in memory, so that codes go from memory to operands in vectors. Codes of values
are masked into the low bits of fp16 numbers and left there: as subnormals they are whole multiples of 2^-24, exactly.

Shape suffixes: S slots of a tile, K bytes and N words of a head, R rows (query x query head), D head dim.
"""

import triton
import triton.language as tl

from pq_ao.ops.kernels.interpret import INTERPRETED

# fp16's smallest number: what a code counts as an operand
SMALLEST = tl.constexpr(2.0**-24)


@triton.constexpr_function
def code_offset(bits):
    """Operands hold code + offset."""
    return 8.0 if bits == 4 else 128.0


@triton.constexpr_function
def code_unit(plane, bits):
    """What a code of a plane counts, in `SMALLEST`: high nibbles stay where they are."""
    return 16.0 if bits == 4 and plane % 2 == 1 else 1.0


@triton.constexpr_function
def _masked(byte, mask):
    """Byte `byte` of two words side by side, masked."""
    pair = ("0x5410", "0x6521", "0x7632", "0x7733")[byte]
    return f"{{ .reg .b32 t; prmt.b32 t, $1, $2, {pair}; {mask}; }}"


@triton.jit
def small_plane(words, PLANE: tl.constexpr, BITS: tl.constexpr):
    """(code + offset) * unit * SMALLEST of one plane: the codes' own bits.

    The tensor core takes subnormals at full speed, and an offset of 8 rounds off less of a sum than one of 1024.

    Args:
        words: int32, 8 or 4 codes each, planes as in `widen`.
    """
    if INTERPRETED:
        if BITS == 4:
            whole = ((words >> (4 * PLANE)) & 15) * (16 if PLANE % 2 == 1 else 1)
        else:
            whole = ((words >> (8 * PLANE)) & 255) ^ 128
        small = whole.to(tl.int16).to(tl.float16, bitcast=True)
    elif BITS == 8:
        # two's complement becomes offset binary by flipping the top bit
        small = tl.inline_asm_elementwise(
            _masked(PLANE, "lop3.b32 $0, t, 0x00FF00FF, 0x00800080, 0x6A"),
            "=r,r,r", [words], dtype=tl.float16, is_pure=True, pack=2)  # fmt: skip
    elif PLANE % 2 == 1:
        small = tl.inline_asm_elementwise(
            _masked(PLANE // 2, "and.b32 $0, t, 0x00F000F0"),
            "=r,r,r", [words], dtype=tl.float16, is_pure=True, pack=2)  # fmt: skip
    else:
        small = tl.inline_asm_elementwise(
            _masked(PLANE // 2, "and.b32 $0, t, 0x000F000F"),
            "=r,r,r", [words], dtype=tl.float16, is_pure=True, pack=2)  # fmt: skip
    return small


@triton.jit
def key_operand(key, TILE: tl.constexpr, BYTES: tl.constexpr):
    """Bytes [S, K] as memory has them, as an operand; `key_dims` tells their order. A thread's lie together."""
    key = tl.reshape(key, [TILE, BYTES // 64, 4, 4, 4])  # slot, part, lane, register, byte
    return tl.reshape(tl.permute(key, (0, 1, 3, 2, 4)), [TILE, BYTES])


@triton.jit
def key_dims(BYTES: tl.constexpr):
    """Where in memory the bytes of `key_operand` stand, and so the head dims of the low nibbles: [K]."""
    byte = tl.arange(0, BYTES)
    return byte // 64 * 64 + byte // 4 % 4 * 16 + byte // 16 % 4 * 4 + byte % 4


@triton.jit
def value_cells(TILE: tl.constexpr, WORDS: tl.constexpr):
    """Slot and word of a tile of values, [pieces of 8 words, 8].

    In this order a warp copies 512 bytes that lie together, and reads each bank once.
    """
    PIECES: tl.constexpr = WORDS // 8
    row = tl.arange(0, TILE * PIECES)[:, None]
    step = row // (8 * PIECES)
    odd = row // (4 * PIECES) % 2
    piece = row // 4 % PIECES
    return step * 8 + row % 4 * 2 + odd, piece * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def value_operand(words, TILE: tl.constexpr, WORDS: tl.constexpr):
    """Words loaded from `value_cells` as an operand [N, S]; `in_order_of_dims` undoes their order."""
    words = tl.reshape(words, [TILE // 8, 2, WORDS // 16, 2, 4, 4, 2])  # step, odd, part, piece, lane, quarter, word
    return tl.reshape(tl.permute(words, (2, 6, 3, 5, 0, 4, 1)), [WORDS, TILE])


@triton.jit
def in_order_of_dims(planes, BITS: tl.constexpr, WORDS: tl.constexpr):
    """Planes of results [N, R] to [R, D]."""
    R: tl.constexpr = planes[0].shape[1]
    even = tl.join(planes[0], planes[2])
    odd = tl.join(planes[1], planes[3])
    if BITS == 4:
        even = tl.permute(tl.join(even, tl.join(planes[4], planes[6])), (0, 1, 3, 2))
        odd = tl.permute(tl.join(odd, tl.join(planes[5], planes[7])), (0, 1, 3, 2))
        together = tl.permute(tl.join(even, odd), (2, 3, 4, 0, 1))
    else:
        together = tl.permute(tl.join(even, odd), (2, 3, 0, 1))
    HALVES: tl.constexpr = 2 if BITS == 4 else 1
    together = tl.reshape(together, [4, HALVES, WORDS // 16, 2, 8, R])
    return tl.trans(tl.reshape(tl.permute(together, (1, 2, 4, 3, 0, 5)), [HALVES * 4 * WORDS, R]))
