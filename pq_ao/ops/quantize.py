"""Symmetric quantizers in plain PyTorch, so that Inductor fuses them with their neighbours."""

from itertools import pairwise

import torch
from torch import Tensor

# the paper's code clamps every scale to this range
MIN_SCALE, MAX_SCALE = 1e-4, 1e4

# A row's largest value, -7.5 scales, would sit on the edge between two codes, and the last bit of its computation
# choose between them. A scale smaller by this factor keeps it clear: it becomes -8, as half-to-even means it to.
_OFF_THE_EDGE = 1 - 2**-12


# Codes of 4 bits whose steps grow away from zero: even steps up to the first number, then these; below zero their
# mirror images about -1/2, so that all 16 count. "spread" is near what suits a normal distribution best (S. P. Lloyd,
# IEEE Trans. Inf. Theory 28, 1982), "wide" suits one with longer tails. None is beyond 15: so sums of 128 products with
# 4-bit weights stay below 2^14, and those of float8 are exact.
OUTER_CODES: dict[str, tuple[int, ...]] = {"spread": (5, 7, 10), "wide": (3, 5, 7, 10, 14)}
CODE_SETS = ("even", *OUTER_CODES)


def code_range(bits: int, codes: str = "even") -> tuple[int, int]:
    """Smallest and largest code: -8, 7 for 4 bits; -128, 127 for 8 bits; of other `CODE_SETS` their own.

    Raises:
        ValueError: no such codes.
    """
    if codes == "even":
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if codes not in OUTER_CODES or bits != 4:
        raise ValueError(f"codes={codes!r} with bits={bits}; 4 bits take one of {CODE_SETS}, others 'even'.")
    return -1 - OUTER_CODES[codes][-1], OUTER_CODES[codes][-1]


def code_values(bits: int, codes: str = "even") -> list[int]:
    """All codes in ascending order; raises as `code_range` does."""
    low, high = code_range(bits, codes)
    if codes == "even":
        return list(range(low, high + 1))
    even, *outer = OUTER_CODES[codes]
    upper = [*range(even + 1), *outer]
    return [-1 - code for code in reversed(upper)] + upper


def centre(codes: str) -> float:
    """Their middle, in codes, where the mean of what is quantized belongs; even ones keep it at 0, a code."""
    return 0.0 if codes == "even" else -0.5


# adding and taking off 1.5 * 2^23 leaves a float32 rounded to an integer, half to even
ROUNDER = 12582912.0


def nearest_codes(x: Tensor, codes: str = "even") -> Tensor:
    """The nearest codes to float32 quotients, as whole floats; even ones are not clamped.

    Others are found by their distance from -1/2, in few operations: with one token each of them is felt.
    """
    if codes == "even":
        return torch.round(x)
    even, *outer = OUTER_CODES[codes]
    mirrored = x + 0.5
    size = mirrored.abs() - 0.5
    upper = torch.clamp_max((size + ROUNDER) - ROUNDER, even)
    for low, high in pairwise((even, *outer)):
        upper = torch.where(size > (low + high) / 2, float(high), upper)
    return torch.where(mirrored < 0, -1 - upper, upper)


def absmax_scale(absmax: Tensor, bits: int, floor: float = MIN_SCALE) -> Tensor:
    """Initial scale 2 absmax / (2^bits - 1), clamped to [floor, 1e4]."""
    return (absmax * (2 / (2**bits - 1))).clamp(floor, MAX_SCALE)


def quantize(x: Tensor, scale: Tensor, bits: int, dtype: torch.dtype = torch.int8, codes: str = "even") -> Tensor:
    """Codes clamp(round(x / scale)); division and half-to-even rounding in float32. `scale` broadcasts.

    `dtype` is int8, or float8_e4m3fn, which holds the codes of 4 bits exactly. `codes`: which set of `CODE_SETS`.
    """
    low, high = code_range(bits, codes)
    nearest = nearest_codes(x.float() / scale, codes)
    return (torch.clamp(nearest, low, high) if codes == "even" else nearest).to(dtype)


def row_scale(x: Tensor, clip: Tensor, bits: int) -> Tensor:
    """float32 [..., 1], one scale for each row of the last axis: 2 clip absmax / (2^bits - 1).

    Its factors are multiplied in this order, here and in kernels: absmax, that off the edge, clip, 2 / (2^bits - 1).

    Args:
        clip: float32, broadcasts against [..., 1]: 1 for the whole range, less to clamp the largest values.
    """
    absmax = x.float().abs().amax(dim=-1, keepdim=True)
    return absmax_scale(absmax * _OFF_THE_EDGE * clip, bits)


def quantize_per_row(x: Tensor, clip: Tensor, bits: int, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Dynamic quantizer: codes like `x`, see `quantize`, and the float32 scales of `row_scale`."""
    scale = row_scale(x, clip, bits)
    return quantize(x, scale, bits, dtype), scale


def check_clip(op: str, name: str, clip: Tensor, shape: tuple[int, ...]) -> None:
    """Raises unless `clip` is contiguous float32 of `shape` and above 0; a GPU's values are not waited for."""
    if clip.dtype != torch.float32 or clip.shape != shape or not clip.is_contiguous():
        raise ValueError(
            f"{op}: {name} is {clip.dtype} {list(clip.shape)}; contiguous float32 {list(shape)} is required."
        )
    if clip.device.type == "cpu" and (clip <= 0).any():
        raise ValueError(f"{op}: {name} is {clip.tolist()}; factors above 0 are required, 1 clips nothing.")


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """codes * scale in float32."""
    return codes.float() * scale
