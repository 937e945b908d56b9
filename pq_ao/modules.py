"""The norm, attention and MLP modules of a calibrated decoder block."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from pq_ao.attention import attend, check_attention, packed_layer
from pq_ao.cache_layer import PrefixStaticLayer
from pq_ao.families import scaling_of, turns_heads
from pq_ao.hadamard import hadamard_base
from pq_ao.linears import CalibratedLinear
from pq_ao.ops import cache_attention, hadamard, rope_store, silu_hadamard
from pq_ao.quantizers import ActivationQuantizer, FixedDtype, KVQuantizer, KVSlots, Path
from pq_ao.tensors import QuantizedActivation


def _normalized(hidden_states: Tensor, eps: float) -> Tensor:
    """float32; sums are in float64, so that they round to the same float32 in any order: eager's and a compiler's."""
    h = hidden_states.float()
    return h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True, dtype=torch.float64).float() + eps)


class FinalRMSNorm(nn.Module):
    """RMSNorm in front of the head, which has its gain.

    Args:
        eps: the model's own rms_norm_eps.
        weight: ones [d]; checkpoints hold it.
    """

    def __init__(self, eps: float, weight: nn.Parameter):
        super().__init__()
        self.eps = eps
        self.weight = weight

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, L, d] in its own dtype."""
        return self.weight * _normalized(hidden_states, self.eps).to(hidden_states.dtype)


class PrefixRMSNorm(nn.Module):
    """RMSNorm whose gain went into the linears behind it; emits the quantized activation that they share.

    Args:
        eps: the model's own rms_norm_eps.
        quantizer: A1 or A3.
    """

    def __init__(self, eps: float, quantizer: ActivationQuantizer):
        super().__init__()
        self.eps = eps
        self.quantizer = quantizer

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, L, d], normalised in float32 and quantized without a rounding between."""
        return self.quantizer(_normalized(hidden_states, self.eps), hidden_states.dtype)


def angle_zero(position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """cos and sin that turn nothing, in the place of RoPE's."""
    cos, sin = position_embeddings
    return torch.ones_like(cos), torch.zeros_like(sin)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class PrefixAttention(FixedDtype):
    """Attention over [hidden prefix | quantized body], with one linear for q, k and v.

    Attributes:
        prefix_k, prefix_v: [G, P, D] in the model's dtype, keys post-RoPE and post-R3; P = 0 without a prefix.
        o_in: quantizer A2.
        kv: quantizer of keys and values.
        turns_heads: whether queries and keys get RoPE.
    """

    def __init__(
        self,
        model_config,
        layer_idx: int,
        head_dim: int,
        qkv_proj: CalibratedLinear,
        o_proj: CalibratedLinear,
        o_in: ActivationQuantizer,
        kv: KVQuantizer,
        rotation: bool,
        query_norm: nn.Module | None = None,
        key_norm: nn.Module | None = None,
    ):
        super().__init__()
        self.model_config = model_config
        self.layer_idx = layer_idx
        self.head_dim = head_dim
        self.query_heads = model_config.num_attention_heads
        self.kv_heads = model_config.num_key_value_heads
        self.scaling = scaling_of(model_config)
        self.turns_heads = turns_heads(model_config, layer_idx)
        self.fixed_dtype = qkv_proj.weight.dtype
        self.qkv_proj, self.o_proj = qkv_proj, o_proj
        self.query_norm, self.key_norm = query_norm, key_norm
        self.o_in, self.kv = o_in, kv
        device = qkv_proj.weight.device
        base = hadamard_base(head_dim).to(device) if rotation else None
        self.register_buffer("head_base", base, persistent=False)
        empty = torch.zeros(self.kv_heads, 0, head_dim, dtype=self.fixed_dtype, device=device)
        self.register_buffer("prefix_k", empty)
        self.register_buffer("prefix_v", empty.clone())

    def project(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """q [B, H, L, D] and k [B, G, L, D], float32 after RoPE and R3; v [B, G, L, D] in the model's dtype."""
        if not self.turns_heads:
            position_embeddings = angle_zero(position_embeddings)
        qkv = self.qkv_proj(hidden_states)
        qkv = qkv.view(*qkv.shape[:-1], -1, self.head_dim)
        query, key, value = qkv.split((self.query_heads, self.kv_heads, self.kv_heads), dim=-2)
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        cos, sin = (t.float().unsqueeze(1) for t in position_embeddings)
        heads = []
        for x in (query, key):
            x = x.transpose(1, 2).float()
            x = x * cos + _rotate_half(x) * sin
            heads.append(x if self.head_base is None else hadamard(x, self.head_base))
        return heads[0], heads[1], value.transpose(1, 2)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values=None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        """Same contract as the attention of transformers; attention weights are never returned."""
        check_attention(self, attention_mask)
        layer = packed_layer(self, past_key_values)
        foreign = past_key_values is not None and layer is None
        is_causal = attention_mask is None or attention_mask.ndim == 2
        if self.qkv_proj.path is Path.INTEGER and is_causal and not foreign:
            return self.o_proj(self._attend_fused(hidden_states, position_embeddings, attention_mask, layer)), None
        query, key, value = self.project(hidden_states, position_embeddings)
        key, value, key_scale, value_scale = self.kv(key, value, self.fixed_dtype)
        out_BLHD = attend(
            self, query.to(self.fixed_dtype), key, value, key_scale, value_scale, attention_mask, past_key_values
        )
        out = self.o_in(out_BLHD.flatten(-2), self.fixed_dtype)
        return self.o_proj(out), None

    def _attend_fused(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        visible: Tensor | None,
        layer: PrefixStaticLayer | None,
    ) -> Tensor:
        """The input of `o_proj`, by two ops behind `qkv_proj`: store keys and values, then attend."""
        if not self.turns_heads:
            position_embeddings = angle_zero(position_embeddings)
        qkv, unscaled = self.qkv_proj.unscaled(hidden_states)
        kv, site, (batch, length) = self.kv, self.o_in, qkv.shape[:2]
        if layer is None:
            slots = KVSlots.for_one_call(kv, batch, self.kv_heads, length, self.head_dim, self.fixed_dtype, qkv.device)
        else:
            layer.check(batch, length)
            slots = KVSlots(layer.keys, layer.values, layer.key_scale, layer.value_scale, layer.cumulative_length)
        norms = (None, None, 0.0)
        if self.query_norm is not None:
            norms = (self.query_norm.weight, self.key_norm.weight, self.query_norm.variance_epsilon)
        query = rope_store(
            qkv, *position_embeddings, self.head_base, *norms, *slots[:4], kv.key_scale, kv.value_scale, kv.key_clip,
            kv.value_clip, kv.key_shift, kv.value_shift, slots.start, self.query_heads, kv.bits, *unscaled,
        )  # fmt: skip
        scales = (slots.key_scale, slots.value_scale) if kv.dynamic else (kv.key_scale, kv.value_scale)
        out = cache_attention(
            query, slots.keys, slots.values, *scales, kv.key_shift, kv.value_shift, self.prefix_k, self.prefix_v,
            slots.start, visible, self.scaling, site.scale, None if site.dynamic else site.shift, site.bits,
            site.encoding(batch * length), site.code_set,
        )  # fmt: skip
        if layer is not None:
            layer.advance(length)
        return site(out, self.fixed_dtype) if site.dynamic else QuantizedActivation(out, site.scale, self.fixed_dtype)


class PrefixMLP(FixedDtype):
    """down(R4(act(gate) * up)), with one linear for gate and up; activation and rotation in float32.

    Attributes:
        down_in: quantizer A4.
    """

    def __init__(
        self,
        gate_up_proj: CalibratedLinear,
        down_proj: CalibratedLinear,
        down_in: ActivationQuantizer,
        act_fn: nn.Module,
        rotation: bool,
    ):
        super().__init__()
        self.fixed_dtype = gate_up_proj.weight.dtype
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj
        self.act_fn, self.down_in = act_fn, down_in
        self.is_silu = isinstance(act_fn, (nn.SiLU, type(ACT2FN["silu"])))
        width, device = down_proj.in_features, down_proj.weight.device
        base = hadamard_base(width).to(device) if rotation else None
        self.register_buffer("down_base", base, persistent=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, L, d] to [B, L, d]."""
        site = self.down_in
        if site.path is Path.INTEGER and self.is_silu:
            gate_up, unscaled = self.gate_up_proj.unscaled(hidden_states)
            encoding = site.encoding(gate_up.numel() // gate_up.shape[-1])
            codes, row_scale = silu_hadamard(
                gate_up, self.down_base, site.scale, site.clip, site.shift, site.bits, encoding, *unscaled,
                codes=site.code_set,
            )  # fmt: skip
            h = QuantizedActivation(codes, row_scale if site.dynamic else site.scale, self.fixed_dtype)
            return self.down_proj(h)
        gate, up = self.gate_up_proj(hidden_states).float().chunk(2, dim=-1)
        h = self.act_fn(gate) * up
        if self.down_base is not None:
            h = hadamard(h, self.down_base)
        return self.down_proj(self.down_in(h, self.fixed_dtype))


def attention_modules(model: nn.Module) -> list[PrefixAttention]:
    """The attention modules of a calibrated model, by layer.

    Raises:
        ValueError: the model was not calibrated.
    """
    found = [module for module in model.modules() if isinstance(module, PrefixAttention)]
    if not found:
        raise ValueError(
            "model: not calibrated yet, so it has neither prefix nor scales; call "
            "`pq_ao.calibrate(model, tokenizer, config)` first."
        )
    return sorted(found, key=lambda module: module.layer_idx)


def path_switches(model: nn.Module) -> list[nn.Module]:
    """All linears and quantizers that have a `path`."""
    return [m for m in model.modules() if isinstance(m, ActivationQuantizer | KVQuantizer | CalibratedLinear)]


@contextmanager
def on_path(modules: list[nn.Module], path: Path) -> Iterator[None]:
    """Puts `modules` on `path` inside the context."""
    before = [module.path for module in modules]
    for module in modules:
        module.path = path
    try:
        yield
    finally:
        for module, previous in zip(modules, before, strict=True):
            module.path = previous


@contextmanager
def reference_path(model: nn.Module) -> Iterator[None]:
    """Runs a calibrated or quantized model in quantize-dequantize float32, which integers are checked against.

    Example::

        with pq_ao.reference_path(model):
            expected = model(ids).logits
    """
    attention_modules(model)
    with on_path(path_switches(model), Path.REFERENCE):
        yield
