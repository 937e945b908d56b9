"""Channel balance between queries and keys, at no cost at run time.

Channels j and j + D / 2 of a key form a pair that RoPE turns together. Dividing both by a factor and multiplying those
of the queries leaves every score as it is. A few channels of keys are far larger than the others, and the rotation R3
spreads them, and so their quantization error, over channels that queries look at. Factors that balance the sizes of
keys and queries have the least error of the scores, by the argument of `pq_ao.balance`.
"""

import torch
from torch import Tensor

from pq_ao.block_sites import BlockSites
from pq_ao.hadamard import hadamard_transform, hadamard_transform_transpose
from pq_ao.modules import on_path, path_switches
from pq_ao.ops.quantize import dequantize, quantize, quantize_per_row
from pq_ao.quantizers import KVQuantizer, Path
from pq_ao.scale_search import Found, best_scale

_EXPONENTS = (0.375, 0.5, 0.625)  # of the keys' sizes; the queries' have what is missing to 1
_SEQUENCES, _TOKENS = 8, 256  # that candidates are tried on, and of each
_LARGEST = 1e2  # factor, over the median one
_TOKEN_CLIP = 0.9  # of the absmax, in dynamic mode


@torch.no_grad()
def balance_keys(sites: BlockSites) -> Found:
    """Balances the key heads of a rotated block in float32 that has its prefix; its function stays as it is.

    Left out where keys are not quantized, and where the model normalises its heads behind the projection.

    Returns:
        for the record, "key_balance": the exponent for each KV head, 0 for none; empty where left out.
    """
    attention = sites.attention
    if attention.kv.bits == 16 or attention.query_norm is not None:
        return {}
    rotated = attention.head_base is not None
    queries, keys = _heads(sites)
    prefix = attention.prefix_k
    if rotated:
        queries, keys, prefix = (hadamard_transform_transpose(x) for x in (queries, keys, prefix))
    factors, exponents = _best_factors(queries, keys, attention.kv, rotated)

    per_group = attention.query_heads // attention.kv_heads
    rows = torch.cat((factors.repeat_interleave(per_group, dim=0).flatten(), 1 / factors.flatten()))
    for parameter in (attention.qkv_proj.weight, attention.qkv_proj.bias):
        if parameter is not None:
            parameter[: rows.numel()] *= rows.view(-1, *[1] * (parameter.ndim - 1))
    prefix = prefix / factors[:, None]
    attention.prefix_k = hadamard_transform(prefix) if rotated else prefix
    return {"key_balance": exponents.tolist()}


def _heads(sites: BlockSites) -> tuple[Tensor, Tensor]:
    """Some queries [G, n, D] and keys [G, T, D] behind RoPE and R3, where nothing of this block is quantized."""
    attention, stride = sites.attention, max(1, sites.body.hidden.shape[1] // _TOKENS)
    queries, keys = [], []
    with on_path(path_switches(sites.layer), Path.FLOAT):
        for batch in sites.body.batches(_SEQUENCES):
            query, key, _ = attention.project(sites.norm(batch.hidden), batch.angles)
            query = query[:, :, ::stride].unflatten(1, (attention.kv_heads, -1))
            queries.append(query.transpose(0, 1).flatten(1, 3))
            keys.append(key[:, :, ::stride].transpose(0, 1).flatten(1, 2))
    return torch.cat(queries, dim=1), torch.cat(keys, dim=1)


def _best_factors(queries: Tensor, keys: Tensor, kv: KVQuantizer, rotated: bool) -> tuple[Tensor, Tensor]:
    """Factors [G, D] and, by head, the exponent that they come from."""
    keys = keys - keys.mean(dim=1, keepdim=True)  # as the quantizer's shift does
    sizes = [_pair_rms(x).clamp_min(1e-20) for x in (keys, queries)]
    best = keys.new_ones(keys.shape[0], keys.shape[2])
    lowest = _score_error(queries, keys, kv, rotated)
    chosen = torch.zeros_like(lowest)
    for exponent in _EXPONENTS:
        factors = sizes[0] ** exponent / sizes[1] ** (1 - exponent)
        factors = (factors / factors.median(dim=1, keepdim=True).values).clamp(1 / _LARGEST, _LARGEST)
        error = _score_error(queries * factors[:, None], keys / factors[:, None], kv, rotated)
        better = error < lowest
        best = torch.where(better[:, None], factors, best)
        chosen, lowest = torch.where(better, exponent, chosen), torch.minimum(error, lowest)
    return best, chosen


def _pair_rms(x: Tensor) -> Tensor:
    """[G, D], alike in both channels of a pair."""
    power = x.square().mean(dim=1)
    first, second = power.chunk(2, dim=-1)
    return ((first + second) / 2).sqrt().repeat(1, 2)


def _score_error(queries: Tensor, keys: Tensor, kv: KVQuantizer, rotated: bool) -> Tensor:
    """[G], sum of the squared errors of q k over all pairs of the queries and keys."""
    if rotated:
        queries, keys = hadamard_transform(queries), hadamard_transform(keys)
    if kv.dynamic:
        codes, scale = quantize_per_row(keys, keys.new_full((1,), _TOKEN_CLIP), kv.bits)
    else:
        scale = torch.stack([best_scale(head, kv.bits).reshape(()) for head in keys]).view(-1, 1, 1)
        codes = quantize(keys, scale, kv.bits)
    error = dequantize(codes, scale) - keys
    gram = queries.transpose(1, 2) @ queries
    return ((error @ gram) * error).sum(dim=(1, 2))
