"""Input of an op that is a linear's accumulators, which the op scales itself: that saves a pass over them."""

import torch
from torch import Tensor


def check_accumulators(op: str, x: Tensor, in_scale: Tensor | None, in_bias: Tensor | None) -> None:
    """Raises unless in_scale and in_bias (float32, one an element of the last dim of x, or None) fit x."""
    if in_scale is None:
        if in_bias is not None:
            raise ValueError(f"{op}: in_bias goes with in_scale, which is None.")
        return
    if x.dtype != torch.bfloat16:
        raise TypeError(f"{op}: with in_scale the input is accumulators in torch.bfloat16; they are {x.dtype}.")
    for name, tensor in (("in_scale", in_scale), ("in_bias", in_bias)):
        if tensor is not None and (tensor.shape != x.shape[-1:] or tensor.dtype != torch.float32):
            raise ValueError(
                f"{op}: {name} is {tensor.dtype} {list(tensor.shape)}; float32 {list(x.shape[-1:])} is required."
            )


def scaled(x: Tensor, in_scale: Tensor | None, in_bias: Tensor | None) -> Tensor:
    """x * in_scale + in_bias in float32; x itself without in_scale."""
    if in_scale is None:
        return x
    x = x * in_scale
    return x if in_bias is None else x + in_bias
