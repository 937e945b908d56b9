"""The quantized activation that a norm, the attention or the MLP hands to the next linear."""

import torch
from torch import Tensor
from torchao.utils import TorchAOBaseTensor

from pq_ao.ops.quantize import dequantize

aten = torch.ops.aten


class QuantizedActivation(TorchAOBaseTensor):
    """Integer codes and their scale; stands for `qdata * scale`.

    It goes into linears with a `PackedWeight`, and through view, reshape, contiguous and slice (view and reshape keep
    the last axis where scales are per row). Any other operation raises: nothing is dequantized in silence.

    Tensor data:
        qdata: int8 codes [..., K].
        scale: float32 (1,), static; or [..., 1], one for each row.

    Attributes:
        hp_dtype: dtype that this tensor shows, and that a linear returns.
    """

    tensor_data_names = ["qdata", "scale"]
    tensor_attribute_names = ["hp_dtype"]

    def __new__(cls, qdata: Tensor, scale: Tensor, hp_dtype: torch.dtype):
        return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=hp_dtype, device=qdata.device)

    def __init__(self, qdata: Tensor, scale: Tensor, hp_dtype: torch.dtype):
        super().__init__()
        self.qdata = qdata
        self.scale = scale
        self.hp_dtype = hp_dtype

    def dequantize(self) -> Tensor:
        """qdata * scale in float32: for inspection, never on the way to a linear."""
        return dequantize(self.qdata, self.scale)

    def _stable_hash_for_caching(self) -> str:
        return f"QuantizedActivation:{tuple(self.shape)}:{tuple(self.scale.shape)}:{self.hp_dtype}:{self.device.type}"


implements = QuantizedActivation.implements


def _with_shape(x: QuantizedActivation, qdata: Tensor) -> QuantizedActivation:
    scale = x.scale
    if scale.ndim > 1:
        if qdata.shape[-1] != x.shape[-1]:
            raise ValueError(
                f"QuantizedActivation: cannot change the last axis ({x.shape[-1]} to {qdata.shape[-1]}) of an "
                "activation with one scale a row; reshape before quantizing."
            )
        scale = scale.reshape(*qdata.shape[:-1], 1)
    return QuantizedActivation(qdata, scale, x.hp_dtype)


@implements([aten.view.default, aten._unsafe_view.default, aten.reshape.default])
def _(func, types, args, kwargs):
    x, shape = args
    return _with_shape(x, x.qdata.reshape(shape))


@implements(aten._to_copy.default)
def _(func, types, args, kwargs):
    x, kwargs = args[0], dict(kwargs)
    dtype = kwargs.pop("dtype", None) or x.hp_dtype
    if dtype != x.hp_dtype:
        raise ValueError(f"QuantizedActivation: cannot convert codes of {x.hp_dtype} to {dtype}; use dequantize().")
    return x._apply_fn_to_data(lambda t: func(t, **kwargs))


@implements([aten.slice.Tensor])
def _(func, types, args, kwargs):
    x, dim = args[0], (args[1] if len(args) > 1 else 0) % args[0].ndim
    qdata = func(x.qdata, dim, *args[2:], **kwargs)
    if x.scale.ndim == 1:
        return QuantizedActivation(qdata, x.scale, x.hp_dtype)
    scale = x.scale if dim == x.ndim - 1 else func(x.scale, dim, *args[2:], **kwargs)
    return QuantizedActivation(qdata, scale, x.hp_dtype)
