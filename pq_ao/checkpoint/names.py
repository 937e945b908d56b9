"""Names of tensors on disk: those of the original model, with q, k, v and gate, up apart where it has them so.

A linear is `<name>.weight` (codes: uint8 [N, ceil(K / 2)] with two a byte, or int8 [N, K]), `<name>.weight_scale`
(float32 [N]) and `<name>.bias` (float32 [N]). Quantizers keep the names that they have in the model, and so do the
prefix's keys and values. The gains of the norms went into the linears, and stand there as tensors without elements:
a transformers that does not know this format stops at their shape instead of computing nonsense.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from pq_ao.families import DecoderFamily, family_of, head_dim_of
from pq_ao.tensors import PackedWeight


class FusedLinear(NamedTuple):
    """A linear of a decoder layer at run time, and the original ones whose rows it holds.

    Attributes:
        name: at run time, inside the layer.
        parts: original names inside the layer.
        rows: of each part.
    """

    name: str
    parts: tuple[str, ...]
    rows: tuple[int, ...]


def fused_linears(family: DecoderFamily, config: PretrainedConfig) -> tuple[FusedLinear, ...]:
    """The four linears of a decoder layer."""
    head_dim = head_dim_of(config)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    qkv, gate_up = tuple(count * head_dim for count in heads), (config.intermediate_size,) * 2
    return (
        FusedLinear(f"{family.attention}.qkv_proj", family.qkv, qkv if len(family.qkv) > 1 else (sum(qkv),)),
        FusedLinear(f"{family.attention}.o_proj", (family.output,), (config.hidden_size,)),
        FusedLinear(
            f"{family.mlp}.gate_up_proj", family.gate_up, gate_up if len(family.gate_up) > 1 else (sum(gate_up),)
        ),
        FusedLinear(f"{family.mlp}.down_proj", (family.down,), (config.hidden_size,)),
    )


def renamed_norms(family: DecoderFamily) -> dict[str, str]:
    """Run-time name of each norm on the heads to its original one, inside a layer; empty where there are none."""
    if family.query_norm is None:
        return {}
    return {f"{family.attention}.query_norm": family.query_norm, f"{family.attention}.key_norm": family.key_norm}


def stored_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """All tensors of a quantized model as they are written: plain, each with memory of its own, in a fixed order.

    Parts of fused linears are copies; everything else is the model's own tensor.
    """
    family = family_of(model)
    state: dict[str, Tensor] = dict(model.state_dict())
    layers = model.get_submodule(family.layers)
    for index in range(len(layers)):
        layer = f"{family.layers}.{index}."
        for fused in fused_linears(family, model.config):
            weight: PackedWeight = state.pop(f"{layer}{fused.name}.weight")
            bias = state.pop(f"{layer}{fused.name}.bias")
            stored = {"weight": weight.qdata, "weight_scale": weight.scale, "bias": bias}
            for kind, tensor in stored.items():
                for part, rows in zip(fused.parts, tensor.split(fused.rows), strict=True):
                    state[f"{layer}{part}.{kind}"] = rows if len(fused.parts) == 1 else rows.clone()
        for name, original in renamed_norms(family).items():
            state[f"{layer}{original}.weight"] = state.pop(f"{layer}{name}.weight")
        for norm in (family.attention_norm, family.mlp_norm):
            state[f"{layer}{norm}.weight"] = torch.empty(0)
    head = state[f"{family.head}.weight"]
    if isinstance(head, PackedWeight):
        state[f"{family.head}.weight"], state[f"{family.head}.weight_scale"] = head.qdata, head.scale
    return in_order(state)


def in_order(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layer 2 before layer 10, as transformers sorts when it saves a model that it loaded: shards hang on the order."""
    return dict(sorted(tensors.items(), key=lambda item: _key(item[0])))


def _key(name: str) -> list[tuple]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
