"""Weight codes: nearest rounding, each output channel's scale searched for the least output error."""

import torch
from torch import Tensor

from pq_ao.ops.quantize import absmax_scale, dequantize, quantize

# factors on the absmax scale: the plain grid of method section 4.2, extended down, then refined around the best
_COARSE = tuple(round(1 - i / 20, 3) for i in range(13))
_FINE = tuple(round(i / 100, 3) for i in (-4, -3, -2, -1, 1, 2, 3, 4))

# weight scales may be far smaller than those of activations: small models have rows of 1e-3
_MIN_WEIGHT_SCALE = 1e-8


def round_nearest(weight: Tensor, bits: int, gram: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight, each row's scale chosen on a plain grid of factors.

    The loss of row n is the error of output channel n over the calibration tokens, dw G dw^T with
    G = sum of x^T x over the inputs x.

    Args:
        weight: float32 [N, K].
        bits: 4 or 8.
        gram: float32 [K, K]; None scores by the weight's own squared error.

    Returns:
        int8 codes [N, K] and float32 scales [N].
    """
    start = absmax_scale(weight.abs().amax(dim=1), bits, floor=_MIN_WEIGHT_SCALE)

    def loss(factor: Tensor) -> Tensor:
        scale = (start * factor)[:, None]
        error = dequantize(quantize(weight, scale, bits), scale) - weight
        return ((error if gram is None else error @ gram) * error).sum(dim=1)

    best = torch.ones_like(start)
    lowest = loss(best)
    for steps, around in ((_COARSE[1:], torch.zeros_like(best)), (_FINE, None)):
        centre = best.clone() if around is None else around
        for step in steps:
            factor = centre + step
            candidate = loss(factor)
            better = candidate < lowest
            lowest = torch.where(better, candidate, lowest)
            best = torch.where(better, factor, best)
    scale = start * best
    return quantize(weight, scale[:, None], bits), scale
