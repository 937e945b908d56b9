"""Quantize-dequantize in float32, with gradients: what integers are checked against, and trained by."""

import torch
from torch import Tensor

from pq_ao.ops.quantize import OUTER_CODES, code_range, nearest_codes


class _RoundStraightThrough(torch.autograd.Function):
    """Nearest codes, clamped; gradients pass as far as halfway to the code that would follow the last one."""

    @staticmethod
    def forward(ctx, x: Tensor, bits: int, codes: str) -> Tensor:
        low, high = code_range(bits, codes)
        nearest = nearest_codes(x, codes)
        if codes == "even":
            ctx.save_for_backward((nearest >= low) & (nearest <= high))
            return torch.clamp(nearest, low, high)
        tail = (OUTER_CODES[codes][-1] - OUTER_CODES[codes][-2]) / 2
        ctx.save_for_backward((x > low - tail) & (x < high + tail))
        return nearest

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None


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
    return _RoundStraightThrough.apply(x.float() / scale, bits, codes) * scale
