"""Norm fusion and the rotations R1 to R4, and the exchange of a decoder's modules for ours.

Arithmetic is float64 for each weight, cast once at the end. Row-vector convention: a linear computes x W^T.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from pq_ao.attention import ATTENTION_NAME
from pq_ao.config import PrefixQuantConfig
from pq_ao.families import (
    DecoderFamily,
    Multipliers,
    family_of,
    forget_multipliers,
    head_dim_of,
    replace_submodule,
)
from pq_ao.hadamard import hadamard_transform, random_signs, randomized_hadamard
from pq_ao.linears import CalibratedLinear, KeptEmbedding, KeptLinear
from pq_ao.modules import FinalRMSNorm, PrefixAttention, PrefixMLP, PrefixRMSNorm
from pq_ao.quantizers import KVQuantizer, activation_quantizers


@dataclass(frozen=True)
class Rotation:
    """The offline rotations as signs of randomised Hadamards; without rotation every method returns its input.

    Attributes:
        residual_signs: float64 [d] of R1, or None.
        value_signs: float64 [D] of R2, the same for all heads and layers, or None.
    """

    residual_signs: Tensor | None
    value_signs: Tensor | None

    @classmethod
    def random(cls, hidden_size: int, head_dim: int, seed: int, device: torch.device) -> "Rotation":
        """R1 and R2 drawn from `seed`, alike on every device."""
        generator = torch.Generator().manual_seed(seed)
        residual, value = (random_signs(n, generator).to(device) for n in (hidden_size, head_dim))
        return cls(residual, value)

    @property
    def online(self) -> bool:
        """Whether R3 and R4 run online."""
        return self.residual_signs is not None

    def reads_residual(self, weight: Tensor) -> Tensor:
        """W R1, for embedding rows and for what reads the residual stream."""
        return randomized_hadamard(weight, self.residual_signs) if self.online else weight

    def writes_residual(self, weight: Tensor) -> Tensor:
        """R1^T W, or R1^T b for a bias: for what writes to the residual stream."""
        if not self.online:
            return weight
        return self.reads_residual(weight) if weight.ndim == 1 else self.reads_residual(weight.T).T

    def writes_value(self, weight: Tensor) -> Tensor:
        """R2^T on each head of the value projection, weight [G D, d] or bias [G D]."""
        if not self.online:
            return weight
        heads = weight.view(-1, self.value_signs.numel(), *weight.shape[1:])
        return randomized_hadamard(heads.transpose(1, -1), self.value_signs).transpose(1, -1).reshape(weight.shape)

    def reads_value(self, weight: Tensor) -> Tensor:
        """R2 on each head's columns of the output projection, [d, H D]."""
        if not self.online:
            return weight
        heads = weight.view(weight.shape[0], -1, self.value_signs.numel())
        return randomized_hadamard(heads, self.value_signs).reshape(weight.shape)

    def reads_down(self, weight: Tensor) -> Tensor:
        """W_down R4^T, undone online by the same transform of the data."""
        return hadamard_transform(weight) if self.online else weight


def _wide(linear: nn.Linear, name: str) -> tuple[Tensor, Tensor | None]:
    weight = linear.weight.detach().double()
    bias = None if linear.bias is None else linear.bias.detach().double()
    if not torch.isfinite(weight).all() or (bias is not None and not torch.isfinite(bias).all()):
        raise ValueError(f"model: {name} holds NaN or Inf; repair the checkpoint before calibrating.")
    return weight, bias


def check_weights(model: PreTrainedModel) -> None:
    """Raises ValueError where a parameter holds NaN or Inf: before anything of the model is changed."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"model: {name} holds NaN or Inf; repair the checkpoint before calibrating.")


def _join(biases: tuple[Tensor | None, ...], weights: tuple[Tensor, ...]) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    return torch.cat(
        [
            weight.new_zeros(weight.shape[0]) if bias is None else bias
            for bias, weight in zip(biases, weights, strict=True)
        ]
    )


class BlockRotator:
    """Rotates the decoder blocks of one model and puts our modules in place, one block at a time.

    Args:
        family: names of the parts.
        model_config: the model's own config.
        config: what the quantizers of the new modules will be.
        rotation: R1 and R2.
        multipliers: of the model; that of the residual stream goes into the weights that write to it.
        dtype: of the rotated weights.
    """

    def __init__(
        self,
        family: DecoderFamily,
        model_config,
        config: PrefixQuantConfig,
        rotation: Rotation,
        multipliers: Multipliers,
        dtype: torch.dtype,
    ):
        self.family, self.model_config, self.config = family, model_config, config
        self.rotation, self.multipliers, self.dtype = rotation, multipliers, dtype

    @torch.no_grad()
    def replace(self, layer: nn.Module, layer_idx: int) -> None:
        """Exchanges norms, attention and MLP of `layer`."""
        family, rotation = self.family, self.rotation
        device = layer.get_submodule(family.down).weight.device
        inputs_of = (family.qkv[0], family.output, family.gate_up[0], family.down)
        widths = (layer.get_submodule(name).in_features for name in inputs_of)
        attn_in, o_in, mlp_in, down_in = activation_quantizers(self.config, widths, device)
        head_dim = head_dim_of(self.model_config)
        kv = KVQuantizer(self.config, self.model_config.num_key_value_heads, head_dim, device)

        norm = layer.get_submodule(family.attention_norm)
        weight, bias = self._fused(layer, family.qkv)
        weight = rotation.reads_residual(weight * norm.weight.double())
        for tensor in (weight, bias):
            if tensor is not None:
                values = tensor[-self.model_config.num_key_value_heads * head_dim :]
                values.copy_(rotation.writes_value(values))
        qkv = self._calibrated(weight, bias, (attn_in, kv))

        weight, bias = self._writes_residual(layer, family.output)
        output = self._calibrated(rotation.reads_value(weight), bias, (o_in,))
        attention = PrefixAttention(
            self.model_config,
            layer_idx,
            head_dim,
            qkv,
            output,
            o_in,
            kv,
            rotation.online,
            layer.get_submodule(family.query_norm) if family.query_norm else None,
            layer.get_submodule(family.key_norm) if family.key_norm else None,
        )

        mlp_norm = layer.get_submodule(family.mlp_norm)
        weight, bias = self._fused(layer, family.gate_up)
        gate_up = self._calibrated(rotation.reads_residual(weight * mlp_norm.weight.double()), bias, (mlp_in,))
        weight, bias = self._writes_residual(layer, family.down)
        down = self._calibrated(rotation.reads_down(weight), bias, (down_in,))
        mlp = PrefixMLP(gate_up, down, down_in, ACT2FN[self.model_config.hidden_act], rotation.online)

        eps = self.model_config.rms_norm_eps
        replace_submodule(layer, family.attention_norm, PrefixRMSNorm(eps, attn_in))
        replace_submodule(layer, family.mlp_norm, PrefixRMSNorm(eps, mlp_in))
        replace_submodule(layer, family.attention, attention)
        replace_submodule(layer, family.mlp, mlp)
        forget_multipliers(layer, self.model_config)

    def _fused(self, layer: nn.Module, parts: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
        weights, biases = zip(*(_wide(layer.get_submodule(name), name) for name in parts), strict=True)
        return torch.cat(weights), _join(biases, weights)

    def _writes_residual(self, layer: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
        weight, bias = _wide(layer.get_submodule(name), name)
        written = (
            tensor if tensor is None else self.rotation.writes_residual(tensor * self.multipliers.residual)
            for tensor in (weight, bias)
        )
        return tuple(written)

    def _calibrated(self, weight: Tensor, bias: Tensor | None, quantizers: tuple) -> CalibratedLinear:
        weight = weight.to(self.dtype).contiguous()
        bias = None if bias is None else bias.to(self.dtype)
        return CalibratedLinear(weight, bias, self.config, quantizers)


@torch.no_grad()
def begin_rotation(
    model: PreTrainedModel, config: PrefixQuantConfig, *, seed: int = 0, block_dtype: torch.dtype | None = None
) -> BlockRotator:
    """Rotates what stands around the decoder blocks, in place, and returns what rotates the blocks.

    Embedding and head are untied: one becomes E R1, the other E diag(gamma) R1. The model computes nonsense until every
    block was replaced.

    Args and errors: see `rotate_`.
    """
    family = family_of(model)
    if any(isinstance(module, PrefixAttention) for module in model.modules()):
        raise ValueError("model: was calibrated or rotated before; load the original model again.")
    check_weights(model)
    dtype, device = model.dtype, model.device
    hidden_size, head_dim = model.config.hidden_size, head_dim_of(model.config)
    rotation = Rotation.random(hidden_size, head_dim, seed, device) if config.rotation else Rotation(None, None)

    embedding = model.get_submodule(family.embedding)
    head, head_bias = _wide(model.get_submodule(family.head), family.head)
    final_norm = model.get_submodule(family.final_norm)
    multipliers = Multipliers.of(model.config)
    head = rotation.reads_residual(head * final_norm.weight.double() * multipliers.logits).to(dtype)
    table = rotation.reads_residual(embedding.weight.detach().double() * multipliers.embedding).to(dtype)
    model.config.tie_word_embeddings = False
    model._tied_weights_keys, model.all_tied_weights_keys = None, {}  # or a save would tie them again
    replace_submodule(model, family.embedding, KeptEmbedding(table, embedding.padding_idx))
    head_bias = None if head_bias is None else (head_bias * multipliers.logits).to(dtype)
    replace_submodule(model, family.head, KeptLinear(head, head_bias))
    final_norm.weight.fill_(1)
    replace_submodule(model, family.final_norm, FinalRMSNorm(model.config.rms_norm_eps, final_norm.weight))

    model.set_attn_implementation(ATTENTION_NAME)
    model.requires_grad_(False)
    model.eval()
    forget_multipliers(model, model.config)
    return BlockRotator(family, model.config, config, rotation, multipliers, block_dtype or dtype)


def rotate_(
    model: PreTrainedModel, config: PrefixQuantConfig, *, seed: int = 0, progress: bool = False
) -> PreTrainedModel:
    """Fuses norms, rotates and exchanges the modules of every decoder block, in place; the function stays the same.

    Args:
        model: a decoder of a known family, in floating point.
        config: says whether to rotate, and what the quantizers of the new modules will be.
        seed: draws R1 and R2.
        progress: show a progress bar.

    Raises:
        ValueError: family not supported, NaN or Inf in a weight, or a model that was rotated before.
    """
    rotator = begin_rotation(model, config, seed=seed)
    layers = model.get_submodule(rotator.family.layers)
    for index, layer in enumerate(tqdm(layers, desc="rotating", unit="block", disable=not progress)):
        rotator.replace(layer, index)
    return model
