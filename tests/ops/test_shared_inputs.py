"""What several layers take is computed once in compiled code: ops that take any strides make Inductor copy nothing."""

import re

import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from pq_ao.ops import cache_attention, rope_store

B, L, H, G, D, S = 2, 3, 4, 2, 8, 16


def _given(code: str, op: str, place: int) -> set[str]:
    """What the calls of an op, one a layer, take at a place."""
    calls = [arguments.split(", ") for arguments in re.findall(rf"ops\.pq_ao\.{op}\.default\((.*)\)", code)]
    assert len(calls) == 2
    return {arguments[place] for arguments in calls}


@torch.no_grad()
def test_angles_and_mask():
    def layers(qkv: Tensor, angles: Tensor, mask: Tensor, start: Tensor, *caches: Tensor) -> Tensor:
        cos, sin, visible, prefix = angles.cos(), angles.sin(), mask > 0, qkv.new_zeros(G, 0, D)
        out = 0
        for cache in (caches[:2], caches[2:]):
            query = rope_store(qkv, cos, sin, None, None, None, 0.0, *cache, *(None,) * 8, start, H, 16)
            out += cache_attention(
                query, *cache, None, None, None, None, prefix, prefix, start, visible, 0.5, None, None, 16, torch.int8
            )
        return out

    caches = torch.zeros(4, B, G, S, D)
    inputs = (torch.randn(B, L, (H + 2 * G) * D), torch.randn(1, L, D), torch.ones(B, S), torch.tensor(2), *caches)
    with torch._inductor.config.patch(force_disable_caches=True):
        out, (code,) = run_and_get_code(torch.compile(layers, fullgraph=True), *inputs)
    assert out.shape == (B, L, H * D)
    assert [len(_given(code, "rope_store", place)) for place in (1, 2)] == [1, 1]  # cos, sin
    assert len(_given(code, "cache_attention", 10)) == 1  # visible
