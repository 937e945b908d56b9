"""Which kernel a quantized linear runs on. One function decides, for the linear and for those who feed it."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import torch

Capability = tuple[int, int]

# Upper bounds on tokens, measured on an H200 with the layers of Llama-3-8B and its INT8 head.
_DP4A_TOKENS = {4: 4, 8: 8}  # by bits of weights; above, integer units and not memory bound dp4a
# A pass that unpacks to float8 pays beyond; a whole prefill of 2,048 tokens was still faster with tiles.
_TILE_TOKENS = 2048
# more does dp4a not take at all
_DP4A_LIMIT = 8

_TILE_CAPABILITY, _FLOAT8_CAPABILITY = (8, 0), (8, 9)


class LinearPath(Enum):
    """All paths give the same integers.

    DP4A: few tokens, on the integer units. TILE: int8 tensor cores, INT4 unpacked in registers. E4M3: INT4 unpacked to
    float8 in memory, then `torch._scaled_mm`, whose float32 sums of such codes are exact. INT_MM: unpacked to int8,
    then `torch._int_mm`; for the CPU and GPUs before Ampere.
    """

    DP4A = "dp4a"
    TILE = "tile"
    E4M3 = "e4m3"
    INT_MM = "int_mm"


_forced: LinearPath | None = None


def _obstacle(
    path: LinearPath,
    tokens: int,
    out_features: int,
    in_features: int,
    weight_bits: int,
    act_bits: int,
    capability: Capability | None,
) -> str | None:
    """Why `path` cannot take this linear; None when it can."""
    if path is LinearPath.INT_MM:
        return None
    if capability is None:
        return "it needs a GPU, and the tensors are on the CPU"
    if capability < _TILE_CAPABILITY:
        return f"it needs compute capability {_TILE_CAPABILITY} or later, and the GPU has {capability}"
    if path is LinearPath.DP4A:
        if not 1 <= tokens <= _DP4A_LIMIT:
            return f"it takes 1 to {_DP4A_LIMIT} tokens, not {tokens}"
        multiple = 8 if weight_bits == 4 else 4
        if in_features % multiple:
            return f"it needs in_features to be a multiple of {multiple}, not {in_features}"
    if path is LinearPath.E4M3:
        if (weight_bits, act_bits) != (4, 4):
            return f"float8 holds 4-bit codes alone, not W{weight_bits}A{act_bits}"
        if capability < _FLOAT8_CAPABILITY:
            return f"it needs compute capability {_FLOAT8_CAPABILITY} or later, and the GPU has {capability}"
        if in_features % 16 or out_features % 16:
            return f"it needs features that are multiples of 16, not {in_features} in and {out_features} out"
    return None


def _preferred(tokens: int, weight_bits: int) -> tuple[LinearPath, ...]:
    """Paths for so many tokens, best first. INT_MM, which takes everything, is in each."""
    if tokens <= _DP4A_TOKENS[weight_bits]:
        return LinearPath.DP4A, LinearPath.TILE, LinearPath.INT_MM
    if tokens <= _TILE_TOKENS:
        return LinearPath.TILE, LinearPath.INT_MM
    return LinearPath.E4M3, LinearPath.TILE, LinearPath.INT_MM


def linear_path(
    tokens: int,
    out_features: int,
    in_features: int,
    weight_bits: int,
    act_bits: int,
    capability: Capability | None,
) -> LinearPath:
    """The path of a linear [tokens, in_features] to [tokens, out_features].

    Args:
        weight_bits, act_bits: 4 or 8.
        capability: compute capability of the GPU; None for the CPU.

    Raises:
        ValueError: a path is forced (`forced_path`) that cannot take this linear.
    """
    shape = (tokens, out_features, in_features, weight_bits, act_bits, capability)
    if _forced is not None:
        obstacle = _obstacle(_forced, *shape)
        if obstacle is not None:
            raise ValueError(f"forced_path: {_forced.value!r} cannot run this linear: {obstacle}.")
        return _forced
    for path in _preferred(tokens, weight_bits):
        if _obstacle(path, *shape) is None:
            return path
    raise AssertionError("INT_MM takes every linear")


def encoding(tokens: int, act_bits: int, weight_bits: int, capability: Capability | None) -> torch.dtype:
    """The dtype of activation codes that the linear behind them reads best: int8, or float8_e4m3fn.

    Sizes are unknown where activations are made; they are taken to fit. Codes of the other dtype are converted by the
    linear, exactly.
    """
    fitting = 16
    path = linear_path(tokens, fitting, fitting, weight_bits, act_bits, capability)
    return torch.float8_e4m3fn if path is LinearPath.E4M3 else torch.int8


def capability_of(device: torch.device) -> Capability | None:
    """Compute capability of a GPU, None for the CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@contextmanager
def forced_path(path: LinearPath) -> Iterator[None]:
    """Sends every linear inside the context to `path`; one that it cannot take raises a ValueError.

    For tests, and for programs whose number of tokens is not known when they are made.
    """
    global _forced
    before, _forced = _forced, path
    try:
        yield
    finally:
        _forced = before
