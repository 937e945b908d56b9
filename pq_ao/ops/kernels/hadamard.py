"""Pieces of the kernels that rotate: Hadamard matrices made in registers, and float32 products on bf16 tensor cores.

A float32 tensor goes through the tensor cores as a sum of bf16 parts, two of which keep 16 bits of each element (an
error of -100 dB); +1 and -1 are exact in bf16, so a Hadamard matrix is one part. Accumulation is in float32.
"""

import triton
import triton.language as tl

from pq_ao.ops.kernels.interpret import INTERPRETED


@triton.constexpr_function
def _log2(n):
    return n.bit_length() - 1


@triton.jit
def walsh_sign(i, j):
    """Entry (i, j) of Sylvester's Walsh matrix, float32: -1 where i & j has an odd number of ones. For i, j < 65536."""
    ones = i & j
    ones = ones ^ (ones >> 8)
    ones = ones ^ (ones >> 4)
    return 1.0 - 2.0 * ((0x6996 >> (ones & 15)) & 1).to(tl.float32)  # bit n: whether n has an odd number


@triton.jit
def small_walsh(i, j):
    """`walsh_sign` as bf16 for i, j < 64, in few instructions."""
    ones = i & j
    ones = ones ^ (ones >> 4)
    return (((0x6996 >> (ones & 15)) & 1) * 0x8000 + 0x3F80).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def hadamard_entry(base_ptr, i, j, mask, BASE: tl.constexpr, WALSH: tl.constexpr):
    """Entry (i, j) of base (x) Walsh(WALSH), float32; 0 outside the mask. base: [BASE, BASE], not read if BASE is 1."""
    entry = tl.where(mask, 1.0, 0.0)
    if WALSH > 1:
        entry = entry * walsh_sign(i % WALSH, j % WALSH)
    if BASE > 1:
        entry = entry * tl.load(base_ptr + (i // WALSH) * BASE + j // WALSH, mask=mask, other=0.0)
    return entry


@triton.jit
def bf16_parts(x):
    """float32 as (high, low) of bf16, x = high + low but for the last 8 bits."""
    # cut off, not rounded: a conversion that cannot be done in pairs is as slow as a division
    bits = x.to(tl.uint32, bitcast=True)
    high = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return high, (x - (bits & 0xFFFF0000).to(tl.float32, bitcast=True)).to(tl.bfloat16)


@triton.jit
def dot_bf16(a, b, acc):
    """a @ b + acc; the interpreter multiplies bf16 wrongly, so it gets the same numbers in float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def times_matrix(x, matrix_high, matrix_low, FLAT: tl.constexpr):
    """x @ matrix in float32; `matrix_low` counts only where the matrix is not FLAT, that is, not all +1 and -1."""
    high, low = bf16_parts(x)
    acc = tl.zeros((x.shape[0], matrix_high.shape[1]), tl.float32)
    acc = dot_bf16(low, matrix_high, acc)
    if not FLAT:
        acc = dot_bf16(high, matrix_low, acc)
    return dot_bf16(high, matrix_high, acc)


@triton.jit
def matrix_times(matrix_high, matrix_low, x, acc, FLAT: tl.constexpr):
    """matrix @ x + acc in float32, as `times_matrix`."""
    high, low = bf16_parts(x)
    acc = dot_bf16(matrix_high, low, acc)
    if not FLAT:
        acc = dot_bf16(matrix_low, high, acc)
    return dot_bf16(matrix_high, high, acc)


@triton.jit
def _butterfly(h, STEP: tl.constexpr, SIZE: tl.constexpr):
    done = ()
    for i in tl.static_range(SIZE):
        if i & STEP:
            done = done + (h[i - STEP] - h[i],)
        else:
            done = done + (h[i] + h[i + STEP],)
    return done


@triton.jit
def _half_butterfly(h, odd, STEP: tl.constexpr):
    sign = 1.0 - 2.0 * odd.to(tl.float32)
    done = ()
    for i in tl.static_range(STEP):
        done = done + (h[i] + sign * h[i + STEP],)
    return done


@triton.jit
def butterflies(h, first, T: tl.constexpr, SPLIT: tl.constexpr):
    """Walsh transform along a tuple of T tensors; of the outputs only the T / SPLIT with `first` as their top bits."""
    for stage in tl.static_range(_log2(SPLIT)):
        h = _half_butterfly(h, (first // (SPLIT >> (stage + 1))) % 2, T >> (stage + 1))
    for stage in tl.static_range(_log2(T // SPLIT)):
        h = _butterfly(h, 1 << stage, T // SPLIT)
    return h


@triton.jit
def _join_halves(h, STEP: tl.constexpr):
    done = ()
    for i in tl.static_range(STEP):
        done = done + (tl.join(h[i], h[i + STEP]),)
    return done


@triton.jit
def join(h, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT tensors [A, B] of a tuple to one [A, B, COUNT]."""
    joined = ()
    for i in tl.static_range(COUNT):
        joined = joined + (h[FIRST + i],)
    for stage in tl.static_range(_log2(COUNT)):
        joined = _join_halves(joined, COUNT >> (stage + 1))
    return tl.reshape(joined[0], (h[0].shape[0], h[0].shape[1], COUNT))


@triton.jit
def join_rows(h, FIRST: tl.constexpr, COUNT: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """COUNT tensors [A, B] of a tuple to one [A * COUNT, B]."""
    return tl.reshape(tl.permute(join(h, FIRST, COUNT), (0, 2, 1)), (A * COUNT, B))


@triton.jit
def stack(h, COUNT: tl.constexpr):
    """COUNT tensors [A, B, C, D] of a tuple to one [A, B, C, D, COUNT]."""
    x = h[0]
    for stage in tl.static_range(_log2(COUNT)):
        h = _join_halves(h, COUNT >> (stage + 1))
    return tl.reshape(h[0], (x.shape[0], x.shape[1], x.shape[2], x.shape[3], COUNT))


@triton.jit
def _split_each(h, COUNT: tl.constexpr, LAST: tl.constexpr):
    even, odd = (), ()
    for i in tl.static_range(COUNT):
        x = h[i]
        pair = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2], x.shape[3], LAST // 2, 2)))
        even = even + (pair[0],)
        odd = odd + (pair[1],)
    return even + odd


@triton.jit
def unstack(x, COUNT: tl.constexpr):
    """The inverse of `stack`."""
    h = (x,)
    for stage in tl.static_range(_log2(COUNT)):
        h = _split_each(h, 1 << stage, COUNT >> stage)
    done = ()
    for i in tl.static_range(COUNT):
        done = done + (tl.reshape(h[i], (x.shape[0], x.shape[1], x.shape[2], x.shape[3])),)
    return done
