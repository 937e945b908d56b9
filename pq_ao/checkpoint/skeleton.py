"""From files to a model: a skeleton on the meta device with the tensors that lie on disk, and what it becomes.

transformers fills the skeleton, one tensor of the files to one of its parameters or buffers; then the linears are
joined and our modules put in place. Floating-point weights of quantized linears exist on meta only, without memory.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from pq_ao.attention import ATTENTION_NAME
from pq_ao.checkpoint.config import CheckpointConfig, check_scheme
from pq_ao.checkpoint.names import FusedLinear, fused_linears, renamed_norms
from pq_ao.config import PrefixQuantConfig
from pq_ao.families import DecoderFamily, family_of, head_dim_of, replace_submodule
from pq_ao.head import Int8Head
from pq_ao.linears import CalibratedLinear, KeptEmbedding, KeptLinear
from pq_ao.modules import FinalRMSNorm, PrefixAttention, PrefixMLP, PrefixRMSNorm
from pq_ao.quantizers import FixedDtype, KVQuantizer, activation_quantizers
from pq_ao.tensors import PackedWeight

_META = torch.device("meta")


class _StoredLinear(nn.Module):
    """The tensors of one linear as they lie on disk."""

    def __init__(self, rows: int, columns: int, bits: int, bias_dtype: torch.dtype | None = torch.float32):
        super().__init__()
        width, dtype = ((columns + 1) // 2, torch.uint8) if bits == 4 else (columns, torch.int8)
        self.columns = columns
        self.weight = _empty(rows, width, dtype=dtype)
        self.weight_scale = _empty(rows)
        self.bias = None if bias_dtype is None else _empty(rows, dtype=bias_dtype)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=_META), requires_grad=False)


def build_skeleton(model: PreTrainedModel, config: CheckpointConfig) -> None:
    """Gives `model`, which is on meta, the parameters and buffers that lie on disk, by name.

    Raises:
        ValueError: the model is not of a supported family, or its embedding and head are tied.
    """
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no language-model head, and a prefixquant checkpoint is that of a whole "
            "decoder; load it with AutoModelForCausalLM."
        )
    family = family_of(model)
    if model.config.tie_word_embeddings:
        raise ValueError(
            "config.json: tie_word_embeddings=true, but a rotated model has a head of its own; restore config.json "
            "(tie_word_embeddings=false)."
        )
    scheme, dtype = check_scheme(config.scheme), getattr(torch, config.dtype)
    embedding, head = model.get_submodule(family.embedding), model.get_submodule(family.head)
    replace_submodule(model, family.embedding, KeptEmbedding(embedding.weight, embedding.padding_idx))
    if config.head_bits == 8:
        bias_dtype = None if head.bias is None else dtype
        replace_submodule(model, family.head, _StoredLinear(*head.weight.shape, 8, bias_dtype))
    else:
        replace_submodule(model, family.head, KeptLinear(head.weight, head.bias))
    final_norm = FinalRMSNorm(model.config.rms_norm_eps, model.get_submodule(family.final_norm).weight)
    replace_submodule(model, family.final_norm, final_norm)
    for layer in model.get_submodule(family.layers):
        _strip_layer(layer, family, model.config, scheme, config.prefix_tokens, dtype)
    model.set_attn_implementation(ATTENTION_NAME)


def _strip_layer(
    layer: nn.Module, family: DecoderFamily, model_config, scheme: PrefixQuantConfig, prefix_tokens: int, dtype
) -> None:
    head_dim, kv_heads = head_dim_of(model_config), model_config.num_key_value_heads
    linears = fused_linears(family, model_config)
    widths = [layer.get_submodule(fused.parts[0]).in_features for fused in linears]
    attn_in, o_in, mlp_in, down_in = activation_quantizers(scheme, widths, _META)
    kept_norms = {name: layer.get_submodule(name) for name in renamed_norms(family).values()}

    attention = nn.Module()
    attention.layer_idx = layer.get_submodule(family.attention).layer_idx
    attention.o_in, attention.kv = o_in, KVQuantizer(scheme, kv_heads, head_dim, _META)
    for name in ("prefix_k", "prefix_v"):
        attention.register_buffer(name, torch.empty(kv_heads, prefix_tokens, head_dim, dtype=dtype, device=_META))
    mlp = nn.Module()
    mlp.down_in = down_in
    replace_submodule(layer, family.attention, attention)
    replace_submodule(layer, family.mlp, mlp)
    for name, norm in kept_norms.items():
        replace_submodule(layer, name, norm)
    for fused, width in zip(linears, widths, strict=True):
        for part, rows in zip(fused.parts, fused.rows, strict=True):
            replace_submodule(layer, part, _StoredLinear(rows, width, scheme.weight_bits))
    for name, quantizer in ((family.attention_norm, attn_in), (family.mlp_norm, mlp_in)):
        norm = PrefixRMSNorm(model_config.rms_norm_eps, quantizer)
        norm.weight = _empty(0)  # see `pq_ao.checkpoint.names`
        replace_submodule(layer, name, norm)


@torch.no_grad()
def assemble(model: PreTrainedModel, config: CheckpointConfig) -> None:
    """Makes of a filled skeleton the model that was saved."""
    _own_memory(model)
    family = family_of(model)
    scheme, dtype = check_scheme(config.scheme), getattr(torch, config.dtype)
    if config.head_bits == 8:
        stored = model.get_submodule(family.head)
        bias = None if stored.bias is None else stored.bias.detach()
        replace_submodule(model, family.head, Int8Head(_packed([stored], dtype), bias))
    for layer in model.get_submodule(family.layers):
        _complete_layer(layer, family, model.config, scheme, dtype)
    for module in model.modules():
        if isinstance(module, FixedDtype):
            module.fixed_dtype = dtype
    model.requires_grad_(False)


def _own_memory(model: nn.Module) -> None:
    """Tensors on the CPU are views of the mapped file: a save into its folder would change them, or end the process."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.device.type == "cpu":
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.device.type == "cpu":
                setattr(module, name, buffer.clone())


def _complete_layer(
    layer: nn.Module, family: DecoderFamily, model_config, scheme: PrefixQuantConfig, dtype: torch.dtype
) -> None:
    stored, stored_mlp = layer.get_submodule(family.attention), layer.get_submodule(family.mlp)
    norms = [layer.get_submodule(name) for name in (family.attention_norm, family.mlp_norm)]
    for norm in norms:
        del norm.weight
    attn_in, mlp_in = (norm.quantizer for norm in norms)
    quantizers = ((attn_in, stored.kv), (stored.o_in,), (mlp_in,), (stored_mlp.down_in,))
    qkv, output, gate_up, down = (
        _joined(layer, fused, scheme, inputs, dtype)
        for fused, inputs in zip(fused_linears(family, model_config), quantizers, strict=True)
    )
    attention = PrefixAttention(
        model_config,
        stored.layer_idx,
        head_dim_of(model_config),
        qkv,
        output,
        stored.o_in,
        stored.kv,
        scheme.rotation,
        *(layer.get_submodule(name) for name in renamed_norms(family).values()),
    )
    attention.prefix_k, attention.prefix_v = stored.prefix_k, stored.prefix_v
    mlp = PrefixMLP(gate_up, down, stored_mlp.down_in, ACT2FN[model_config.hidden_act], scheme.rotation)
    replace_submodule(layer, family.attention, attention)
    replace_submodule(layer, family.mlp, mlp)


def _joined(
    layer: nn.Module, fused: FusedLinear, scheme: PrefixQuantConfig, quantizers: tuple, dtype: torch.dtype
) -> CalibratedLinear:
    parts = [layer.get_submodule(name) for name in fused.parts]
    linear = CalibratedLinear(_packed(parts, dtype), _rows([part.bias for part in parts]), scheme, quantizers)
    for name in fused.parts:
        replace_submodule(layer, name, None)  # frees them before the next are joined
    linear.compute_on_integers_()
    return linear


def _packed(parts: list[_StoredLinear], dtype: torch.dtype) -> PackedWeight:
    codes, scale = _rows([part.weight for part in parts]), _rows([part.weight_scale for part in parts])
    return PackedWeight(codes, scale, parts[0].columns, dtype)


def _rows(tensors: list[Tensor]) -> Tensor:
    tensors = [tensor.detach() for tensor in tensors]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
