"""The handler that torchao's `quantize_` calls: it packs what calibration decided, nothing else."""

from torch import nn
from torchao.quantization import register_quantize_module_handler

from pq_ao.config import PrefixQuantConfig, prefixquant_config
from pq_ao.linears import CalibratedLinear, KeptLinear
from pq_ao.tensors import PackedWeight

__all__ = ["PrefixQuantConfig", "prefixquant_config"]


@register_quantize_module_handler(PrefixQuantConfig)
def _prefixquant_transform(
    module: nn.Module, config: PrefixQuantConfig, *, parameter_name: str = "weight"
) -> nn.Module:
    if parameter_name != "weight":
        raise ValueError(f"quantize_: parameter_name={parameter_name!r}: only 'weight' can be packed.")
    if isinstance(module, KeptLinear):
        return module
    if not isinstance(module, CalibratedLinear) or (module.packed is None and not _is_packed(module)):
        raise ValueError(
            f"quantize_: found a {type(module).__name__} without codes and scales: the model is not calibrated. "
            "Run this line first:\n    pq_ao.calibrate(model, tokenizer, config)"
        )
    if _is_packed(module):
        raise ValueError("quantize_: the model is quantized already; quantize_ runs once.")
    if module.config != config:
        raise ValueError(
            f"quantize_: config={config} differs from the calibrated one, {module.config}; pass that one, or "
            "calibrate the original model again."
        )
    module.pack_()
    return module


def _is_packed(module: CalibratedLinear) -> bool:
    return isinstance(module.weight, PackedWeight)
