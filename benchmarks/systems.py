"""The systems that `benchmarks.generation` compares, each behind the same two calls.

A `Loaded` is a model with its cache. Prefill and decode are one function of tokens, `forward`; what differs is the
shape it is compiled for. Only the last token's logits are computed, for every system.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel
from transformers.cache_utils import Cache

from benchmarks.baselines import (
    PEERS,
    AttentionChoice,
    baseline_cache,
    quantize_peer,
    random_llama,
)
from benchmarks.fused_llama import fuse_
from benchmarks.timing import fill_random_, is_cuda

BASELINE = "bf16-compiled"


@dataclass
class Loaded:
    """A model with a cache of fixed addresses.

    Attributes:
        active: what must surround every call.
        options: Inductor's options for this system, on top of those of the mode it is compiled in.
    """

    model: PreTrainedModel
    cache: Cache
    active: AbstractContextManager = field(default_factory=nullcontext)
    options: dict[str, Any] = field(default_factory=dict)

    def forward(self, ids: Tensor) -> Tensor:
        """Tokens [B, L] to the logits [B, V] of the last one; appends to the cache."""
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]

    def set_length(self, tokens: int) -> None:
        """Lets the cache hold `tokens` tokens; what stands in its slots stays."""
        for length in {id(layer.cumulative_length): layer.cumulative_length for layer in self.cache.layers}.values():
            length.fill_(tokens)

    def fill(self) -> None:
        """Random keys and values in all slots, instead of a long prefill."""
        for layer in self.cache.layers:
            for name in ("keys", "values"):
                fill_random_(getattr(layer, name))
            for name in ("key_scale", "value_scale"):
                scale = getattr(layer, name, None)
                if scale is not None:
                    scale.uniform_(0.1, 0.3)


@dataclass(frozen=True)
class Shape:
    """One group of rows: a phase at one batch and context.

    Attributes:
        phase: "decode" or "prefill".
        context: tokens of the prompt (prefill), or attended to by the last timed step (decode).
    """

    phase: str
    batch: int
    context: int

    def __str__(self) -> str:
        context = f"{self.context // 1024}k" if self.context % 1024 == 0 else str(self.context)
        return f"{self.phase}-{self.batch}x{context}"


@dataclass(frozen=True)
class Settings:
    """How systems are built.

    Attributes:
        recommended: let torchao set Inductor's options as it recommends.
        fused_baseline: join the projections of the compiled bf16 model, see `benchmarks.fused_llama`.
    """

    recommended: bool = True
    fused_baseline: bool = False


@dataclass(frozen=True)
class System:
    """One line of the comparison.

    Attributes:
        name: as the results call it.
        head: "bf16" or "int8".
        weight_bits, kv_bits: of the blocks' linears and of the cache.
        build: (config, shape, device, attention, `Settings`) to a `Loaded`.
        compiled: False for eager execution.
        phases: that it is measured in; the head hardly counts in prefill.
    """

    name: str
    build: Callable[[LlamaConfig, Shape, Any, AttentionChoice, Settings], Loaded]
    weight_bits: int = 16
    kv_bits: int = 16
    head: str = "bf16"
    compiled: bool = True
    phases: tuple[str, ...] = ("decode", "prefill")

    @property
    def label(self) -> str:
        """Name on the command line."""
        return self.name if self.head == "bf16" else f"{self.name}-{self.head}-head"


def _bf16(config, shape: Shape, device, attention: AttentionChoice, settings: Settings) -> Loaded:
    model = random_llama(config, attention.implementation, device)
    return Loaded(model, baseline_cache(config, shape.batch, shape.context, device), attention.active())


def _baseline(config, shape: Shape, device, attention: AttentionChoice, settings: Settings) -> Loaded:
    loaded = _bf16(config, shape, device, attention, settings)
    if settings.fused_baseline:
        fuse_(loaded.model)
    return loaded


def _peer(name: str) -> Callable[..., Loaded]:
    def build(config, shape, device, attention, settings) -> Loaded:
        loaded = _bf16(config, shape, device, attention, settings)
        quantize_peer(loaded.model, name, settings.recommended)
        return loaded

    return build


def _ours(mode: str, head: str = "bf16") -> Callable[..., Loaded]:
    def build(config, shape, device, attention, settings) -> Loaded:
        import pq_ao

        # dynamic mode as QuaRot has it: rotation, a scale for each token, no prefix
        prefix = mode == "static"
        scheme = pq_ao.prefixquant_config("w4a4kv4", mode=mode, prefix=prefix)
        model = pq_ao.random_quantized_decoder(config, scheme, prefix_tokens=int(prefix), device=device)
        if head == "int8":
            pq_ao.quantize_head_(model)
        tokens = shape.batch * (shape.context if shape.phase == "prefill" else 1)
        options = pq_ao.recommended_compile_options(device, tokens).get("options", {})
        return Loaded(model, pq_ao.PrefixStaticCache(model, shape.batch, shape.context), options=options)

    return build


# in the order of measuring: should time run out, what matters most is there
SYSTEMS: tuple[System, ...] = (
    System(BASELINE, _baseline),
    System("pq_ao-static", _ours("static"), 4, 4),
    System("pq_ao-static", _ours("static", "int8"), 4, 4, head="int8", phases=("decode",)),
    System("pq_ao-dynamic", _ours("dynamic"), 4, 4),
    *(System(name, _peer(name), bits) for name, (_, bits) in PEERS.items()),
    System("bf16-eager", _bf16, compiled=False),
)


def step_bytes(config: LlamaConfig, system: System, batch: int, context: int) -> float:
    """Bytes that one decode step must move at least: linears and head once, the cache of every sequence once.

    Scales, activations and logits are left out; they are under a percent.
    """
    hidden, head_dim = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    linears = hidden * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden * config.intermediate_size
    cached = 2 * batch * context * kv_heads * head_dim
    head_bits = 8 if system.head == "int8" else 16
    bits = config.num_hidden_layers * (linears * system.weight_bits + cached * system.kv_bits)
    return (bits + hidden * config.vocab_size * head_bits) / 8


class CapturedStep:
    """A step behind a CUDA graph of its own; called with new tokens, it copies them in and replays.

    Args:
        step: compiled, and called often enough not to compile any more.
    """

    def __init__(self, step: Callable[[Tensor], Tensor], ids: Tensor):
        self.ids = ids.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = step(self.ids)

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits; the next call overwrites them."""
        self.ids.copy_(ids)
        self.graph.replay()
        return self.logits


# ways to compile: mode of torch.compile, and whether a CUDA graph is captured by hand around the result
MODES: dict[str, tuple[str | None, bool]] = {
    "eager": (None, False),
    "default": ("default", False),
    "reduce-overhead": ("reduce-overhead", False),
    "max-autotune": ("max-autotune", False),
    "max-autotune-no-cudagraphs": ("max-autotune-no-cudagraphs", False),
    "default+graph": ("default", True),
    "max-autotune+graph": ("max-autotune-no-cudagraphs", True),
}


def compiled_step(loaded: Loaded, ids: Tensor, mode: str, backend: str, length: int) -> Callable[[], Tensor]:
    """`loaded.forward` on `ids`, compiled as one graph and warmed up, as a call without arguments.

    Args:
        mode: a key of `MODES`.
        backend: of torch.compile; "inductor" on a GPU.
        length: tokens in the cache while warming up; room for two steps must be left.
    """
    compile_mode, graph = MODES[mode]
    step = loaded.forward
    if mode != "eager":
        options = {"backend": backend}
        if backend == "inductor":
            options["options"] = torch._inductor.list_mode_options(compile_mode) | loaded.options
        step = torch.compile(loaded.forward, fullgraph=True, dynamic=False, **options)

    def marked() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return step(ids)

    loaded.set_length(length)
    marked()
    if is_cuda(ids.device):
        torch.cuda.synchronize(ids.device)
        # compiling measures kernels on copies of their arguments; what follows is what a step needs. CUDA graphs are
        # recorded in the second call, and allocate there
        torch.cuda.reset_peak_memory_stats(ids.device)
    loaded.set_length(length)
    if graph and is_cuda(ids.device):
        marked()
        loaded.set_length(length)
        captured = CapturedStep(step, ids)
        return lambda: captured(ids)
    for _ in range(2):
        marked()
        if ids.shape[1] > 1:
            loaded.set_length(length)
    return marked
