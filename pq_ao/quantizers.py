"""The quantizers between the ops of a decoder block, and the paths that they and the linears can be on.

A path is FLOAT (rotated floating point, before `quantize_`), REFERENCE (quantize and dequantize in float32: what the
integers are checked against) or INTEGER (after `quantize_`).
"""

from collections.abc import Callable, Iterable
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pq_ao.config import PrefixQuantConfig
from pq_ao.fake_quantize import fake_quantize
from pq_ao.ops import quantize, quantize_per_row
from pq_ao.ops.linear_paths import capability_of, encoding
from pq_ao.ops.quantize import row_scale
from pq_ao.tensors import QuantizedActivation


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


class ActivationQuantizer(FixedDtype):
    """One of the sites A1 to A4: `attn_in`, `o_in`, `mlp_in`, `down_in`.

    The mean of each channel is taken off before quantizing; what it contributes to the linear is constant, and stands
    in the bias. So the codes spend their range on what changes from token to token.

    Attributes:
        code_set: which codes, see `pq_ao.ops.quantize.CODE_SETS`.
        scale: float32 (1,) in static mode, else None.
        clip: float32 (1,) in dynamic mode, the factor on each token's absmax; else None.
        shift: float32 [K], static mean of each channel, and half a scale more where codes are not even, for their
            middle is -1/2; zeros until calibration sets it.
        path: see `Path`.
        observer: called with the float32 tensor before it is quantized; calibration sets it.
    """

    def __init__(self, config: PrefixQuantConfig, width: int, device: torch.device, code_set: str = "even"):
        super().__init__()
        self.bits, self.weight_bits, self.code_set = config.act_bits, config.weight_bits, code_set
        self.dynamic = config.mode == "dynamic"
        self.path = Path.FLOAT
        self.observer: Callable[[Tensor], None] | None = None
        factor = torch.ones(1, dtype=torch.float32, device=device)  # whatever torch's default dtype is
        self.register_buffer("scale", None if self.dynamic else factor)
        self.register_buffer("clip", factor if self.dynamic else None)
        self.register_buffer("shift", torch.zeros(width, dtype=torch.float32, device=device))

    def encoding(self, tokens: int) -> torch.dtype:
        """dtype of the codes that the linear behind reads best for so many tokens."""
        return encoding(tokens, self.bits, self.weight_bits, capability_of(self.shift.device))

    def codes(self, x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
        """Codes of x - shift, and their scale (1,) or [..., 1]."""
        x = x.float() - self.shift
        if self.dynamic:
            return quantize_per_row(x, self.clip, self.bits, dtype)
        return quantize(x, self.scale, self.bits, dtype, self.code_set), self.scale

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """float32 [..., K] to `dtype` (FLOAT), float32 (REFERENCE) or a QuantizedActivation (INTEGER)."""
        if self.observer is not None:
            self.observer(x)
        if self.path is Path.FLOAT:
            return x.to(dtype)
        if self.path is Path.INTEGER:
            return QuantizedActivation(*self.codes(x, self.encoding(x.numel() // x.shape[-1])), dtype)
        x = x.float() - self.shift
        scale = row_scale(x, self.clip, self.bits) if self.dynamic else self.scale
        return fake_quantize(x, scale, self.bits, self.code_set) + self.shift


# by `act_codes` those of A1 to A4; what attention puts out differs most in size from token to token
_CODE_SETS = {"even": ("even",) * 4, "spread": ("spread", "wide", "spread", "spread")}


def activation_quantizers(
    config: PrefixQuantConfig, widths: Iterable[int], device: torch.device
) -> list[ActivationQuantizer]:
    """Those of one block, A1 to A4, for inputs of these widths."""
    return [
        ActivationQuantizer(config, width, device, code_set)
        for code_set, width in zip(_CODE_SETS[config.act_codes], widths, strict=True)
    ]


class KVQuantizer(FixedDtype):
    """Keys and values, per KV head: static scales, or one scale for each token and head in dynamic mode.

    The mean of each channel is taken off first, and attention makes up for it exactly: one vector off all keys, the
    prefix's too, leaves the softmax as it is; one vector off all values comes out of attention unchanged, for
    probabilities add up to 1.

    At 16 bits all of the tensors are None.

    Attributes:
        key_scale, value_scale: float32 [G] in static mode, else None.
        key_clip, value_clip: float32 [G] in dynamic mode, factors on each token's absmax; else None.
        key_shift, value_shift: float32 [G, 1, D], static means; zeros until calibration sets them.
        path: see `Path`; at 16 bits it stays FLOAT.
    """

    def __init__(self, config: PrefixQuantConfig, kv_heads: int, head_dim: int, device: torch.device):
        super().__init__()
        self.bits = config.kv_bits
        self.dynamic = config.mode == "dynamic"
        self.path = Path.FLOAT
        quantized = self.bits < 16
        for name in ("key", "value"):
            for kind, used in (("scale", not self.dynamic), ("clip", self.dynamic)):
                factor = torch.ones(kv_heads, dtype=torch.float32, device=device) if quantized and used else None
                self.register_buffer(f"{name}_{kind}", factor)
            shift = torch.zeros(kv_heads, 1, head_dim, dtype=torch.float32, device=device) if quantized else None
            self.register_buffer(f"{name}_shift", shift)

    def _codes(self, x_BGLD: Tensor, scale: Tensor | None, clip: Tensor | None, shift: Tensor) -> tuple[Tensor, Tensor]:
        x_BGLD = x_BGLD.float() - shift
        if self.dynamic:
            codes, scale = quantize_per_row(x_BGLD, clip.view(-1, 1, 1), self.bits)
            return codes, scale.squeeze(-1)
        return quantize(x_BGLD, scale.view(-1, 1, 1), self.bits), scale

    def _restored(self, x_BGLD: Tensor, scale: Tensor | None, clip: Tensor | None, shift: Tensor) -> Tensor:
        x_BGLD = x_BGLD.float() - shift
        scale = row_scale(x_BGLD, clip.view(-1, 1, 1), self.bits) if self.dynamic else scale.view(-1, 1, 1)
        return fake_quantize(x_BGLD, scale, self.bits) + shift

    def forward(
        self, key_BGLD: Tensor, value_BGLD: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Keys, values and their scales: floats and None, or int8 codes (shift off) and scales [G] or [B, G, L]."""
        if self.path is Path.FLOAT or self.bits == 16:
            return key_BGLD.to(dtype), value_BGLD.to(dtype), None, None
        key = (key_BGLD, self.key_scale, self.key_clip, self.key_shift)
        value = (value_BGLD, self.value_scale, self.value_clip, self.value_shift)
        if self.path is Path.REFERENCE:
            return self._restored(*key), self._restored(*value), None, None
        key, key_scale = self._codes(*key)
        value, value_scale = self._codes(*value)
        return key, value, key_scale, value_scale


class KVSlots(NamedTuple):
    """Where a call keeps keys and values: packed, with scales [B, G, S] in dynamic mode, its first token at `start`."""

    keys: Tensor
    values: Tensor
    key_scale: Tensor | None
    value_scale: Tensor | None
    start: Tensor

    @classmethod
    def for_one_call(
        cls, kv: KVQuantizer, batch: int, kv_heads: int, length: int, head_dim: int, dtype: torch.dtype,
        device: torch.device,
    ) -> "KVSlots":  # fmt: skip
        """Slots for a call without a cache."""
        width = head_dim // 2 if kv.bits == 4 else head_dim
        dtype = {4: torch.uint8, 8: torch.int8, 16: dtype}[kv.bits]
        keys, values = (torch.empty(batch, kv_heads, length, width, dtype=dtype, device=device) for _ in range(2))
        scales = (None, None)
        if kv.dynamic and kv.bits < 16:
            scales = tuple(torch.empty(batch, kv_heads, length, device=device) for _ in range(2))
        return cls(keys, values, *scales, torch.zeros((), dtype=torch.int64, device=device))
