"""What fine-tuning trains of a decoder block, and the block computed from it.

Everything is trained in units of its own, so that one pair of learning rates serves every layer of every model: weights
in quantization steps, scales and clip factors by their logarithm, biases in parts of what their linear puts out.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pq_ao.fake_quantize import fake_quantize
from pq_ao.linears import CalibratedLinear
from pq_ao.modules import PrefixAttention, angle_zero
from pq_ao.ops.quantize import quantize
from pq_ao.quantizers import ActivationQuantizer, KVQuantizer, Path
from pq_ao.rounding import RoundedWeight
from pq_ao.tensors import PackedWeight

Tensors = dict[str, Tensor]

_ASIDE = 0.45  # of a quantization step, from the code towards the next one


class BlockTensors(NamedTuple):
    """The tensors of one block, by name.

    Attributes:
        fixed: parameters and buffers of the block, codes left out; scales and clip factors as training found them.
        start: of each linear "<name>.scale" [N], "<name>.bias" [N] and the unit of its bias, "<name>.bias_unit" [N];
            where codes are not trained, "<name>.codes" int8 [N, K]; where the prefix is, the unit of its keys or
            values, "<name>_unit" [G, 1, 1].
        trained: leaves; of each linear "<name>.weight" [N, K] where codes are trained, "<name>.scale" [N] and
            "<name>.bias" [N], each scale or clip factor of a quantizer, and the prefix's keys and values [G, P, D]
            where they are trained.
        turns_heads: whether the block has RoPE.
    """

    fixed: Tensors
    start: Tensors
    trained: Tensors
    turns_heads: bool


def linears_of(block: nn.Module) -> dict[str, CalibratedLinear]:
    """The linears of a block by name."""
    return {name: module for name, module in block.named_modules() if isinstance(module, CalibratedLinear)}


def _attention_of(block: nn.Module) -> tuple[str, PrefixAttention]:
    return next((name, module) for name, module in block.named_modules() if isinstance(module, PrefixAttention))


def prefix_of(block: nn.Module) -> list[str]:
    """Names of the prefix's keys and values in a block."""
    name, _ = _attention_of(block)
    return [f"{name}.{part}" for part in ("prefix_k", "prefix_v")]


def _quantizers_of(block: nn.Module) -> dict[str, ActivationQuantizer | KVQuantizer]:
    return {name: m for name, m in block.named_modules() if isinstance(m, ActivationQuantizer | KVQuantizer)}


class BlockFrame:
    """A copy of one block, in which any block of the same decoder is computed from its `BlockTensors`.

    So all blocks are one function of tensors, and can share one compiled step.

    Args:
        block: with our modules, in float32.
    """

    def __init__(self, block: nn.Module):
        self.block = copy.deepcopy(block)
        quantizers = _quantizers_of(self.block)
        names = {id(quantizer): name for name, quantizer in quantizers.items()}
        self.sites = {name: names[id(linear.quantizers[0])] for name, linear in linears_of(self.block).items()}
        self.factors = [
            f"{name}.{factor}"
            for name, quantizer in quantizers.items()
            for factor, _ in quantizer.named_buffers()
            if factor.endswith(("scale", "clip"))
        ]
        self.prefix = prefix_of(self.block)
        _attention_of(self.block)[1].turns_heads = True  # by angle zero where a block has no RoPE
        for linear in linears_of(self.block).values():  # a place for a bias, whether or not the model has one
            linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
        for quantizer in quantizers.values():
            quantizer.path = Path.REFERENCE

    def tensors(self, block: nn.Module, rounded: dict[str, RoundedWeight]) -> BlockTensors:
        """The tensors of a block that was just rounded.

        Args:
            rounded: of each linear, by name.
        """
        found = self._tensors(block, {name: weight.output_rms for name, weight in rounded.items()})
        weights = {f"{name}.weight": weight.weight / weight.scale[:, None] for name, weight in rounded.items()}
        return found._replace(trained=_leaves(weights | found.trained))

    def tensors_of_codes(
        self, block: nn.Module, bias_units: Tensors, prefix_units: Tensors, train_codes: bool = False
    ) -> BlockTensors:
        """The tensors of a calibrated block in any dtype.

        Args:
            bias_units: float32 [N] of each linear, by name.
            prefix_units: float32 [G, 1, 1] of the prefix's keys and values, by name; empty where they are not trained.
            train_codes: training may change the codes. They are where it begins, each weight as near to its value in
                floating point as its code allows: those that were rounded far may change first.
        """
        found, linears = self._tensors(block, bias_units), linears_of(block)
        start, trained = found.start, found.trained
        for name, unit in prefix_units.items():
            start[f"{name}_unit"], trained[name] = unit, torch.zeros_like(found.fixed[name])
        if train_codes:
            trained |= {f"{name}.weight": _leaning(linear) for name, linear in linears.items()}
        else:
            start |= {f"{name}.codes": linear.packed.codes() for name, linear in linears.items()}
        return found._replace(trained=_leaves(trained))

    def _tensors(self, block: nn.Module, bias_units: Tensors) -> BlockTensors:
        fixed = {name: tensor.detach() for name, tensor in (*block.named_parameters(), *block.named_buffers())}
        start, trained = {}, {}
        for name, linear in linears_of(block).items():
            for unused in ("weight", "bias", "packed", "packed_bias"):
                fixed.pop(f"{name}.{unused}", None)
            start |= {f"{name}.scale": linear.packed.scale, f"{name}.bias": linear.packed_bias}
            start[f"{name}.bias_unit"] = bias_units[name]
            trained |= {f"{name}.{part}": torch.zeros_like(linear.packed_bias) for part in ("scale", "bias")}
        # the frame computes in float32, whatever the block does
        fixed = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in fixed.items()}
        for name in self.factors:
            fixed[name] = fixed[name].clone()  # the block's own will be overwritten
            trained[name] = torch.zeros_like(fixed[name])
        return BlockTensors(fixed, start, trained, _attention_of(block)[1].turns_heads)

    def outputs(self, tensors: BlockTensors, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """[n, T, d] of hidden states [n, T, d], quantized, causally; differentiable in `tensors.trained`."""
        fixed, trained = tensors.fixed, tensors.trained
        values = fixed | {name: fixed[name] * trained[name].exp() for name in self.factors}
        values |= {name: self._prefix(tensors, name) for name in self.prefix}
        for name, site in self.sites.items():
            scale, bias = self._scale(tensors, name), self._bias(tensors, name)
            if f"{name}.codes" in tensors.start:
                weight = tensors.start[f"{name}.codes"] * scale[:, None]
            else:
                weight = fake_quantize(self._weight(tensors, name), scale[:, None], self._bits(name))
            # the input comes with its shift, whose part in the product stands in the bias
            bias = bias - (weight * fixed[f"{site}.shift"]).sum(dim=1)
            values |= {f"{name}.weight": weight, f"{name}.bias": bias}
        angles = position_embeddings if tensors.turns_heads else angle_zero(position_embeddings)
        arguments = {"attention_mask": None, "position_embeddings": angles}
        return functional_call(self.block, values, (hidden,), arguments)

    @torch.no_grad()
    def store(self, tensors: BlockTensors, block: nn.Module) -> None:
        """Gives `block` the codes, scales, clip factors, biases and prefix that were trained."""
        for name in self.factors:
            module, _, factor = name.rpartition(".")
            block.get_submodule(module).get_buffer(factor).copy_(tensors.fixed[name] * tensors.trained[name].exp())
        for name in self.prefix:
            if name in tensors.trained:
                module, _, part = name.rpartition(".")
                attention = block.get_submodule(module)
                setattr(attention, part, self._prefix(tensors, name).to(attention.fixed_dtype))
        for name, linear in linears_of(block).items():
            scale, bits = self._scale(tensors, name), self._bits(name)
            codes = tensors.start.get(f"{name}.codes")
            if codes is None:
                codes = quantize(self._weight(tensors, name), scale[:, None], bits)
            linear.packed = PackedWeight.from_codes(codes, scale, bits, linear.fixed_dtype)
            linear.packed_bias = self._bias(tensors, name)

    def _bits(self, name: str) -> int:
        return self.block.get_submodule(name).config.weight_bits

    @staticmethod
    def _prefix(tensors: BlockTensors, name: str) -> Tensor:
        given = tensors.fixed[name]
        return given + tensors.start[f"{name}_unit"] * tensors.trained[name] if name in tensors.trained else given

    @staticmethod
    def _weight(tensors: BlockTensors, name: str) -> Tensor:
        return tensors.trained[f"{name}.weight"] * tensors.start[f"{name}.scale"][:, None]

    @staticmethod
    def _scale(tensors: BlockTensors, name: str) -> Tensor:
        return tensors.start[f"{name}.scale"] * tensors.trained[f"{name}.scale"].exp()

    @staticmethod
    def _bias(tensors: BlockTensors, name: str) -> Tensor:
        start = tensors.start
        return start[f"{name}.bias"] + start[f"{name}.bias_unit"] * tensors.trained[f"{name}.bias"]


def _leaning(linear: CalibratedLinear) -> Tensor:
    """Weights in quantization steps, [N, K], that round to the codes."""
    codes = linear.packed.codes().float()
    aside = linear.weight.float() / linear.packed.scale[:, None] - codes
    return codes + aside.clamp(-_ASIDE, _ASIDE)


def _leaves(tensors: Tensors) -> Tensors:
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}
