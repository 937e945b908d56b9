"""Quantize-dequantize in float32, with gradients: what integers are checked against, and trained by."""

import torch
from torch import Tensor

from pq_ao.ops.quantize import code_range, nearest_codes


class _RoundStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, codes: str) -> Tensor:
        return nearest_codes(x, codes)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def fake_quantize(x: Tensor, scale: Tensor, bits: int, codes: str = "even") -> Tensor:
    """scale * clamp(round(x / scale)), bit for bit what `quantize` and `dequantize` give.

    Rounding passes gradients straight through, and clamping stops them: x has a gradient inside the range of codes;
    that of the scale is code - x / scale inside and the code outside, LSQ's without its factor.

    Args:
        x: floating point.
        scale: float32, broadcasts.
        bits: 4 or 8.
        codes: see `quantize`.

    Returns:
        float32.
    """
    low, high = code_range(bits, codes)
    return torch.clamp(_RoundStraightThrough.apply(x.float() / scale, codes), low, high) * scale
