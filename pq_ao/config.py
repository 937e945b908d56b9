"""What a quantized model is: bit widths, mode, prefix and rotation. Data and search settings belong to `calibrate`."""

from dataclasses import dataclass
from typing import Literal

from torchao.core.config import ALLOWED_AO_MODULES, AOBaseConfig

Mode = Literal["static", "dynamic"]
Codes = Literal["even", "spread"]

# name -> (weight_bits, act_bits, kv_bits)
SCHEMES: dict[str, tuple[int, int, int]] = {
    "w4a4kv4": (4, 4, 4),
    "w4a8kv4": (4, 8, 4),
    "w8a8kv8": (8, 8, 8),
    "w4a4kv16": (4, 4, 16),
}

_ALLOWED: dict[str, tuple] = {
    "weight_bits": (4, 8),
    "act_bits": (4, 8),
    "kv_bits": (4, 8, 16),
    "mode": ("static", "dynamic"),
    "prefix": (True, False),
    "rotation": (True, False),
    "act_codes": ("even", "spread"),
    "version": (1,),
}


@dataclass
class PrefixQuantConfig(AOBaseConfig):
    """Scheme of a quantized decoder, passed to `calibrate` and to torchao's `quantize_`.

    Args:
        weight_bits: 4 or 8, per output channel, symmetric.
        act_bits: 4 or 8, at the inputs of the seven linears of a block.
        kv_bits: 4, 8 or 16 (16 keeps the model's own dtype), per KV head.
        mode: "static" (scales fixed by calibration, the paper's O2) or "dynamic" (absmax per token, O1).
        prefix: start every context with the outlier tokens' full-precision KV.
        rotation: Hadamard rotations R1 to R4.
        act_codes: whole numbers that stand for activations: "even", -8 to 7 or -128 to 127, or for 4 bits under static
            scales "spread", 16 of them that are dense near zero, where most values are, and further apart outside.
        version: format of this config.

    Raises:
        ValueError: a field has a value that is not allowed.
    """

    weight_bits: int = 4
    act_bits: int = 4
    kv_bits: int = 4
    mode: Mode = "static"
    prefix: bool = True
    rotation: bool = True
    act_codes: Codes = "even"
    version: int = 1

    def __post_init__(self) -> None:
        for field, allowed in _ALLOWED.items():
            value = getattr(self, field)
            # True == 1, so compare types as well
            if not any(value == item and type(value) is type(item) for item in allowed):
                raise ValueError(f"PrefixQuantConfig: {field}={value!r} is not supported; use one of {allowed}.")
        if self.weight_bits > 4 and self.act_bits == 4:
            raise ValueError(
                f"PrefixQuantConfig: weight_bits={self.weight_bits} with act_bits=4 gains neither speed nor accuracy; "
                f"use act_bits=8, or one of the schemes {tuple(SCHEMES)}."
            )
        if self.act_codes == "spread" and (self.act_bits != 4 or self.mode != "static"):
            raise ValueError(
                f"PrefixQuantConfig: act_codes='spread' with act_bits={self.act_bits}, mode={self.mode!r}; it is for "
                "act_bits=4 and mode='static'. Leave it out."
            )

    @property
    def scheme(self) -> str:
        """Short name such as "w4a4kv4"."""
        return f"w{self.weight_bits}a{self.act_bits}kv{self.kv_bits}"


def prefixquant_config(
    scheme: str = "w4a4kv4",
    *,
    mode: Mode = "static",
    prefix: bool = True,
    rotation: bool = True,
    act_codes: Codes | None = None,
) -> PrefixQuantConfig:
    """Config of a named scheme.

    Args:
        scheme: one of "w4a4kv4", "w4a8kv4", "w8a8kv8", "w4a4kv16".
        mode, prefix, rotation: see `PrefixQuantConfig`.
        act_codes: likewise; None for "spread" where it is allowed, else "even".

    Raises:
        ValueError: unknown scheme, or a field that is not allowed.

    Example::

        config = prefixquant_config("w4a8kv4")
        pq_ao.calibrate(model, tokenizer, config)
    """
    if scheme not in SCHEMES:
        raise ValueError(
            f"prefixquant_config: scheme={scheme!r} is unknown; use one of {tuple(SCHEMES)}, "
            "or build a PrefixQuantConfig(weight_bits=..., act_bits=..., kv_bits=...)."
        )
    weight_bits, act_bits, kv_bits = SCHEMES[scheme]
    if act_codes is None:
        act_codes = "spread" if act_bits == 4 and mode == "static" else "even"
    return PrefixQuantConfig(weight_bits, act_bits, kv_bits, mode, prefix, rotation, act_codes)


# torchao rebuilds configs from JSON by looking their class up in these modules
ALLOWED_AO_MODULES.add(__name__)
