"""pq_ao::silu_hadamard, all that stands between gate_up_proj and down_proj: SwiGLU, R4 and the quantizer A4."""

import torch
from torch import Tensor

from pq_ao.hadamard import hadamard_transform
from pq_ao.ops.accumulators import check_accumulators, scaled
from pq_ao.ops.quantize import check_clip, quantize, quantize_per_row

_ENCODINGS = (torch.int8, torch.float8_e4m3fn)


def _check(
    gate_up: Tensor, base: Tensor | None, scale: Tensor | None, clip: Tensor | None, shift: Tensor | None, bits: int,
    encoding: torch.dtype, in_scale: Tensor | None, in_bias: Tensor | None, codes: str,
) -> int:  # fmt: skip
    """The width F, or an error."""
    if not gate_up.is_floating_point():
        raise TypeError(f"silu_hadamard: gate_up has dtype {gate_up.dtype}; a floating-point tensor is required.")
    if gate_up.ndim == 0 or gate_up.shape[-1] < 2 or gate_up.shape[-1] % 2:
        raise ValueError(f"silu_hadamard: gate_up has shape {list(gate_up.shape)}; [..., 2F] is required.")
    check_accumulators("silu_hadamard", gate_up, in_scale, in_bias)
    if encoding not in _ENCODINGS:
        raise TypeError(f"silu_hadamard: encoding={encoding}; it must be one of {_ENCODINGS}.")
    if bits not in (4, 8) or (bits == 8 and encoding != torch.int8):
        raise ValueError(f"silu_hadamard: bits={bits} with encoding={encoding}; 4, or 8 in int8, are possible.")
    features = gate_up.shape[-1] // 2
    if base is not None:
        order = base.shape[0] if base.ndim == 2 and base.shape[0] == base.shape[1] else 0
        length = features // max(order, 1)
        if order == 0 or order * length != features or length & (length - 1):
            raise ValueError(
                f"silu_hadamard: base has shape {list(base.shape)}; for F={features} it must be [K, K] with F / K a "
                f"power of two: hadamard_base({features})."
            )
    if shift is not None and shift.shape != (features,):
        raise ValueError(f"silu_hadamard: shift has shape {list(shift.shape)}; [{features}] is required.")
    if (scale is None) == (clip is None):
        given = "neither scale nor clip is" if scale is None else "scale and clip are both"
        raise ValueError(f"silu_hadamard: {given} given; pass one: scale if it is static, clip for one scale a row.")
    if scale is not None and scale.numel() != 1:
        raise ValueError(f"silu_hadamard: scale has shape {list(scale.shape)}; (1,) is required.")
    if clip is not None:
        if in_scale is not None:
            raise ValueError(
                "silu_hadamard: clip is given with in_scale; accumulators are quantized with a scale only."
            )
        if codes != "even":
            raise ValueError(f"silu_hadamard: clip is given with codes={codes!r}; scales of rows go with 'even'.")
        check_clip("silu_hadamard", "clip", clip, (1,))
    return features


@torch.library.custom_op("pq_ao::silu_hadamard", mutates_args=())
def silu_hadamard(
    gate_up: Tensor,
    base: Tensor | None,
    scale: Tensor | None,
    clip: Tensor | None,
    shift: Tensor | None,
    bits: int,
    encoding: torch.dtype,
    in_scale: Tensor | None = None,
    in_bias: Tensor | None = None,
    codes: str = "even",
) -> tuple[Tensor, Tensor]:
    """Codes of R4(silu(gate) * up) - shift, in float32 before the one rounding.

    On a GPU sums of R4 are taken in another order, of operands of 16 bits, so that a value near the middle of two codes
    may become either. Many rows of bfloat16 with a static scale and 4 bits are quicker and coarser: operands of R4, and
    what is exchanged within it, are rounded to float16 (11 bits), sums are float32, and less than 1 code in 200 (of
    "spread" ones, in 140) becomes its neighbour. A silu(gate) * up beyond 3e7 scales is then taken for that, and codes
    of several such are not to be relied on; of accumulators in_scale and in_bias are rounded to 11 bits as well, for
    scales between 1e-6 and 1000 and biases up to 1000.

    Args:
        gate_up: [..., 2F] floating point, gate first.
        base: float32 [K, K] from `pq_ao.hadamard.hadamard_base(F)`; None for no rotation.
        scale: float32 (1,), static; None if dynamic.
        clip: float32 (1,), above 0, if dynamic: a row's scale is clip times that of its absmax, shift off (see
            `pq_ao.ops.quantize_per_row`); None if static.
        shift: float32 [F], static means taken off before quantizing, or None.
        bits: 4 or 8.
        encoding: torch.int8, or torch.float8_e4m3fn, which holds the same integers (4 bits only).
        in_scale: float32 [2F] if gate_up holds accumulators, which are bfloat16: gate_up * in_scale + in_bias is then
            meant, in float32. Goes with scale, not clip. None if gate_up is as it should be.
        in_bias: float32 [2F] or None; goes with in_scale.
        codes: which, see `quantize`; others than "even" go with scale, not clip.

    Returns:
        codes `encoding` [..., F]; row scales float32 [..., 1] if dynamic, else an empty (0,) tensor.

    Raises:
        TypeError: gate_up is not floating point, or another encoding.
        ValueError: shapes or bits that do not fit; scale and clip both given, or neither; in_scale with clip; on the
            CPU, where it costs no wait, a clip of 0 or less.

    Example::

        codes, _ = silu_hadamard(gate_up, hadamard_base(14336), scale, None, shift, 4, torch.int8)
    """
    _check(gate_up, base, scale, clip, shift, bits, encoding, in_scale, in_bias, codes)
    return silu_hadamard_plainly(gate_up, base, scale, clip, shift, bits, encoding, in_scale, in_bias, codes)


def silu_hadamard_plainly(
    gate_up: Tensor,
    base: Tensor | None,
    scale: Tensor | None,
    clip: Tensor | None,
    shift: Tensor | None,
    bits: int,
    encoding: torch.dtype,
    in_scale: Tensor | None = None,
    in_bias: Tensor | None = None,
    codes: str = "even",
) -> tuple[Tensor, Tensor]:
    """`silu_hadamard` in ops of PyTorch, of arguments that were checked."""
    gate, up = scaled(gate_up, in_scale, in_bias).float().chunk(2, dim=-1)
    h = torch.nn.functional.silu(gate) * up
    if base is not None:
        h = hadamard_transform(h, base)
    if shift is not None:
        h = h - shift
    if scale is None:
        return quantize_per_row(h, clip, bits, encoding)
    return quantize(h, scale, bits, encoding, codes), h.new_empty(0)


def _outputs(gate_up: Tensor, features: int, dynamic: bool, encoding: torch.dtype) -> tuple[Tensor, Tensor]:
    codes = torch.empty(*gate_up.shape[:-1], features, dtype=encoding, device=gate_up.device)
    shape = (*gate_up.shape[:-1], 1) if dynamic else (0,)
    return codes, torch.empty(shape, dtype=torch.float32, device=gate_up.device)


@silu_hadamard.register_fake
def _(gate_up, base, scale, clip, shift, bits, encoding, in_scale=None, in_bias=None, codes="even"):
    return _outputs(gate_up, gate_up.shape[-1] // 2, scale is None, encoding)


@silu_hadamard.register_kernel("cuda")
def _(gate_up, base, scale, clip, shift, bits, encoding, in_scale=None, in_bias=None, codes="even"):
    from pq_ao.ops.kernels.silu_hadamard import launch

    features = _check(gate_up, base, scale, clip, shift, bits, encoding, in_scale, in_bias, codes)
    out, row_scale = _outputs(gate_up, features, scale is None, encoding)
    launch(
        gate_up.contiguous(), base, scale, clip, shift, bits, out.view(-1, features), row_scale, in_scale=in_scale,
        in_bias=in_bias, code_set=codes,
    )  # fmt: skip
    return out, row_scale
