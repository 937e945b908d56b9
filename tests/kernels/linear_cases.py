"""Codes, scales and exact results that the tests of the linear's kernels share."""

import itertools

import torch

# the interpreter rounds to bfloat16 towards zero
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])


def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU in Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_codes(*shape: int, bits: int, seed: int = 0) -> torch.Tensor:
    """int8 codes of `bits` over their whole range, on `device()`."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, dtype=torch.int8, generator=generator).to(device())


def extremes(bits: int) -> list[tuple[int, int]]:
    """Pairs of the largest and smallest codes."""
    return list(itertools.product((-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), repeat=2))


def accumulators(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x w^T in int32 from codes; float64 on the GPU, which has no int64 product and is exact below 2^53."""
    wide = torch.float64 if x.is_cuda else torch.int64
    return (x.to(wide) @ w.to(wide).t()).to(torch.int32)


def scales(rows: int, outs: int, per_row: bool, with_bias: bool):
    """float32 x_scale ([M, 1] or (1,)), w_scale [N] and bias [N] or None."""
    generator = torch.Generator().manual_seed(2)
    x_scale = torch.rand((rows, 1) if per_row else (1,), generator=generator)
    w_scale, bias = torch.rand(outs, generator=generator), torch.randn(outs, generator=generator)
    return x_scale.to(device()), w_scale.to(device()), bias.to(device()) if with_bias else None


def epilogue(acc, x_scale, w_scale, bias, dtype) -> torch.Tensor:
    """acc * (x_scale * w_scale) + bias, each operation rounded to float32, then once to `dtype`."""
    y = (acc.float().double() * (x_scale.double() * w_scale.double()).float().double()).float()
    if bias is not None:
        y = (y.double() + bias.double()).float()
    return y.to(dtype)
