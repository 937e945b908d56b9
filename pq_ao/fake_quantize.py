"""Quantize-dequantize in float32, with gradients: what integers are checked against, and trained by."""

import torch
from torch import Tensor

from pq_ao.ops.quantize import code_range, e2m1_steps


class _RoundStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, e2m1: bool) -> Tensor:
        if not e2m1:
            return torch.round(x)
        steps = e2m1_steps(x)
        return torch.round(x / steps) * steps

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def fake_quantize(x: Tensor, scale: Tensor, bits: int, e2m1: bool = False) -> Tensor:
    """scale * clamp(round(x / scale)), bit for bit what `quantize` and `dequantize` give.

    Rounding passes gradients straight through, and clamping stops them: x has a gradient inside the range of codes;
    that of the scale is code - x / scale inside and the code outside, LSQ's without its factor.

    Args:
        x: floating point.
        scale: float32, broadcasts.
        bits: 4 or 8.
        e2m1: to the codes of e2m1, see `quantize`.

    Returns:
        float32.
    """
    low, high = code_range(bits, e2m1)
    # beyond the range of e2m1 lie the steps of its last codes, whose rounding clamps as the code itself does
    return torch.clamp(_RoundStraightThrough.apply(x.float() / scale, e2m1), low, high) * scale
