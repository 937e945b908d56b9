"""One decoder block in calibration: its prefix, its scales and codes, and how it is kept and restored."""

import torch
from torch import Tensor, nn

from pq_ao.block_sites import SITES, BlockSites
from pq_ao.config import PrefixQuantConfig
from pq_ao.families import DecoderFamily
from pq_ao.linears import CalibratedLinear
from pq_ao.modules import PrefixAttention, on_path, path_switches
from pq_ao.quantizers import ActivationQuantizer, FixedDtype, KVQuantizer, Path
from pq_ao.rounding import ROUNDINGS, RoundedWeight, corrected_bias
from pq_ao.scale_search import Found, search_activation, search_keys, search_values
from pq_ao.streams import Stream
from pq_ao.tensors import PackedWeight


def store_prefix(layer: nn.Module, family: DecoderFamily, head: Stream) -> None:
    """Keeps the prefix's keys and values of this block in full precision, then moves it on."""
    attention: PrefixAttention = layer.get_submodule(family.attention)
    hidden, angles = head.sequences(slice(None))
    _, key, value = attention.project(layer.get_submodule(family.attention_norm)(hidden), angles)
    head.advance(layer)  # the prefix sees itself as ordinary causal tokens, so before it becomes a prefix
    attention.prefix_k, attention.prefix_v = key[0].contiguous(), value[0].contiguous()


def calibrate_block(
    sites: BlockSites, config: PrefixQuantConfig, rounding: str, search: str
) -> tuple[Found, dict[str, RoundedWeight]]:
    """Sets all scales of a block and rounds its linears, in the order that data reaches them.

    Each step sees the inputs that those before it give when quantized.

    Returns:
        what the searches found, and the rounded weight of each linear by its name in the block.
    """
    found: Found = {}
    rounded: dict[str, RoundedWeight] = {}
    attention = sites.attention
    names = {module: name for name, module in sites.layer.named_modules()}
    with on_path(path_switches(sites.layer), Path.FLOAT):  # and back to it afterwards
        for site in SITES:
            quantizer, linear = sites.quantizers[site], sites.linears[site]
            found |= search_activation(sites, site, config.act_bits, search)
            rounded[names[linear]] = _round(linear, sites, site, config, rounding)
            quantizer.path = linear.path = Path.REFERENCE
            if linear is attention.qkv_proj and config.kv_bits < 16:
                found |= search_values(sites, config.kv_bits, search)
                found |= search_keys(sites, config.kv_bits, search)
                attention.kv.path = Path.REFERENCE
    sites.forget()
    return found, rounded


def _round(
    linear: CalibratedLinear, sites: BlockSites, site: str, config: PrefixQuantConfig, rounding: str
) -> RoundedWeight:
    inputs = sites.layer_inputs(site)
    weight = ROUNDINGS[rounding](linear.weight, config.weight_bits, inputs)
    linear.packed = PackedWeight.from_codes(weight.codes, weight.scale, config.weight_bits, linear.fixed_dtype)
    linear.packed_bias = corrected_bias(linear.weight, linear.bias, weight, inputs)
    return weight


def block_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """What calibration decided of a block, as plain tensors: codes, scales, biases, clip factors and shifts."""
    tensors: dict[str, Tensor] = {}
    for name, module in layer.named_modules():
        if isinstance(module, CalibratedLinear):
            tensors[f"{name}.codes"], tensors[f"{name}.scale"] = module.packed.qdata, module.packed.scale
            tensors[f"{name}.bias"] = module.packed_bias
        elif isinstance(module, ActivationQuantizer | KVQuantizer):
            tensors |= {f"{name}.{buffer}": tensor for buffer, tensor in module.named_buffers()}
    return tensors


def restore_block(layer: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Gives a rotated block in float32 what `block_tensors` took of it.

    Raises:
        ValueError: names or shapes do not fit the block; nothing is changed then.
    """
    _check_shapes(layer, tensors)
    for name, module in layer.named_modules():
        if isinstance(module, CalibratedLinear):
            device = module.weight.device
            codes, scale, bias = (tensors[f"{name}.{part}"].to(device) for part in ("codes", "scale", "bias"))
            module.packed = PackedWeight(codes, scale, module.in_features, module.fixed_dtype)
            module.packed_bias = bias
        elif isinstance(module, ActivationQuantizer | KVQuantizer):
            for buffer, tensor in module.named_buffers():
                tensor.copy_(tensors[f"{name}.{buffer}"])


def _check_shapes(layer: nn.Module, tensors: dict[str, Tensor]) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for name, module in layer.named_modules():
        if isinstance(module, CalibratedLinear):
            rows, columns = module.weight.shape
            width = -(-columns // 2) if module.config.weight_bits == 4 else columns
            expected |= {f"{name}.codes": (rows, width), f"{name}.scale": (rows,), f"{name}.bias": (rows,)}
        elif isinstance(module, ActivationQuantizer | KVQuantizer):
            expected |= {f"{name}.{buffer}": tuple(tensor.shape) for buffer, tensor in module.named_buffers()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if differing:
        shapes = (
            f"{name} is {found.get(name, 'absent')} instead of {expected.get(name, 'absent')}" for name in differing
        )
        raise ValueError(f"a kept block does not fit this model: {'; '.join(shapes)}. Give another resume folder.")


def cast_block(layer: nn.Module, dtype: torch.dtype) -> None:
    """Float weights and prefix to the model's dtype; codes and scales stay as they are."""
    for module in layer.modules():
        if isinstance(module, CalibratedLinear):
            module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)
            if module.bias is not None:
                module.bias = nn.Parameter(module.bias.to(dtype), requires_grad=False)
            packed = module.packed
            module.packed = PackedWeight(packed.qdata, packed.scale, packed.in_features, dtype)
        if isinstance(module, PrefixAttention):
            module.prefix_k, module.prefix_v = module.prefix_k.to(dtype), module.prefix_v.to(dtype)
        if isinstance(module, FixedDtype):
            module.fixed_dtype = dtype
