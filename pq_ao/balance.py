"""Channel balance: inner channels of a block scaled so that quantization costs least, at no cost at run time.

Between `up_proj` and `down_proj`, and between `v_proj` and `o_proj`, a channel can be divided by a factor in front and
the weight behind it multiplied: the function stays. (Keys are balanced against queries: see `pq_ao.key_balance`.) In
front of R4 and R2 a few channels are far larger than the others, in all tokens or in some, and the rotation spreads
them over everything. Balanced, none is larger than its weight is worth.

Behind a Hadamard rotation, errors of activations and of weights alike grow with (sum_j x_j^2 / d_j^2) (sum_j w_j^2
d_j^2), x_j the size of channel j and w_j the norm of its weight column: least for d_j^2 = x_j / w_j. Some tokens are
larger than the others, though, and clipping is not noise. So power means of several orders are tried for x_j, and d_j =
x_j^a / w_j^(1 - a) for several a, and what has the least error of the linear's output on calibration data is taken.
"""

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from pq_ao.block_sites import BlockSites
from pq_ao.hadamard import (
    hadamard_transform,
    hadamard_transform_transpose,
    randomized_hadamard,
    randomized_hadamard_transpose,
)
from pq_ao.key_balance import balance_keys
from pq_ao.ops.quantize import absmax_scale, centre, dequantize, quantize, quantize_per_row
from pq_ao.quantizers import ActivationQuantizer
from pq_ao.rotation import Rotation
from pq_ao.scale_search import Found, best_scale

_ORDERS = (2.0, 16.0)
_EXPONENTS = (0.5, 0.625, 0.75)

_TOKENS = 2048  # that candidates are tried on, evenly spread over the calibration sequences
_LARGEST = 1e3  # factor, over the median one
# of the absmax: near the best for values that a Hadamard rotation has mixed
_WEIGHT_CLIP, _TOKEN_CLIP = 0.8, 0.9


class _Inner(NamedTuple):
    """Inner channels in front of a linear, taken out of the rotation that stands between.

    Attributes:
        inputs: float32 [T, n].
        weight: float32 [N, n].
        rotate: the rotation, along the last axis.
        share: makes sizes [n] equal where channels have to have one factor.
        divide: divides the channels by factors [n] in front, and multiplies the weight behind.
    """

    inputs: Tensor
    weight: Tensor
    rotate: Callable[[Tensor], Tensor]
    share: Callable[[Tensor], Tensor]
    divide: Callable[[Tensor], None]


@torch.no_grad()
def balance_block(sites: BlockSites, rotation: Rotation) -> Found:
    """Balances the inner channels of a rotated block in float32 that has its prefix; its function stays as it is.

    Args:
        sites: of the block.
        rotation: as it was rotated.

    Returns:
        for the record, "o_in_balance" and "down_in_balance": order of the power mean and exponent, empty for none; and
        what `balance_keys` says.
    """
    found = balance_keys(sites)
    inputs, importance = sites.float_sample(("o_in", "down_in"), _TOKENS)
    for site, make in (("o_in", _values), ("down_in", _hidden)):
        inner = make(sites, rotation, inputs[site])
        factors, found[f"{site}_balance"] = _best_factors(inner, sites.quantizers[site], importance)
        if factors is not None:
            inner.divide(factors)
    return found


def _values(sites: BlockSites, rotation: Rotation, inputs: Tensor) -> _Inner:
    """Channels of the value heads, each shared by a group of query heads."""
    attention, signs = sites.attention, rotation.value_signs
    groups, head_dim = attention.kv_heads, attention.head_dim
    per_group = attention.query_heads // groups

    def by_head(transform: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        if not rotation.online:
            return lambda x: x
        return lambda x: transform(x.unflatten(-1, (-1, head_dim)), signs).flatten(-2)

    rotate, restore = by_head(randomized_hadamard), by_head(randomized_hadamard_transpose)
    output = attention.o_proj.weight

    def share(sizes: Tensor) -> Tensor:
        sizes = sizes.view(groups, per_group, head_dim).square().mean(dim=1, keepdim=True).sqrt()
        return sizes.expand(-1, per_group, -1).flatten()

    def divide(factors: Tensor) -> None:
        output.copy_(rotate(restore(output) * factors))
        factors = factors.view(groups, per_group, head_dim)[:, 0].flatten()
        values = attention.qkv_proj.weight[-factors.numel() :]
        values.copy_(rotate(restore(values.T) / factors).T)
        if attention.qkv_proj.bias is not None:
            bias = attention.qkv_proj.bias[-factors.numel() :]
            bias.copy_(rotate(restore(bias) / factors))
        prefix = attention.prefix_v.transpose(0, 1).flatten(1)  # [P, G D]
        prefix = rotate(restore(prefix) / factors).unflatten(1, (groups, head_dim))
        attention.prefix_v = prefix.transpose(0, 1).contiguous()

    return _Inner(restore(inputs), restore(output), rotate, share, divide)


def _hidden(sites: BlockSites, rotation: Rotation, inputs: Tensor) -> _Inner:
    """Channels of the MLP."""
    gate_up, down = sites.linears["mlp_in"], sites.linears["down_in"]
    rotate, restore = (hadamard_transform, hadamard_transform_transpose) if rotation.online else (_same, _same)

    def divide(factors: Tensor) -> None:
        down.weight.copy_(rotate(restore(down.weight) * factors))
        up = slice(down.in_features, None)  # behind the rows of the gate
        gate_up.weight[up] /= factors[:, None]
        if gate_up.bias is not None:
            gate_up.bias[up] /= factors

    return _Inner(restore(inputs), restore(down.weight), rotate, _same, divide)


def _same(x: Tensor) -> Tensor:
    return x


def _best_factors(
    inner: _Inner, quantizer: ActivationQuantizer, importance: Tensor
) -> tuple[Tensor | None, list[float]]:
    norms = inner.share(inner.weight.norm(dim=0)).clamp_min(1e-20)
    exact = (inner.inputs - inner.inputs.mean(dim=0)) @ inner.weight.T  # whatever the factors and the rotation

    def error(factors: Tensor | float) -> float:
        return _output_error(inner, exact, factors, quantizer, importance)

    lowest, best, chosen = error(1.0), None, []
    for order, exponent in product(_ORDERS, _EXPONENTS):
        sizes = inner.share(_power_mean(inner.inputs, order))
        factors = sizes.clamp_min(1e-20).pow(exponent) / norms.pow(1 - exponent)
        factors = (factors / factors.median()).clamp(1 / _LARGEST, _LARGEST)
        candidate = error(factors)
        if candidate < lowest:
            lowest, best, chosen = candidate, factors, [order, exponent]
    return best, chosen


def _power_mean(x: Tensor, order: float) -> Tensor:
    """Of the sizes in each column; each over its largest first, so that high powers stay within float32."""
    largest = x.abs().amax(dim=0).clamp_min(1e-20)
    return (x.abs() / largest).pow(order).mean(dim=0).pow(1 / order) * largest


def _output_error(
    inner: _Inner, exact: Tensor, factors: Tensor | float, quantizer: ActivationQuantizer, importance: Tensor
) -> float:
    """Squared error of the linear's output, by importance of the tokens, with inputs and weight rounded to nearest."""
    x, weight = inner.rotate(inner.inputs / factors), inner.rotate(inner.weight * factors)
    x = x - x.mean(dim=0)
    if quantizer.dynamic:
        z = dequantize(*quantize_per_row(x, x.new_full((1,), _TOKEN_CLIP), quantizer.bits))
    else:
        codes = quantizer.code_set
        scale = best_scale(x, quantizer.bits, codes)
        offset = scale * centre(codes)
        z = dequantize(quantize(x + offset, scale, quantizer.bits, codes=codes), scale) - offset
    scale = absmax_scale(weight.abs().amax(dim=1) * _WEIGHT_CLIP, quantizer.weight_bits, floor=1e-8)[:, None]
    rounded = dequantize(quantize(weight, scale, quantizer.weight_bits), scale)
    error = (z @ rounded.T - exact).square().sum(dim=1)
    return float((error * importance).sum(dtype=torch.float64))
