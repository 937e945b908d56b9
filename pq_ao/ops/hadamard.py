"""pq_ao::hadamard, the online rotations: R3 of queries and keys, R4 before down_proj."""

import torch
from torch import Tensor

from pq_ao.hadamard import hadamard_transform, hadamard_transform_transpose


@torch.library.custom_op("pq_ao::hadamard", mutates_args=())
def hadamard(x: Tensor, base: Tensor) -> Tensor:
    """Orthonormal Hadamard transform along the last axis, in float32.

    Args:
        x: [..., n], floating point.
        base: float32 [K, K], the factor of odd order, from `pq_ao.hadamard.hadamard_base(n)`.

    Returns:
        float32 [..., n].
    """
    return hadamard_transform(x, base).contiguous()


@hadamard.register_fake
def _(x: Tensor, base: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)


def _setup_context(ctx, inputs, output) -> None:
    x, base = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(base)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
    return hadamard_transform_transpose(grad, *ctx.saved_tensors).to(ctx.dtype), None


hadamard.register_autograd(_backward, setup_context=_setup_context)
