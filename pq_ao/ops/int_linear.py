"""The linear of integer codes: exact products on the path that fits (`pq_ao.ops.linear_paths`), one fp32 epilogue.

Few tokens go to one opaque kernel, epilogue included. Many tokens unpack the weight and call a matrix product of
PyTorch, whose epilogue Inductor fuses with what follows.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pq_ao.ops.linear_paths import LinearPath, capability_of, linear_path
from pq_ao.ops.packing import unpack_int4

# cuBLASLt's int8 matmul refuses fewer rows, and inner or outer sizes that are not multiples of 8
_CUDA_MIN_ROWS, _CUDA_MULTIPLE = 17, 8

_UNPACKED_BY_KERNEL = 8  # in_features that the unpacking kernel takes are multiples of this


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _int8_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """int8 [M, K] times int8 [N, K] transposed, int32 [M, N]; padded with zeros where CUDA asks for it."""
    rows, inner, outer = x.shape[0], x.shape[1], weight.shape[0]
    if x.device.type == "cuda":
        pad_inner = _round_up(inner, _CUDA_MULTIPLE) - inner
        pad_rows = max(_CUDA_MIN_ROWS, rows) - rows
        x = F.pad(x, (0, pad_inner, 0, pad_rows))
        weight = F.pad(weight, (0, pad_inner, 0, _round_up(outer, _CUDA_MULTIPLE) - outer))
    elif rows == 1:
        x = F.pad(x, (0, 0, 0, 1))  # torch reads the stride of a single row, which compiled code sets to 0: wrong sums
    return torch._int_mm(x.contiguous(), weight.t())[:rows, :outer]


def _epilogue(acc: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = acc.float() * (x_scale * w_scale)
    if bias is not None:
        y = y + bias.float()
    return y.to(dtype)


@torch.library.custom_op("pq_ao::int_accumulate", mutates_args=())
def _accumulate(x_codes: Tensor, w_codes: Tensor) -> Tensor:
    """int8 [M, K] times int8 [N, K] or packed uint8 transposed, int32 [M, N]: the reference, and the CPU's path."""
    return accumulate_plainly(x_codes, w_codes)


def accumulate_plainly(x_codes: Tensor, w_codes: Tensor) -> Tensor:
    """The op `int_accumulate` in ops of PyTorch."""
    weight = unpack_int4(w_codes, x_codes.shape[1]) if w_codes.dtype == torch.uint8 else w_codes
    if x_codes.shape[0] == 0:
        return torch.empty(0, weight.shape[0], dtype=torch.int32, device=x_codes.device)
    return _int8_matmul(x_codes, weight).contiguous()


@_accumulate.register_fake
def _(x_codes: Tensor, w_codes: Tensor) -> Tensor:
    return torch.empty(x_codes.shape[0], w_codes.shape[0], dtype=torch.int32, device=x_codes.device)


@torch.library.custom_op("pq_ao::packed_linear", mutates_args=())
def packed_linear(
    x_codes: Tensor,
    x_scale: Tensor | None,
    w_codes: Tensor,
    w_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    path: str,
) -> Tensor:
    """The linear in one kernel, on the path "dp4a" or "tile".

    Args:
        x_codes: int8 [M, K].
        x_scale: float32 (1,), or [M, 1] one for each row.
        w_codes: int8 [N, K], or uint8 [N, ceil(K / 2)] as `pack_int4` makes it.
        w_scale: float32 [N].
        bias: float32 [N] or None.
        dtype: of the result; int32 for the accumulators themselves, and scales and bias are not read then.
        path: see `LinearPath`.

    Returns:
        `dtype` [M, N].
    """
    acc = _accumulate(x_codes, w_codes)
    return acc if dtype == torch.int32 else _epilogue(acc, x_scale, w_scale, bias, dtype)


@packed_linear.register_fake
def _(x_codes, x_scale, w_codes, w_scale, bias, dtype, path):
    return torch.empty(x_codes.shape[0], w_codes.shape[0], dtype=dtype, device=x_codes.device)


@packed_linear.register_kernel("cuda")
def _(x_codes, x_scale, w_codes, w_scale, bias, dtype, path):
    if path == LinearPath.DP4A.value:
        from pq_ao.ops.kernels.gemv import gemv as kernel
    else:
        from pq_ao.ops.kernels.tile_linear import tile_linear as kernel
    x_scale = None if x_scale is None else x_scale.contiguous()
    return kernel(x_codes.contiguous(), x_scale, w_codes.contiguous(), w_scale, bias, dtype)


@torch.library.custom_op("pq_ao::unpack_codes", mutates_args=())
def unpack_codes(w_codes: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """uint8 [N, ceil(K / 2)] as `pack_int4` makes it to codes [N, K] of `dtype`, int8 or float8_e4m3fn."""
    return unpack_int4(w_codes, in_features).contiguous().to(dtype)


@unpack_codes.register_fake
def _(w_codes, in_features, dtype):
    return torch.empty(w_codes.shape[0], in_features, dtype=dtype, device=w_codes.device)


@unpack_codes.register_kernel("cuda")
def _(w_codes, in_features, dtype):
    if in_features % _UNPACKED_BY_KERNEL:
        return unpack_int4(w_codes, in_features).contiguous().to(dtype)
    from pq_ao.ops.kernels.unpack import unpack

    return unpack(w_codes.contiguous(), dtype)


def _choose(x_codes: Tensor, w_codes: Tensor, act_bits: int | None) -> LinearPath:
    """The path of these codes; where nobody says, float8 codes have 4 bits and int8 codes up to 8."""
    if act_bits is None:
        act_bits = 4 if x_codes.dtype == torch.float8_e4m3fn else 8
    weight_bits = 4 if w_codes.dtype == torch.uint8 else 8
    tokens, in_features = x_codes.shape
    return linear_path(tokens, w_codes.shape[0], in_features, weight_bits, act_bits, capability_of(x_codes.device))


def _matmul(x_codes: Tensor, w_codes: Tensor, path: LinearPath, dtype: torch.dtype = torch.float32) -> Tensor:
    """Accumulators [M, N] by a matrix product of PyTorch: int32 from INT_MM, exact sums in `dtype` from E4M3."""
    if path is LinearPath.E4M3:
        weight = unpack_codes(w_codes, x_codes.shape[1], torch.float8_e4m3fn)
        one = torch.ones((), dtype=torch.float32, device=x_codes.device)
        # fast accumulation drops bits; without it every sum of 4-bit products is exact
        return torch._scaled_mm(x_codes.contiguous(), weight.t(), one, one, out_dtype=dtype, use_fast_accum=False)
    if x_codes.device.type == "cpu":
        return _accumulate(x_codes, w_codes)
    weight = unpack_codes(w_codes, x_codes.shape[1], torch.int8) if w_codes.dtype == torch.uint8 else w_codes
    return _int8_matmul(x_codes, weight)


def _as_read(x_codes: Tensor, path: LinearPath) -> Tensor:
    """Codes in the dtype that `path` reads; exact, for both dtypes hold 4-bit codes."""
    dtype = torch.float8_e4m3fn if path is LinearPath.E4M3 else torch.int8
    # by way of float32: Triton has no conversion between the two
    return x_codes if x_codes.dtype == dtype else x_codes.float().to(dtype)


def int_accumulate(
    x_codes: Tensor, w_codes: Tensor, path: LinearPath | None = None, act_bits: int | None = None
) -> Tensor:
    """Exact integer products: sum_k x[m, k] w[n, k].

    Args:
        x_codes: int8 [M, K], or float8_e4m3fn [M, K] holding 4-bit codes.
        w_codes: int8 [N, K], or uint8 [N, ceil(K / 2)] as `pack_int4` makes it.
        path: the path to take; None for the one that `linear_path` chooses.
        act_bits: 4 or 8; None means 4 for float8 codes, 8 for int8 codes.

    Returns:
        int32 [M, N]; exact while K * 2^(2 * bits - 2) < 2^31.
    """
    if path is None:
        path = _choose(x_codes, w_codes, act_bits)
    x_codes = _as_read(x_codes, path)
    if path in (LinearPath.DP4A, LinearPath.TILE):
        return packed_linear(x_codes, None, w_codes, None, None, torch.int32, path.value)
    return _matmul(x_codes, w_codes, path).to(torch.int32).contiguous()


def _carried(dtype: torch.dtype) -> torch.dtype:
    """In what E4M3 writes its sums for a model of `dtype`: half the bytes where those hold them all."""
    return dtype if dtype == torch.bfloat16 else torch.float32  # float16 ends at 65,504


def unscaled_linear(
    x_codes: Tensor, x_scale: Tensor, w_codes: Tensor, w_scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """Accumulators and their scale, for an op behind that does the epilogue as it reads them.

    Only where the epilogue would be a pass of its own: on the path E4M3 in bfloat16, with one static scale.

    Args:
        x_codes, x_scale, w_codes, w_scale: see `int_linear`.
        dtype: of the model.

    Returns:
        Exact sums [..., N] rounded to bfloat16, and float32 [N]; or None: call `int_linear`.
    """
    rows = x_codes.reshape(-1, x_codes.shape[-1])
    if dtype != torch.bfloat16 or x_scale.ndim > 1 or _choose(rows, w_codes, None) is not LinearPath.E4M3:
        return None
    accumulators = _matmul(_as_read(rows, LinearPath.E4M3), w_codes, LinearPath.E4M3, dtype)
    return accumulators.view(*x_codes.shape[:-1], -1), x_scale * w_scale


def int_linear(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    act_bits: int | None = None,
) -> Tensor:
    """y = accumulator * (x_scale * w_scale) + bias in float32, rounded to `dtype`.

    Accumulators are exact; on the path E4M3 in bfloat16 they are rounded to it before the scales are applied.

    Args:
        x_codes: int8 or float8_e4m3fn [..., K], see `int_accumulate`.
        x_scale: float32 (1,) static, or [..., 1] one for each row.
        w_codes, act_bits: see `int_accumulate`.
        w_scale: float32 [N].
        bias: float32 [N] or None.

    Returns:
        `dtype` [..., N].
    """
    rows = x_codes.reshape(-1, x_codes.shape[-1])
    shape = (*x_codes.shape[:-1], w_codes.shape[0])
    path = _choose(rows, w_codes, act_bits)
    rows = _as_read(rows, path)
    if path in (LinearPath.DP4A, LinearPath.TILE):
        x_scale = x_scale if x_scale.ndim == 1 else x_scale.reshape(-1, 1)
        return packed_linear(rows, x_scale, w_codes, w_scale, bias, dtype, path.value).view(shape)
    return _epilogue(_matmul(rows, w_codes, path, _carried(dtype)).view(shape), x_scale, w_scale, bias, dtype)
