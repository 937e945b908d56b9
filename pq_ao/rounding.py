"""Weight codes: nearest rounding, each output channel's scale searched for the least output error."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pq_ao.ops.quantize import absmax_scale, dequantize, quantize

# factors on the absmax scale: a plain grid, further down than method section 4.2's, refined around the best
_COARSE = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
_FINE = (-0.05, -0.025, 0.025, 0.05)

# weight scales may be far smaller than those of activations: small models have rows of 1e-3
_MIN_WEIGHT_SCALE = 1e-8


@dataclass
class LayerInputs:
    """What rounding needs of a linear's inputs x (shift taken off) and of their quantized form z, over all tokens.

    Attributes:
        gram: float32 [K, K], sum of z^T z.
        cross: float32 [K, K], sum of z^T x.
        mean: float32 [K], mean of the inputs before the shift was taken off, which is the shift; None without one.
        quantized_mean: float32 [K], mean of z.
    """

    gram: Tensor
    cross: Tensor
    mean: Tensor | None
    quantized_mean: Tensor


def round_nearest(weight: Tensor, bits: int, inputs: LayerInputs) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight, each row's scale chosen on a plain grid of factors.

    The loss of row w is the squared error of its output over the calibration tokens, with the inputs as they will be
    quantized: sum (x w - z v)^2 = const - 2 v C w + v G v, where v is the rounded row and G, C are gram and cross.

    Args:
        weight: float32 [N, K].
        bits: 4 or 8.
        inputs: see `LayerInputs`.

    Returns:
        int8 codes [N, K] and float32 scales [N].
    """
    start = absmax_scale(weight.abs().amax(dim=1), bits, floor=_MIN_WEIGHT_SCALE)
    target = weight @ inputs.cross.T  # [N, K], row by row C w

    def loss(factor: Tensor) -> Tensor:
        scale = (start * factor)[:, None]
        rounded = dequantize(quantize(weight, scale, bits), scale)
        return (rounded * (rounded @ inputs.gram - 2 * target)).sum(dim=1)

    best = torch.ones_like(start)
    lowest = loss(best)
    for steps, refine in ((_COARSE[1:], False), (_FINE, True)):
        centre = best if refine else torch.zeros_like(best)
        for step in steps:
            factor = centre + step
            candidate = loss(factor)
            better = candidate < lowest
            lowest = torch.where(better, candidate, lowest)
            best = torch.where(better, factor, best)
    scale = start * best
    return quantize(weight, scale[:, None], bits), scale


def corrected_bias(weight: Tensor, bias: Tensor | None, codes: Tensor, scale: Tensor, inputs: LayerInputs) -> Tensor:
    """float32 [N] bias with which the quantized linear has the mean output of the floating-point one.

    It holds what the inputs' shift contributes, and takes off the mean error of rounding.
    """
    mean_output = weight @ inputs.mean - (codes.float() @ inputs.quantized_mean) * scale
    return mean_output if bias is None else mean_output + bias.float()
