"""Weight subclass: INT4 codes two a byte, or INT8, with one float32 scale an output channel."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchao.utils import TorchAOBaseTensor

from pq_ao.ops.int_linear import int_linear
from pq_ao.ops.packing import pack_int4, unpack_int4
from pq_ao.ops.quantize import dequantize
from pq_ao.tensors.quantized_activation import QuantizedActivation

aten = torch.ops.aten


class PackedWeight(TorchAOBaseTensor):
    """Weight [N, K] of a quantized linear. The linear computes on the integers; the weight is never dequantized there.

    Tensor data:
        qdata: uint8 [N, ceil(K / 2)] for 4 bits (see `pq_ao.ops.packing`), int8 [N, K] for 8 bits.
        scale: float32 [N].

    Attributes:
        in_features: K (the packed axis cannot tell an odd K).
        hp_dtype: dtype that this tensor shows; it cannot be changed.
    """

    tensor_data_names = ["qdata", "scale"]
    tensor_attribute_names = ["in_features", "hp_dtype"]

    def __new__(cls, qdata: Tensor, scale: Tensor, in_features: int, hp_dtype: torch.dtype):
        shape = (qdata.shape[0], in_features)
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=hp_dtype, device=qdata.device)

    def __init__(self, qdata: Tensor, scale: Tensor, in_features: int, hp_dtype: torch.dtype):
        super().__init__()
        self.qdata = qdata
        self.scale = scale
        self.in_features = in_features
        self.hp_dtype = hp_dtype

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, bits: int, hp_dtype: torch.dtype) -> "PackedWeight":
        """Packs final integer codes.

        Args:
            codes: int8 [N, K], in the range of `bits`.
            scale: float32 [N].
            bits: 4 or 8.
            hp_dtype: dtype of the model around it.
        """
        codes = codes.contiguous()
        qdata = pack_int4(codes) if bits == 4 else codes
        return cls(qdata, scale, codes.shape[1], hp_dtype)

    @property
    def bits(self) -> int:
        """4 or 8."""
        return 4 if self.qdata.dtype == torch.uint8 else 8

    def codes(self) -> Tensor:
        """int8 codes [N, K], unpacked."""
        return unpack_int4(self.qdata, self.in_features) if self.bits == 4 else self.qdata

    def dequantize(self) -> Tensor:
        """codes * scale in float32 [N, K]: for inspection and the reference path."""
        return dequantize(self.codes(), self.scale[:, None])

    def _stable_hash_for_caching(self) -> str:
        return f"PackedWeight:{tuple(self.shape)}:{self.bits}:{self.hp_dtype}:{self.device.type}"


def _linear(func, types, args, kwargs):
    x, weight = args[0], args[1]
    bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
    if not isinstance(weight, PackedWeight) or not isinstance(x, QuantizedActivation):
        raise TypeError(
            f"linear: got an activation of type {type(x).__name__} and a weight of type {type(weight).__name__}; "
            "a PackedWeight takes a QuantizedActivation and nothing else does. Let `pq_ao.calibrate` build the "
            "modules around it."
        )
    return int_linear(x.qdata, x.scale, weight.qdata, weight.scale, bias, x.hp_dtype)


for _cls in (PackedWeight, QuantizedActivation):
    _cls.implements(aten.linear.default)(_linear)
    _cls.implements_torch_function(F.linear)(_linear)

implements = PackedWeight.implements


@implements(aten._to_copy.default)
def _(func, types, args, kwargs):
    weight, dtype = args[0], (kwargs or {}).pop("dtype", None)
    if dtype not in (None, weight.hp_dtype):
        raise ValueError(
            f"PackedWeight: cannot convert a quantized weight from {weight.hp_dtype} to {dtype}; "
            f"load the model with dtype={dtype} and calibrate it again."
        )
    return weight._apply_fn_to_data(lambda t: func(t, **kwargs))


@implements(aten.slice.Tensor)
def _(func, types, args, kwargs):
    weight, dim = args[0], args[1] if len(args) > 1 else 0
    if dim % 2 != 0:
        raise ValueError("PackedWeight: slice takes rows only (dim=0); columns share bytes.")
    rows = args[2:]
    return PackedWeight(func(weight.qdata, 0, *rows), func(weight.scale, 0, *rows), weight.in_features, weight.hp_dtype)


@implements(aten.empty_like.default)
def _(func, types, args, kwargs):
    kwargs = {key: value for key, value in (kwargs or {}).items() if key != "dtype"}
    return args[0]._apply_fn_to_data(lambda t: func(t, **kwargs))


@implements(aten.copy_.default)
def _(func, types, args, kwargs):
    target, source = args[:2]
    for tensor in (target, source):
        if not isinstance(tensor, PackedWeight):
            raise TypeError(
                f"copy_: a {type(tensor).__name__} and a PackedWeight cannot be copied into one another; "
                "use from_codes(...) or dequantize()."
            )
    kinds = [(tuple(tensor.shape), tensor.bits, tensor.hp_dtype) for tensor in (target, source)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"copy_: the weights differ in shape, bits or dtype: {kinds[0]} and {kinds[1]}.")
    target.qdata.copy_(source.qdata)
    target.scale.copy_(source.scale)
    return target


torch.serialization.add_safe_globals([PackedWeight, QuantizedActivation])
