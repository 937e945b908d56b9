"""Linear with INT8 weights and activations of 16 bits: two integer digits a value, multiplied exactly.

Converting weights to floating point would cost more instructions than there is time for while they are read. Split
into digits, x = scale * (256 * high + low), activations go through the integer kernels instead, as twice the rows.
"""

import torch
from torch import Tensor

from pq_ao.ops.int_linear import int_accumulate

_BASE = 256
_LARGEST = 127 * _BASE  # so that the high digit stays in int8

# |digit| <= 128 and |code| <= 127: no sum of so many products leaves int32
MAX_INNER = (2**31 - 1) // (128 * 127)

# sums of two digits are four times as large as the logits in bfloat16
_ROWS_AT_ONCE = 512


def split_digits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as two digits and a scale: x = scale * (256 * digits[0] + digits[1]), to 2^-16 of the largest value.

    Args:
        x: floats [M, K].

    Returns:
        int8 [2, M, K], and float32 [M, 1].
    """
    x = x.float()
    # multiplied, for a GPU does not divide by a number but multiplies by its reciprocal: CPU and GPU round alike
    scale = x.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * _LARGEST) * (1 / _LARGEST)
    whole = torch.round(x / scale).to(torch.int32)
    high = (whole + _BASE // 2) >> 8
    return torch.stack((high, whole - high * _BASE)).to(torch.int8), scale


def int8_head(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """y = x (codes * scale)^T, exact but for 16 bits of x and one rounding of y.

    Args:
        x: floats [..., K].
        codes: int8 [N, K], K at most `MAX_INNER`.
        scale: float32 [N].

    Returns:
        [..., N] in the dtype of x.
    """
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] > _ROWS_AT_ONCE:
        y = torch.cat([int8_head(part, codes, scale) for part in rows.split(_ROWS_AT_ONCE)])
        return y.view(*x.shape[:-1], codes.shape[0])
    digits, x_scale = split_digits(rows)
    high, low = int_accumulate(digits.flatten(0, 1), codes).float().unflatten(0, digits.shape[:2])
    y = (high * _BASE + low) * (x_scale * scale)
    return y.to(x.dtype).view(*x.shape[:-1], codes.shape[0])
