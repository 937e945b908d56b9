"""Symmetric quantizers in plain PyTorch, so that Inductor fuses them with their neighbours."""

import torch
from torch import Tensor

# the paper's code clamps every scale to this range
MIN_SCALE, MAX_SCALE = 1e-4, 1e4

# A row's largest value, -7.5 scales, would sit on the edge between two codes, and the last bit of its computation
# choose between them. A scale smaller by this factor keeps it clear: it becomes -8, as half-to-even means it to.
_OFF_THE_EDGE = 1 - 2**-12


# Codes of the 4-bit floating point e2m1, times two so that they are whole numbers: 0 1 2 3 4 6 8 12, with either sign.
# Even steps near zero, twice and four times as wide beyond these magnitudes.
E2M1_LARGEST, _E2M1_TWICE, _E2M1_FOUR_TIMES = 12, 4, 8


def code_range(bits: int, e2m1: bool = False) -> tuple[int, int]:
    """Smallest and largest code: -8, 7 for 4 bits; -128, 127 for 8 bits; -12, 12 for e2m1."""
    if e2m1:
        return -E2M1_LARGEST, E2M1_LARGEST
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def e2m1_steps(x: Tensor) -> Tensor:
    """Distance of the codes of e2m1 around x, which is within their range: 1, 2 or 4."""
    size = x.abs()
    return 1 + (size >= _E2M1_TWICE) + 2 * (size >= _E2M1_FOUR_TIMES)  # whole numbers, whatever torch's default dtype


def absmax_scale(absmax: Tensor, bits: int, floor: float = MIN_SCALE) -> Tensor:
    """Initial scale 2 absmax / (2^bits - 1), clamped to [floor, 1e4]."""
    return (absmax * (2 / (2**bits - 1))).clamp(floor, MAX_SCALE)


def quantize(x: Tensor, scale: Tensor, bits: int, dtype: torch.dtype = torch.int8, e2m1: bool = False) -> Tensor:
    """Codes clamp(round(x / scale)); division and half-to-even rounding in float32. `scale` broadcasts.

    `dtype` is int8, or float8_e4m3fn, which holds the codes of 4 bits exactly. With `e2m1` the nearest code of that,
    half to even in its steps.
    """
    low, high = code_range(bits, e2m1)
    codes = x.float() / scale
    if not e2m1:
        return torch.clamp(torch.round(codes), low, high).to(dtype)
    codes = torch.clamp(codes, low, high)
    steps = e2m1_steps(codes)
    return (torch.round(codes / steps) * steps).to(dtype)


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
