"""What the quantized decoder is compared with: a strong bf16 decoder, and torchao's own quantizations of it.

The bf16 decoder is transformers' own Llama with three things changed, because stock code loses time there: the static
cache hands attention the layer itself, so that prefill attends to the step's own keys and decode to the cache;
attention neither repeats keys and values for the query heads nor reads a mask; and the head gets the last tokens of a
prompt as dense rows, for it would read its weight once a sequence otherwise. It serves batches without padding only.

Shape suffixes: B batch, L queries, S slots, H heads, G KV heads, D head dim.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, StaticLayer

from benchmarks.timing import is_cuda, launch_us, rotation

SDPA_NAME, CACHE_ATTENTION_NAME = "benchmark-sdpa", "benchmark-cache-attention"


def llama_3_8b(layers: int = 32) -> LlamaConfig:
    """The shape of Llama-3-8B."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )


def tiny_llama(layers: int = 4) -> LlamaConfig:
    """A decoder to try the benchmark with, where there is no GPU."""
    return LlamaConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )


MODELS: dict[str, Callable[..., LlamaConfig]] = {"llama-3-8b": llama_3_8b, "tiny": tiny_llama}


def random_llama(config: LlamaConfig, implementation: str, device: str | torch.device) -> PreTrainedModel:
    """A decoder in bf16 with random weights (std 0.02), made on `device` at once."""
    torch.manual_seed(0)
    config = copy.deepcopy(config)  # the model keeps it, with the name of its attention
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=implementation)
    model.lm_head.register_forward_pre_hook(lambda head, args: (args[0].contiguous(),))
    return model.eval().requires_grad_(False)


class BaselineLayer(StaticLayer):
    """A static layer that hands out the step's own keys and values, and itself, for attention to choose from.

    Args:
        capacity: tokens.
        length, start: int64 of no dimension, tokens held after and before a step. All layers share them, so that a
            step does not compute them once a layer; the first one counts.
    """

    def __init__(self, capacity: int, length: Tensor, start: Tensor, is_first: bool):
        super().__init__(capacity)
        self.cumulative_length, self.start, self.is_first = length, start, is_first

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[tuple, tuple]:
        """Stores [B, G, L, D] in place."""
        length = key_states.shape[2]
        if self.is_first:
            self.start.copy_(self.cumulative_length)
            self.cumulative_length.add_(length)
        slots = torch.arange(length, device=self.device) + self.start
        self.keys.index_copy_(2, slots, key_states)
        self.values.index_copy_(2, slots, value_states)
        return (key_states, self), (value_states, self)


def baseline_cache(config: LlamaConfig, batch: int, capacity: int, device: str | torch.device) -> Cache:
    """A bf16 cache of fixed addresses for `capacity` tokens."""
    length, start = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
    torch._dynamo.mark_static_address(start)
    layers = [BaselineLayer(capacity, length, start, index == 0) for index in range(config.num_hidden_layers)]
    nothing = torch.empty(batch, config.num_key_value_heads, 0, config.head_dim, dtype=torch.bfloat16, device=device)
    for layer in layers:
        layer.lazy_initialization(nothing, nothing)
    return Cache(layers=layers)


def _causal_sdpa(query_BHLD: Tensor, key_BGLD: Tensor, value_BGLD: Tensor, scaling: float) -> Tensor:
    return F.scaled_dot_product_attention(
        query_BHLD, key_BGLD, value_BGLD, is_causal=True, scale=scaling, enable_gqa=True
    )


def _sdpa(module, query, key, value, attention_mask, scaling, **kwargs) -> tuple[Tensor, None]:
    (step_keys, layer), (step_values, _) = key, value
    if query.shape[2] > 1:
        out = _causal_sdpa(query, step_keys, step_values, scaling)
    else:
        # no mask: every slot is seen. True at the last of the timed steps, when the cache is full; up to then
        # a few slots of random content are read early
        out = F.scaled_dot_product_attention(query, layer.keys, layer.values, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def float_cache_attention(query_BLHD: Tensor, keys: Tensor, values: Tensor, start: Tensor, scaling: float) -> Tensor:
    """Flash-decode over a bf16 cache's true length: our own op without prefix, scales and shifts.

    Args:
        keys, values: [B, G, S, D].
        start: int64 0-dim, tokens held before this step.

    Returns:
        [B, L, H, D] in the query's dtype.
    """
    from pq_ao.ops.cache_attention import cache_attention

    none = keys.new_empty(keys.shape[1], 0, keys.shape[3])
    out = cache_attention(
        query_BLHD, keys, values, None, None, None, None, none, none, start, None, scaling, None, None, 4, torch.int8
    )
    return out.view(query_BLHD.shape).to(query_BLHD.dtype)


def _cache_attention(module, query, key, value, attention_mask, scaling, **kwargs) -> tuple[Tensor, None]:
    if query.shape[2] > 1:
        return _sdpa(module, query, key, value, attention_mask, scaling)
    layer = key[1]
    out = float_cache_attention(query.transpose(1, 2).contiguous(), layer.keys, layer.values, layer.start, scaling)
    return out, None


def _no_mask(*args, attention_mask: Tensor | None = None, **kwargs) -> None:
    if attention_mask is not None:
        raise ValueError("attention_mask: the benchmark's attention serves batches without padding; pass None.")


for _name, _function in ((SDPA_NAME, _sdpa), (CACHE_ATTENTION_NAME, _cache_attention)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, _no_mask)


@dataclass(frozen=True)
class AttentionChoice:
    """An attention for the baseline.

    Attributes:
        name: for the results.
        implementation: its name in the registry of transformers.
        backend: of scaled_dot_product_attention; None leaves PyTorch the choice.
        us: measured, at the shape it was chosen for.
    """

    name: str
    implementation: str = SDPA_NAME
    backend: SDPBackend | None = None
    us: float | None = None

    def active(self) -> AbstractContextManager:
        """Must surround the first call, in which a compiled model is traced."""
        return nullcontext() if self.backend is None else sdpa_kernel([self.backend])


def attention_choices(decode: bool, device: str | torch.device) -> list[AttentionChoice]:
    """What to try."""
    if not is_cuda(device):
        return [AttentionChoice("sdpa")]  # the others are too slow there, or are not there
    choices = [
        AttentionChoice("sdpa-flash", backend=SDPBackend.FLASH_ATTENTION),
        AttentionChoice("sdpa-cudnn", backend=SDPBackend.CUDNN_ATTENTION),
    ]
    if decode:
        choices.append(AttentionChoice("cache_attention", CACHE_ATTENTION_NAME))
    return choices


def time_attention(
    choice: AttentionChoice, heads: int, kv_heads: int, head_dim: int, batch: int, context: int, decode: bool, device
) -> float:
    """Microseconds of one layer's bf16 attention, by CUDA graph, over buffers that L2 does not hold.

    Args:
        decode: one query a sequence against `context` tokens; otherwise causal attention of `context` tokens.
    """
    queries = 1 if decode else context
    scaling = head_dim**-0.5

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=device)

    start = torch.tensor(context - 1, device=device)
    launches = []
    nbytes = 2 * 2 * batch * context * (kv_heads + (0 if decode else heads)) * head_dim
    for _ in range(rotation(nbytes, device)):
        query = random(batch, heads, queries, head_dim)
        key, value = (random(batch, kv_heads, context, head_dim) for _ in range(2))
        if not decode:
            run = lambda q=query, k=key, v=value: _causal_sdpa(q, k, v, scaling)  # noqa: E731
        elif choice.implementation == CACHE_ATTENTION_NAME:
            query = query.transpose(1, 2).contiguous()
            run = lambda q=query, k=key, v=value: float_cache_attention(q, k, v, start, scaling)  # noqa: E731
        else:
            run = lambda q=query, k=key, v=value: F.scaled_dot_product_attention(  # noqa: E731
                q, k, v, scale=scaling, enable_gqa=True
            )
        launches.append(run)
    with choice.active():
        return launch_us(launches, device)


def best_attention(
    heads: int, kv_heads: int, head_dim: int, batch: int, context: int, decode: bool, device
) -> AttentionChoice:
    """The fastest attention at this shape; the others, and why one failed, are printed.

    Raises:
        RuntimeError: none works.
    """
    measured = []
    for choice in attention_choices(decode, device):
        try:
            us = time_attention(choice, heads, kv_heads, head_dim, batch, context, decode, device)
        except Exception as error:  # what a backend cannot do is for it to say
            print(f"  attention {choice.name}: {type(error).__name__}: {str(error).splitlines()[0][:120]}", flush=True)
            continue
        print(f"  attention {choice.name}: {us:.1f} us", flush=True)
        measured.append(AttentionChoice(choice.name, choice.implementation, choice.backend, us))
    if not measured:
        raise RuntimeError(f"no attention works for batch {batch} x {context} on {device}")
    return min(measured, key=lambda choice: choice.us)


def _float8dq(recommended: bool):
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=recommended)


def _int4wo(recommended: bool):
    from torchao.quantization import Int4WeightOnlyConfig

    return Int4WeightOnlyConfig(
        group_size=128, int4_packing_format="tile_packed_to_4d", set_inductor_config=recommended
    )


def _int8dq(recommended: bool):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig(set_inductor_config=recommended)


# torchao's config of each peer, and the bits of its weights
PEERS = {"torchao-float8dq": (_float8dq, 8), "torchao-int4wo": (_int4wo, 4), "torchao-int8dq": (_int8dq, 8)}


def quantize_peer(model: nn.Module, name: str, recommended: bool) -> None:
    """Quantizes the linears of the blocks with torchao, in place; the head stays in bf16, as in all systems.

    Args:
        name: one of `PEERS`.
        recommended: let torchao set Inductor's options as it likes them, see `inductor_settings`.
    """
    from torchao.quantization import quantize_

    quantize_(
        model,
        PEERS[name][0](recommended),
        filter_fn=lambda module, path: isinstance(module, nn.Linear) and "lm_head" not in path,
    )


@contextmanager
def inductor_settings() -> Iterator[None]:
    """Puts Inductor's global options back behind a peer: torchao's configs change them for the whole process."""
    from torch._inductor import config

    before, precision = config.get_config_copy(), torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        config.load_config(before)
        torch.set_float32_matmul_precision(precision)
