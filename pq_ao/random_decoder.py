"""Quantized decoders of any size with random codes, made in seconds: for measuring speed and memory, and for tests."""

import copy

import torch
from torch import Tensor, nn
from torchao.quantization import quantize_
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from pq_ao.checkpoint.quantizer import attach
from pq_ao.families import DecoderFamily, family_of, replace_submodule
from pq_ao.linears import CalibratedLinear
from pq_ao.modules import PrefixAttention
from pq_ao.ops import quantize
from pq_ao.quantize import PrefixQuantConfig, prefixquant_config
from pq_ao.quantizers import ActivationQuantizer, KVQuantizer
from pq_ao.rotation import begin_rotation
from pq_ao.tensors import PackedWeight

# where a range ends, in standard deviations: about the least squared error for a normal distribution
_CLIP = {4: 2.6, 8: 4.0}

# standard deviations of what is quantized, with the weights drawn here: attention averages values, SiLU halves
_NORMED_STD, _ATTENTION_STD, _MLP_STD = 1.0, 0.45, 0.6
_SHIFT_STD = 0.05

# factor on the absmax of a token in dynamic mode
_DYNAMIC_CLIP = 0.95


def random_quantized_decoder(
    config: PretrainedConfig,
    scheme: str | PrefixQuantConfig = "w4a4kv4",
    *,
    prefix_tokens: int = 1,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> PreTrainedModel:
    """A model as `calibrate` and `quantize_` would leave it, but with random weights and without calibration.

    For measurements of speed and memory, and for tests: its text is noise. Blocks are drawn, rotated and packed one
    at a time on `device`, so that no more than one of them is ever held in floating point.

    Args:
        config: of a supported family, in any size; it is not changed.
        scheme: name of a scheme, or a `PrefixQuantConfig`.
        prefix_tokens: length of the hidden prefix; must be 0 where the scheme has none.
        seed: equal arguments give equal models on the same kind of device.
        device: where the model is made and stays; CUDA where there is one, by default.
        dtype: of the model around the integers.

    Raises:
        ValueError: family not supported, unknown scheme, or `prefix_tokens` that the scheme cannot have.
        TypeError: `config` or `dtype` is of the wrong type.

    Example::

        model = pq_ao.random_quantized_decoder(LlamaConfig(num_hidden_layers=4))
        pq_ao.memory(model, pq_ao.PrefixStaticCache(model, batch_size=1, max_cache_len=1024))
    """
    if not isinstance(config, PretrainedConfig):
        raise TypeError(f"config: got {type(config).__name__}; pass a config of transformers, such as LlamaConfig().")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(f"dtype={dtype!r}: pass torch.bfloat16, torch.float16 or torch.float32.")
    scheme = prefixquant_config(scheme) if isinstance(scheme, str) else scheme
    _check_prefix(prefix_tokens, scheme)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    generator = torch.Generator(device).manual_seed(seed)

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    family = family_of(model)
    blocks = list(model.get_submodule(family.layers))
    replace_submodule(model, family.layers, nn.ModuleList())
    model.to_empty(device=device)
    rotary = model.get_submodule(family.rotary)  # its buffers are computed on construction
    replace_submodule(model, family.rotary, type(rotary)(model.config).to(device))
    _draw(model, generator)

    rotator = begin_rotation(model, scheme, seed=seed)
    layers = model.get_submodule(family.layers)
    for index, block in enumerate(blocks):
        block.to_empty(device=device)
        _draw(block, generator)
        rotator.replace(block, index)
        _decide(block, family, scheme, prefix_tokens, generator)
        quantize_(block, scheme)
        layers.append(block)
        blocks[index] = None
    model.requires_grad_(False)
    attach(model)
    return model.eval()


def _check_prefix(prefix_tokens: int, scheme: PrefixQuantConfig) -> None:
    if not isinstance(prefix_tokens, int) or isinstance(prefix_tokens, bool) or prefix_tokens < 0:
        raise ValueError(f"prefix_tokens={prefix_tokens!r}: must be an integer of at least 0.")
    if prefix_tokens and not scheme.prefix:
        raise ValueError(f"prefix_tokens={prefix_tokens}: the scheme has no prefix; pass prefix_tokens=0.")


@torch.no_grad()
def _draw(module: nn.Module, generator: torch.Generator) -> None:
    """Parameters that keep activations of order one."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1 and name.endswith("norm.weight"):
            parameter.fill_(1)
        elif parameter.ndim == 1:
            parameter.normal_(0, 0.1, generator=generator)
        else:
            std = 1 if "embed" in name else parameter.shape[1] ** -0.5
            parameter.normal_(0, std, generator=generator)


def _scale_for(std: float, bits: int) -> float:
    return _CLIP[bits] * std / 2 ** (bits - 1)


@torch.no_grad()
def _decide(
    block: nn.Module,
    family: DecoderFamily,
    scheme: PrefixQuantConfig,
    prefix_tokens: int,
    generator: torch.Generator,
) -> None:
    """What calibration decides: scales, shifts, codes, biases and the prefix of one block."""

    def normal(like: Tensor, std: float) -> Tensor:
        return torch.empty_like(like).normal_(0, std, generator=generator)

    attention: PrefixAttention = block.get_submodule(family.attention)
    std_of = {attention.o_in: _ATTENTION_STD, block.get_submodule(family.mlp).down_in: _MLP_STD}
    for module in block.modules():
        if isinstance(module, ActivationQuantizer):
            if module.dynamic:
                module.clip.fill_(_DYNAMIC_CLIP)
            else:
                module.scale.fill_(_scale_for(std_of.get(module, _NORMED_STD), module.bits))
            module.shift.copy_(normal(module.shift, _SHIFT_STD))
        elif isinstance(module, KVQuantizer) and module.bits < 16:
            for name in ("key", "value"):
                if module.dynamic:
                    module.get_buffer(f"{name}_clip").fill_(_DYNAMIC_CLIP)
                else:
                    module.get_buffer(f"{name}_scale").fill_(_scale_for(_NORMED_STD, module.bits))
                shift = module.get_buffer(f"{name}_shift")
                shift.copy_(normal(shift, _SHIFT_STD))
    for module in block.modules():
        if isinstance(module, CalibratedLinear):
            _round(module, scheme)
    empty = attention.prefix_k.new_empty(attention.kv_heads, prefix_tokens, attention.head_dim)
    attention.prefix_k, attention.prefix_v = normal(empty, 1.0), normal(empty, 1.0)


def _round(linear: CalibratedLinear, scheme: PrefixQuantConfig) -> None:
    weight = linear.weight.float()
    scale = weight.std(dim=1) * (_CLIP[scheme.weight_bits] / 2 ** (scheme.weight_bits - 1))
    codes = quantize(weight, scale[:, None], scheme.weight_bits)
    linear.packed = PackedWeight.from_codes(codes, scale, scheme.weight_bits, linear.fixed_dtype)
    constant = weight @ linear.quantizers[0].shift  # what the shift took off
    linear.packed_bias = constant if linear.bias is None else linear.bias.float() + constant
