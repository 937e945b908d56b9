"""What the tests of checkpoints share: tiny quantized models, made without calibration, and what makes two equal."""

import torch
from transformers import PreTrainedModel

import pq_ao
from pq_ao.tensors import PackedWeight
from tests.decoders import tiny_config

IDS = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(0))


def tiny(
    family: str = "llama", scheme="w4a4kv4", *, seed: int = 0, dtype=torch.float32, prefix_tokens: int = 2, **overrides
) -> PreTrainedModel:
    """A quantized decoder of two layers with random codes; what follows `prefix_tokens` goes to its config."""
    return pq_ao.random_quantized_decoder(
        tiny_config(family, **overrides), scheme, device="cpu", dtype=dtype, seed=seed, prefix_tokens=prefix_tokens
    )


def tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by name, packed ones as what they hold."""
    found = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, PackedWeight):
            found |= {f"{name}.qdata": tensor.qdata, f"{name}.scale": tensor.scale}
        else:
            found[name] = tensor.detach()
    return found


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """Of a fixed batch, without a cache."""
    return model(IDS, use_cache=False).logits


def assert_same_model(got: PreTrainedModel, expected: PreTrainedModel) -> None:
    """The same class, integers, scales and dtypes, and bitwise the same logits."""
    assert type(got) is type(expected) and got.dtype == expected.dtype
    ours, theirs = tensors(got), tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    assert {name: type(module) for name, module in got.named_modules()} == {
        name: type(module) for name, module in expected.named_modules()
    }
    assert not any(parameter.requires_grad for parameter in got.parameters()) and not got.training
    assert torch.equal(logits(got), logits(expected))
