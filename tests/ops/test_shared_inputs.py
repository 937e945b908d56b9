"""What several layers take is computed once in compiled code: ops that take any strides make Inductor copy nothing."""

import re

import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from pq_ao.ops import rope_store

B, L, H, G, D, S = 2, 3, 4, 2, 8, 16


@torch.no_grad()
def test_angles():
    def layers(qkv: Tensor, angles: Tensor, start: Tensor, *caches: Tensor) -> Tensor:
        cos, sin, out = angles.cos(), angles.sin(), 0
        for cache in (caches[:2], caches[2:]):
            out += rope_store(qkv, cos, sin, None, None, None, 0.0, *cache, *(None,) * 8, start, H, 16)
        return out

    inputs = (torch.randn(B, L, (H + 2 * G) * D), torch.randn(1, L, D), torch.tensor(2), *torch.zeros(4, B, G, S, D))
    with torch._inductor.config.patch(force_disable_caches=True):
        out, (code,) = run_and_get_code(torch.compile(layers, fullgraph=True), *inputs)
    calls = [arguments.split(", ") for arguments in re.findall(r"ops\.pq_ao\.rope_store\.default\((.*)\)", code)]
    assert out.shape == (B, L, H, D) and len(calls) == 2
    assert len({tuple(arguments[1:3]) for arguments in calls}) == 1  # cos and sin
