"""An INT8 language-model head, weights only: half the bytes of the largest weight that a decoded token reads."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pq_ao.families import family_of, replace_submodule
from pq_ao.linears import KeptLinear
from pq_ao.ops.int8_head import MAX_INNER, int8_head
from pq_ao.tensors import PackedWeight

# rows rounded at once: bounds what is float32 meanwhile
_ROWS = 8192


class Int8Head(KeptLinear):
    """A head with one scale for each row of its weight, a `PackedWeight` of 8 bits; activations keep 16 bits."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., V], in the dtype of x."""
        logits = int8_head(x, self.weight.qdata, self.weight.scale)
        return logits if self.bias is None else logits + self.bias


@torch.no_grad()
def quantize_head_(model: PreTrainedModel) -> PreTrainedModel:
    """Rounds the head of a calibrated or quantized model to INT8, in place.

    Not part of `quantize_`, for every logit hangs on it; the error is that of 8 bits of weight alone (41 dB below
    the logits at 4096 inputs, for weights of a normal distribution).

    Raises:
        ValueError: the model is not calibrated, its head is INT8 already, or has more inputs than sums of products
            of int8 have room for.

    Example::

        quantize_(model, config)
        pq_ao.quantize_head_(model)
    """
    family = family_of(model)
    head = model.get_submodule(family.head)
    if isinstance(head, Int8Head):
        raise ValueError("model: its head is INT8 already; quantize_head_ runs once.")
    if not isinstance(head, KeptLinear):
        raise ValueError(
            "model: not calibrated yet, so head and embedding may be one tensor; call "
            "`pq_ao.calibrate(model, tokenizer, config)` first."
        )
    if head.in_features > MAX_INNER:
        raise ValueError(f"model: its head has {head.in_features} inputs; at most {MAX_INNER} fit 32-bit sums.")
    parts = [_round(rows) for rows in head.weight.split(_ROWS)]
    codes, scale = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    replace_submodule(
        model, family.head, Int8Head(PackedWeight(codes, scale, head.in_features, head.fixed_dtype), head.bias)
    )
    return model


def _round(weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight.float()
    scale = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny * 127) / 127
    return torch.round(weight / scale[:, None]).to(torch.int8), scale
