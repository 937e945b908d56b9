"""pq_ao::int_accumulate, the integer heart of every linear, and the fp32 epilogue that all paths share."""

import torch
from torch import Tensor
from torch.nn import functional as F

from pq_ao.ops.packing import unpack_int4

# cuBLASLt's int8 matmul refuses fewer rows, and inner or outer sizes that are not multiples of 8
_CUDA_MIN_ROWS, _CUDA_MULTIPLE = 17, 8


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _int8_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """int8 [M, K] times int8 [N, K] transposed, int32 [M, N]; padded with zeros where CUDA asks for it."""
    rows, inner, outer = x.shape[0], x.shape[1], weight.shape[0]
    if x.device.type == "cuda":
        pad_inner = _round_up(inner, _CUDA_MULTIPLE) - inner
        pad_rows = max(_CUDA_MIN_ROWS, rows) - rows
        x = F.pad(x, (0, pad_inner, 0, pad_rows))
        weight = F.pad(weight, (0, pad_inner, 0, _round_up(outer, _CUDA_MULTIPLE) - outer))
    return torch._int_mm(x.contiguous(), weight.t())[:rows, :outer]


@torch.library.custom_op("pq_ao::int_accumulate", mutates_args=())
def int_accumulate(x_codes: Tensor, w_codes: Tensor) -> Tensor:
    """Exact integer products: sum_k x[m, k] w[n, k].

    Args:
        x_codes: int8 [M, K].
        w_codes: int8 [N, K], or uint8 [N, ceil(K / 2)] as `pack_int4` makes it.

    Returns:
        int32 [M, N]; exact while K * 2^(2 * bits - 2) < 2^31.
    """
    weight = unpack_int4(w_codes, x_codes.shape[1]) if w_codes.dtype == torch.uint8 else w_codes
    if x_codes.shape[0] == 0:
        return torch.empty(0, weight.shape[0], dtype=torch.int32, device=x_codes.device)
    return _int8_matmul(x_codes, weight).contiguous()


@int_accumulate.register_fake
def _(x_codes: Tensor, w_codes: Tensor) -> Tensor:
    return torch.empty(x_codes.shape[0], w_codes.shape[0], dtype=torch.int32, device=x_codes.device)


def int_linear(
    x_codes: Tensor, x_scale: Tensor, w_codes: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """y = accumulator * (x_scale * w_scale) + bias in float32, rounded once to `dtype` (method section 1.3).

    Args:
        x_codes: int8 [..., K].
        x_scale: float32 (1,) static, or [..., 1] one for each row.
        w_codes: see `int_accumulate`.
        w_scale: float32 [N].
        bias: [N] or None.

    Returns:
        `dtype` [..., N].
    """
    acc = int_accumulate(x_codes.reshape(-1, x_codes.shape[-1]), w_codes)
    acc = acc.view(*x_codes.shape[:-1], w_codes.shape[0])
    y = acc.float() * (x_scale * w_scale)
    if bias is not None:
        y = y + bias.float()
    return y.to(dtype)
