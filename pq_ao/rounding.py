"""Weight codes: nearest rounding, or GPTQ's error-compensating one; each output channel's scale is searched.

Both minimise, for each row w of a weight, the squared error of its output over the calibration tokens, with the inputs
as they will be quantized: sum (x w - z v)^2 = const - 2 v C w + v G v, where v is the rounded row, x and z are inputs
in floating point and quantized, their means taken off (the bias makes up for these), G = z^T z and C = z^T x.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pq_ao.ops.quantize import absmax_scale, code_range, dequantize, quantize

# factors on the absmax scale: a plain grid, further down than in the paper's code, refined around the best
_COARSE = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
_FINE = (-0.05, -0.025, 0.025, 0.05)

# weight scales may be far smaller than those of activations: small models have rows of 1e-3
_MIN_WEIGHT_SCALE = 1e-8

# parts of the mean diagonal of G that are added to it: for the codes, and for the weight that they aim at, which
# follows the noise of a few thousand tokens otherwise
_DAMPING, _AIM_DAMPING = 0.01, 0.1
_COLUMNS = 128  # that are rounded before the rest of the weight hears of their errors


@dataclass
class LayerInputs:
    """What rounding needs of a linear's inputs x in floating point and z as they will be quantized, over all tokens.

    Attributes:
        gram: float32 [K, K], sum of z^T z, z without its mean.
        cross: float32 [K, K], sum of z^T x, both without their means.
        mean: float32 [K], mean of x.
        quantized_mean: float32 [K], mean of z, the site's shift taken off.
        tokens: how many.
    """

    gram: Tensor
    cross: Tensor
    mean: Tensor
    quantized_mean: Tensor
    tokens: int


@dataclass
class RoundedWeight:
    """A rounded weight.

    Attributes:
        codes: int8 [N, K].
        scale: float32 [N].
        weight: float32 [N, K], of which the codes are the nearest; fine-tuning goes on from it.
        output_rms: float32 [N], root mean square of each output channel, its mean taken off.
    """

    codes: Tensor
    scale: Tensor
    weight: Tensor
    output_rms: Tensor


def round_nearest(weight: Tensor, bits: int, inputs: LayerInputs) -> RoundedWeight:
    """Nearest codes, each row's scale with the least squared error of its output.

    Args:
        weight: float32 [N, K].
        bits: 4 or 8.
        inputs: see `LayerInputs`.
    """
    scale = _search_scale(weight, bits, inputs.gram, weight @ inputs.cross.T)
    return _rounded(quantize(weight, scale[:, None], bits), scale, weight, inputs)


def round_gptq(weight: Tensor, bits: int, inputs: LayerInputs) -> RoundedWeight:
    """Codes rounded column by column, each column's error made up for by those that follow (GPTQ).

    It rounds the real-valued weight that gives the floating-point output best from quantized inputs, so that errors
    of the block up to here are made up for as well. Columns of large inputs go first.

    Args and result: see `round_nearest`.
    """
    aim = _least_squares(weight, inputs)
    hessian, _ = _damped(inputs.gram.double(), _DAMPING)
    scale = _search_scale(aim, bits, inputs.gram, weight @ inputs.cross.T)
    order = torch.argsort(hessian.diagonal(), descending=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    # row j: how a change of column j is best spread over the columns behind it
    spread = torch.linalg.cholesky(inverse, upper=True).float()
    rest = aim[:, order]
    low, high = code_range(bits)
    for start in range(0, rest.shape[1], _COLUMNS):
        stop = min(start + _COLUMNS, rest.shape[1])
        errors = rest.new_empty(rest.shape[0], stop - start)
        for column in range(start, stop):
            value = rest[:, column]
            rounded = torch.clamp(torch.round(value / scale), low, high) * scale
            error = (value - rounded) / spread[column, column]
            rest[:, column + 1 : stop] -= error[:, None] * spread[column, column + 1 : stop]
            errors[:, column - start] = error
        rest[:, stop:] -= errors @ spread[start:stop, stop:]
    compensated = torch.empty_like(rest)
    compensated[:, order] = rest  # each column as it stood when it was rounded
    return _rounded(quantize(compensated, scale[:, None], bits), scale, compensated, inputs)


ROUNDINGS = {"nearest": round_nearest, "gptq": round_gptq}


def _damped(gram: Tensor, part: float) -> tuple[Tensor, Tensor]:
    """G with something added to its diagonal, and what."""
    added = part * gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return gram + added * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), added


def _least_squares(weight: Tensor, inputs: LayerInputs) -> Tensor:
    """float32 [N, K] of the least squared error, drawn toward `weight`."""
    gram, added = _damped(inputs.gram.double(), _AIM_DAMPING)
    wide = weight.double()
    right = wide @ inputs.cross.double().T + added * wide
    return torch.cholesky_solve(right.T, torch.linalg.cholesky(gram)).T.float()


def _search_scale(weight: Tensor, bits: int, gram: Tensor, target: Tensor) -> Tensor:
    """float32 [N], the scale of each row with the least loss of nearest codes; target: [N, K], row by row C w."""
    start = absmax_scale(weight.abs().amax(dim=1), bits, floor=_MIN_WEIGHT_SCALE)

    def loss(factor: Tensor) -> Tensor:
        scale = (start * factor)[:, None]
        rounded = dequantize(quantize(weight, scale, bits), scale)
        return (rounded * (rounded @ gram - 2 * target)).sum(dim=1)

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
    return start * best


def _rounded(codes: Tensor, scale: Tensor, weight: Tensor, inputs: LayerInputs) -> RoundedWeight:
    values = dequantize(codes, scale[:, None])
    power = ((values @ inputs.gram) * values).sum(dim=1) / inputs.tokens
    return RoundedWeight(codes, scale, weight, power.clamp_min(0).sqrt())


def corrected_bias(weight: Tensor, bias: Tensor | None, rounded: RoundedWeight, inputs: LayerInputs) -> Tensor:
    """float32 [N] bias with which the quantized linear has the mean output of the floating-point one.

    It holds what the inputs' shift contributes, and takes off the mean error of rounding.
    """
    mean_output = weight @ inputs.mean - (rounded.codes.float() @ inputs.quantized_mean) * rounded.scale
    return mean_output if bias is None else mean_output + bias.float()
