"""pq_ao::hadamard, the online rotations R3 and R4 (method sections 2.4 and 2.5)."""

import torch
from torch import Tensor

from pq_ao.hadamard import hadamard_transform


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
