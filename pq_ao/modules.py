"""The norm, attention and MLP modules of a calibrated decoder block, and the quantizers that sit between them.

Every quantizer and every linear is on one of three paths: FLOAT (rotated floating point, before `quantize_`),
REFERENCE (quantize and dequantize in float32: what the integers are checked against) or INTEGER (after `quantize_`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from pq_ao.attention import attend, check_attention, packed_layer
from pq_ao.cache_layer import PrefixStaticLayer
from pq_ao.config import PrefixQuantConfig
from pq_ao.hadamard import hadamard_base
from pq_ao.ops import (
    cache_attention,
    dequantize,
    hadamard,
    quantize,
    quantize_per_row,
    rope_store,
    silu_hadamard,
)
from pq_ao.ops.kernels.workspace import counters
from pq_ao.ops.linear_paths import capability_of, encoding
from pq_ao.tensors import PackedWeight, QuantizedActivation


class Path(Enum):
    """Arithmetic of a quantizer or a linear, see the module docstring."""

    FLOAT = "float"
    REFERENCE = "reference"
    INTEGER = "integer"


class FixedDtype(nn.Module):
    """A module whose dtype was fixed by calibration: `.half()`, `.to(dtype)` and their kin raise."""

    fixed_dtype: torch.dtype = torch.float32

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for dtype in (self.fixed_dtype, torch.float32):  # scales are float32 whatever the model is
            became = fn(torch.empty(0, dtype=dtype)).dtype
            if became != dtype:
                remedy = (
                    "Leave the conversion out: only the scales, which stay float32, have another dtype."
                    if became == self.fixed_dtype
                    else f"Load the original model with dtype={became} and calibrate that."
                )
                raise ValueError(
                    f"A calibrated model cannot be converted to {became}: its codes and scales belong to "
                    f"{self.fixed_dtype}. {remedy}"
                )
        return super()._apply(fn, recurse)


class KeptEmbedding(FixedDtype, nn.Embedding):
    """The token embedding, which stays in high precision."""

    def __init__(self, weight: Tensor, padding_idx: int | None):
        nn.Embedding.__init__(self, *weight.shape, padding_idx=padding_idx, _weight=weight, _freeze=True)
        self.fixed_dtype = weight.dtype


class KeptLinear(FixedDtype, nn.Linear):
    """The language-model head, which stays in high precision and which `quantize_` passes over."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        nn.Linear.__init__(self, weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.fixed_dtype = weight.dtype


class ActivationQuantizer(FixedDtype):
    """One of the sites A1 to A4 (method section 1.2): `attn_in`, `o_in`, `mlp_in`, `down_in`.

    In static mode the mean of each channel is taken off before quantizing; what it contributes to the linear is
    constant, and stands in the bias. So the codes spend their range on what changes from token to token.

    Attributes:
        scale: float32 (1,), static scale; unused in dynamic mode.
        shift: float32 [K], static mean of each channel; None in dynamic mode.
        path: see `Path`.
        observer: called with the float32 tensor before it is quantized; calibration sets it.
    """

    def __init__(self, config: PrefixQuantConfig, width: int, device: torch.device):
        super().__init__()
        self.bits, self.weight_bits = config.act_bits, config.weight_bits
        self.dynamic = config.mode == "dynamic"
        self.path = Path.FLOAT
        self.observer: Callable[[Tensor], None] | None = None
        self.register_buffer("scale", torch.ones(1, device=device))
        self.register_buffer("shift", None if self.dynamic else torch.zeros(width, device=device))

    def encoding(self, tokens: int) -> torch.dtype:
        """dtype of the codes that the linear behind reads best for so many tokens."""
        return encoding(tokens, self.bits, self.weight_bits, capability_of(self.scale.device))

    def codes(self, x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
        """Codes of x - shift, and their scale (1,) or [..., 1]."""
        if self.dynamic:
            return quantize_per_row(x, self.bits, dtype)
        return quantize(x.float() - self.shift, self.scale, self.bits, dtype), self.scale

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """float32 [..., K] to `dtype` (FLOAT), float32 (REFERENCE) or a QuantizedActivation (INTEGER)."""
        if self.observer is not None:
            self.observer(x)
        if self.path is Path.FLOAT:
            return x.to(dtype)
        if self.path is Path.INTEGER:
            return QuantizedActivation(*self.codes(x, self.encoding(x.numel() // x.shape[-1])), dtype)
        restored = dequantize(*self.codes(x))
        return restored if self.shift is None else restored + self.shift


class KVQuantizer(FixedDtype):
    """Keys and values, per KV head: static scales, or one scale for each token and head in dynamic mode.

    In static mode the mean of each channel is taken off first, and attention makes up for it exactly: one vector off
    all keys, the prefix's too, leaves the softmax as it is; one vector off all values comes out of attention
    unchanged, for probabilities add up to 1.

    Attributes:
        key_scale, value_scale: float32 [G]; unused in dynamic mode and at 16 bits.
        key_shift, value_shift: float32 [G, 1, D], static means; None in dynamic mode and at 16 bits.
        path: see `Path`; at 16 bits it stays FLOAT.
    """

    def __init__(self, config: PrefixQuantConfig, kv_heads: int, head_dim: int, device: torch.device):
        super().__init__()
        self.bits = config.kv_bits
        self.dynamic = config.mode == "dynamic"
        self.path = Path.FLOAT
        shifted = not self.dynamic and self.bits < 16
        for name in ("key", "value"):
            self.register_buffer(f"{name}_scale", torch.ones(kv_heads, device=device))
            shift = torch.zeros(kv_heads, 1, head_dim, device=device) if shifted else None
            self.register_buffer(f"{name}_shift", shift)

    def static(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Key scale, value scale, key shift, value shift of static mode; Nones otherwise."""
        if self.key_shift is None:
            return (None,) * 4
        return self.key_scale, self.value_scale, self.key_shift, self.value_shift

    def _codes(self, x_BGLD: Tensor, scale: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.dynamic:
            codes, scale = quantize_per_row(x_BGLD, self.bits)
            return codes, scale.squeeze(-1)
        return quantize(x_BGLD.float() - shift, scale.view(-1, 1, 1), self.bits), scale

    def forward(
        self, key_BGLD: Tensor, value_BGLD: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Keys, values and their scales: floats and None, or int8 codes (shift off) and scales [G] or [B, G, L]."""
        if self.path is Path.FLOAT or self.bits == 16:
            return key_BGLD.to(dtype), value_BGLD.to(dtype), None, None
        key, key_scale = self._codes(key_BGLD, self.key_scale, self.key_shift)
        value, value_scale = self._codes(value_BGLD, self.value_scale, self.value_shift)
        if self.path is Path.INTEGER:
            return key, value, key_scale, value_scale
        shape = (-1, 1, 1) if key_scale.ndim == 1 else (*key_scale.shape, 1)
        key, value = dequantize(key, key_scale.view(shape)), dequantize(value, value_scale.view(shape))
        if self.key_shift is not None:
            key, value = key + self.key_shift, value + self.value_shift
        return key, value, None, None


class KVSlots(NamedTuple):
    """Where a call keeps keys and values: packed, with scales [B, G, S] in dynamic mode, its first token at `start`."""

    keys: Tensor
    values: Tensor
    key_scale: Tensor | None
    value_scale: Tensor | None
    start: Tensor

    @classmethod
    def for_one_call(
        cls, kv: KVQuantizer, batch: int, kv_heads: int, length: int, head_dim: int, dtype: torch.dtype
    ) -> "KVSlots":
        """Slots for a call without a cache."""
        device = kv.key_scale.device
        width = head_dim // 2 if kv.bits == 4 else head_dim
        dtype = {4: torch.uint8, 8: torch.int8, 16: dtype}[kv.bits]
        keys, values = (torch.empty(batch, kv_heads, length, width, dtype=dtype, device=device) for _ in range(2))
        scales = (None, None)
        if kv.dynamic and kv.bits < 16:
            scales = tuple(torch.empty(batch, kv_heads, length, device=device) for _ in range(2))
        return cls(keys, values, *scales, torch.zeros((), dtype=torch.int64, device=device))


class CalibratedLinear(FixedDtype, nn.Linear):
    """A linear of a decoder block. Calibration gives it final codes; `quantize_` puts them in place of the weight.

    Attributes:
        config: the scheme that it was calibrated for.
        packed: final codes and scales, a `PackedWeight`; None before calibration and after `quantize_`.
        packed_bias: float32 [N], the bias that goes with the codes, or None.
        quantizers: what goes over to integers together with this linear, its input's quantizer first; owned by the
            modules that feed it.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        config: PrefixQuantConfig,
        quantizers: tuple[ActivationQuantizer | KVQuantizer, ...],
    ):
        nn.Linear.__init__(self, weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.fixed_dtype = weight.dtype
        self.config = config
        self.quantizers = quantizers
        self.path = Path.FLOAT
        self.register_buffer("packed", None)
        self.register_buffer("packed_bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N] in the model's dtype."""
        if self.path is not Path.REFERENCE:
            return nn.functional.linear(x, self.weight, self.bias)
        is_packed = isinstance(self.weight, PackedWeight)
        weight, bias = (self.weight, self.bias) if is_packed else (self.packed, self.packed_bias)
        shift = self.quantizers[0].shift
        x = x if shift is None else x - shift  # its product with the weight stands in the bias
        return nn.functional.linear(x.float(), weight.dequantize(), bias).to(self.fixed_dtype)

    def pack_(self) -> None:
        """Drops the floating-point weight for the codes, and sends this linear and its quantizers over to integers."""
        self.weight = nn.Parameter(self.packed, requires_grad=False)
        self.bias = None if self.packed_bias is None else nn.Parameter(self.packed_bias, requires_grad=False)
        self.packed = self.packed_bias = None
        counters(self.weight.device)  # must exist before a CUDA graph is recorded
        for module in (self, *self.quantizers):
            module.path = Path.INTEGER

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        incoming = state_dict.get(f"{prefix}weight")
        error_msgs = args[-1]
        is_packed = isinstance(self.weight, PackedWeight)
        if incoming is not None and isinstance(incoming, PackedWeight) != is_packed:
            error_msgs.append(
                f"{prefix}weight is floating point in the state_dict, but this model is quantized: "
                "load it before `quantize_`."
                if is_packed
                else f"{prefix}weight is quantized (PackedWeight) in the state_dict, but this model's is not: "
                "call `quantize_(model, config)` before load_state_dict."
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)


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
        h = hidden_states.float()
        h = h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.quantizer(h, hidden_states.dtype)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class PrefixAttention(FixedDtype):
    """Attention over [hidden prefix | quantized body], with one linear for q, k and v.

    Attributes:
        prefix_k, prefix_v: [G, P, D] in the model's dtype, keys post-RoPE and post-R3; P = 0 without a prefix.
        o_in: quantizer A2.
        kv: quantizer of keys and values.
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
        self.scaling = head_dim**-0.5
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
            qkv = self.qkv_proj(hidden_states)
            return self.o_proj(self._attend_fused(qkv, position_embeddings, attention_mask, layer)), None
        query, key, value = self.project(hidden_states, position_embeddings)
        key, value, key_scale, value_scale = self.kv(key, value, self.fixed_dtype)
        out_BLHD = attend(
            self, query.to(self.fixed_dtype), key, value, key_scale, value_scale, attention_mask, past_key_values
        )
        out = self.o_in(out_BLHD.flatten(-2), self.fixed_dtype)
        return self.o_proj(out), None

    def _attend_fused(
        self,
        qkv: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        visible: Tensor | None,
        layer: PrefixStaticLayer | None,
    ) -> Tensor:
        """The input of `o_proj` from qkv [B, L, (H + 2G) D], by two ops: store keys and values, then attend."""
        kv, site, (batch, length) = self.kv, self.o_in, qkv.shape[:2]
        if layer is None:
            slots = KVSlots.for_one_call(kv, batch, self.kv_heads, length, self.head_dim, self.fixed_dtype)
        else:
            layer.check(batch, length)
            slots = KVSlots(layer.keys, layer.values, layer.key_scale, layer.value_scale, layer.cumulative_length)
        static = kv.static()
        norms = (None, None, 0.0)
        if self.query_norm is not None:
            norms = (self.query_norm.weight, self.key_norm.weight, self.query_norm.variance_epsilon)
        query = rope_store(
            qkv, *position_embeddings, self.head_base, *norms, *slots[:4], *static, slots.start, self.query_heads,
            kv.bits,
        )  # fmt: skip
        scales = static[:2] if slots.key_scale is None else (slots.key_scale, slots.value_scale)
        out = cache_attention(
            query, slots.keys, slots.values, *scales, *static[2:], self.prefix_k, self.prefix_v, slots.start, visible,
            self.scaling, None if site.dynamic else site.scale, site.shift, site.bits, site.encoding(batch * length),
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
        gate_up, site = self.gate_up_proj(hidden_states), self.down_in
        if site.path is Path.INTEGER and self.is_silu:
            encoding = site.encoding(gate_up.numel() // gate_up.shape[-1])
            scale = None if site.dynamic else site.scale
            codes, row_scale = silu_hadamard(gate_up, self.down_base, scale, site.shift, site.bits, encoding)
            h = QuantizedActivation(codes, row_scale if site.dynamic else scale, self.fixed_dtype)
            return self.down_proj(h)
        gate, up = gate_up.float().chunk(2, dim=-1)
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
