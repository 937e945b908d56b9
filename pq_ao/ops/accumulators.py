"""Input of an op that is a linear's raw accumulators, which the op scales itself: that saves a pass over them."""

import torch
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CARRIED = (torch.float32, torch.bfloat16)  # float16 does not hold them


def check_accumulators(
    op: str, x: Tensor, in_scale: Tensor | None, in_bias: Tensor | None, in_dtype: torch.dtype | None
) -> None:
    """Raises unless in_scale, in_bias (float32, one an element of the last dim of x) and in_dtype fit x."""
    if in_scale is None:
        if in_bias is not None or in_dtype is not None:
            raise ValueError(f"{op}: in_bias and in_dtype go with in_scale, which is None.")
        return
    if in_dtype not in _DTYPES:
        raise TypeError(f"{op}: in_dtype={in_dtype}; with in_scale one of {_DTYPES} is required.")
    if x.dtype not in _CARRIED:
        raise TypeError(f"{op}: with in_scale accumulators are one of {_CARRIED}; they are {x.dtype}.")
    for name, tensor in (("in_scale", in_scale), ("in_bias", in_bias)):
        if tensor is not None and (tensor.shape != x.shape[-1:] or tensor.dtype != torch.float32):
            raise ValueError(
                f"{op}: {name} is {tensor.dtype} {list(tensor.shape)}; float32 {list(x.shape[-1:])} is required."
            )


def rounding(x: Tensor, in_dtype: torch.dtype | None) -> torch.dtype:
    """To what scaled input is rounded: to in_dtype, unless x comes in it and was rounded then."""
    return torch.float32 if in_dtype in (None, x.dtype) else in_dtype


def scaled(x: Tensor, in_scale: Tensor | None, in_bias: Tensor | None, in_dtype: torch.dtype | None) -> Tensor:
    """x * in_scale + in_bias, each rounded to float32, then to `rounding`; x itself without in_scale."""
    if in_scale is None:
        return x
    y = x * in_scale
    if in_bias is not None:
        y = y + in_bias
    return y.to(rounding(x, in_dtype))
