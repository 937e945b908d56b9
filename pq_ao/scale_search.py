"""Shifts, static scales and clip factors of one block, by MSE search.

A factor multiplies the absmax of all tokens (static: a scale) or that of each token (dynamic: a clip factor).
Objectives for activations: "tensor", the activation's own squared error; "block", the error of the block's output with
that quantizer on. Grids are plain; every run is masked causally and sees the prefix.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pq_ao.block_sites import BlockSites, SiteRange
from pq_ao.fake_quantize import fake_quantize
from pq_ao.modules import on_path
from pq_ao.ops.quantize import absmax_scale, centre, code_range, code_values, dequantize, quantize_per_row
from pq_ao.quantizers import Path

# o_in wants the hardest clipping, so the grid reaches down to 0.10 for all
_ACTIVATION_GRID = tuple(round(0.10 + 0.02 * i, 3) for i in range(46))
_BLOCK_COARSE = tuple(round(0.10 + 0.05 * i, 3) for i in range(19))
_BLOCK_FINE = (-0.04, -0.03, -0.02, -0.01, 0.01, 0.02, 0.03, 0.04)
_KV_COARSE = tuple(round(1 - i / 20, 3) for i in range(13))
_KV_FINE = (-0.025, 0.025)
# a token's own absmax is far nearer to its other values than that of all tokens
_CLIP_GRID = tuple(round(0.40 + 0.02 * i, 3) for i in range(31))

_SEARCH_QUERIES = 128  # of each sequence, evenly spread, for the key search: keys matter to all of them alike

# what the record says of a site or of keys or values: "<name>" and "<name>_factor"
Found = dict[str, float | list[float]]


def search_activation(sites: BlockSites, site: str, bits: int, search: str) -> Found:
    """Sets shift and static scale, or clip factor, of an activation site; `search` is "tensor", "block" or "none"."""
    quantizer = sites.quantizers[site]
    if quantizer.dynamic:
        sites.set_shift(site)
        target, start = quantizer.clip, 1.0
        error = _clip_errors(sites, site, bits) if search == "tensor" else {}
    else:
        extent = sites.range(site)
        target, start = quantizer.scale, _absmax_scale(extent.absmax, bits, quantizer.code_set)
        error = _scale_errors(extent, start, bits, quantizer.code_set) if search == "tensor" else {}
    mean, middle = quantizer.shift.clone(), centre(quantizer.code_set)

    def put(factor: float) -> None:
        target.fill_(start * factor)
        quantizer.shift.copy_(mean - middle * target)

    factor = 1.0
    if search == "tensor":
        factor = min(error, key=error.__getitem__)
    elif search == "block":
        factor = _search_block(sites, site, put)
    put(factor)
    return {site: start * factor, f"{site}_factor": factor}


def best_scale(x: Tensor, bits: int, codes: str = "even") -> Tensor:
    """float32 scalar, the static scale of the least squared error of `x` itself, put where its codes are centred."""
    absmax = float(x.abs().amax())
    start = _absmax_scale(absmax, bits, codes)
    errors = _scale_errors(SiteRange.of(x, absmax), start, bits, codes)
    return x.new_tensor(start * min(errors, key=errors.__getitem__))


def _absmax_scale(absmax: float, bits: int, codes: str = "even") -> float:
    low, high = code_range(bits, codes)
    absmax *= (2**bits - 1) / (high - low)  # these codes reach so much further than even ones
    return float(absmax_scale(torch.tensor(absmax, dtype=torch.float32), bits))


def _scale_errors(extent: SiteRange, start: float, bits: int, codes: str = "even") -> dict[float, float]:
    """Squared error at each factor on the grid; in one piece, for a GPU waits at every number that is asked for.

    Values between two midpoints share a code, and their error follows from their number, sum and sum of squares. All
    three are differences of running sums over the histogram.
    """
    histogram = extent.histogram
    bins, device = histogram.numel(), histogram.device
    x = torch.arange(bins, dtype=torch.float64, device=device)
    x = ((x + 0.5) * (2 / bins) - 1) * extent.absmax
    moments = torch.stack((histogram, histogram * x, histogram * x.square()))
    below = nn.functional.pad(moments.cumsum(dim=1), (1, 0))

    places = torch.tensor(code_values(bits, codes), dtype=torch.float64, device=device) - centre(codes)
    scales = start * torch.tensor(_ACTIVATION_GRID, dtype=torch.float64, device=device)[:, None]
    midpoints = scales * (places[1:] + places[:-1]) / 2
    edges = nn.functional.pad(torch.searchsorted(x, midpoints), (1, 0))
    edges = nn.functional.pad(edges, (0, 1), value=bins)
    count, total, squares = below[:, edges].diff(dim=2)
    restored = scales * places
    errors = (count * restored.square() - 2 * restored * total + squares).sum(dim=1)
    return dict(zip(_ACTIVATION_GRID, errors.tolist(), strict=True))


def _clip_errors(sites: BlockSites, site: str, bits: int) -> dict[float, float]:
    shift = sites.quantizers[site].shift
    errors = torch.zeros(len(_CLIP_GRID), dtype=torch.float64, device=shift.device)
    for x in sites.inputs(site):
        x = x - shift
        for index, factor in enumerate(_CLIP_GRID):
            restored = dequantize(*quantize_per_row(x, x.new_full((1,), factor), bits))
            errors[index] += (restored - x).square().sum(dtype=torch.float64)
    return dict(zip(_CLIP_GRID, errors.tolist(), strict=True))


def _search_block(sites: BlockSites, site: str, set_factor: Callable[[float], object]) -> float:
    """Factor with the least error of the block's output, this quantizer and those before on; ties to the larger."""
    batches = sites.search_batches()
    targets = [sites.body.run(sites.layer, batch) for batch in batches]
    quantizer = sites.quantizers[site]

    def loss(factor: float) -> float:
        set_factor(factor)
        total = 0.0
        with on_path([quantizer], Path.REFERENCE):
            for batch, target in zip(batches, targets, strict=True):
                total += float((sites.body.run(sites.layer, batch) - target).square().sum(dtype=torch.float64))
        return total

    losses = {factor: loss(factor) for factor in _BLOCK_COARSE}
    centre = min(losses, key=lambda f: (losses[f], -f))
    losses |= {round(centre + step, 3): loss(centre + step) for step in _BLOCK_FINE}
    return min(losses, key=lambda f: (losses[f], -f))


def _best_by_head(start: Tensor, search: str, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Factor and scale (or clip factor) of each KV head by a plain grid; `loss` maps those [G] to errors [G]."""
    best = torch.ones_like(start)
    if search == "none":
        return best, start
    lowest = loss(start)
    for steps, refine in ((_KV_COARSE[1:], False), (_KV_FINE, True)):
        centre = best if refine else torch.zeros_like(best)
        for step in steps:
            factor = centre + step
            candidate = loss(start * factor)
            best = torch.where(candidate < lowest, factor, best)
            lowest = torch.minimum(candidate, lowest)
    return best, start * best


def _search_heads(
    sites: BlockSites, name: str, heads: Tensor, bits: int, search: str, loss: Callable[[Callable], Tensor]
) -> Found:
    """Sets scale or clip factor of "key" or "value" by head.

    Args:
        heads: [n, G, T, D], the shift taken off.
        loss: maps a function that quantizes and restores heads to errors [G].
    """
    kv = sites.attention.kv
    if kv.dynamic:
        start, target = heads.new_ones(heads.shape[1]), kv.get_buffer(f"{name}_clip")
    else:
        start = absmax_scale(heads.abs().amax(dim=(0, 2, 3)), bits)
        target = kv.get_buffer(f"{name}_scale")

    def restore(x: Tensor, value: Tensor) -> Tensor:
        value = value.view(-1, 1, 1)
        return dequantize(*quantize_per_row(x, value, bits)) if kv.dynamic else fake_quantize(x, value, bits)

    factor, found = _best_by_head(start, search, lambda value: loss(lambda x: restore(x, value)))
    target.copy_(found)
    return {name: found.tolist(), f"{name}_factor": factor.tolist()}


def search_values(sites: BlockSites, bits: int, search: str) -> Found:
    """Sets shift and scale (or clip factor) of the values, each head by the squared error of its values."""
    values = torch.cat([value for _, _, value in sites.heads])  # [n, G, T, D]
    shift = values.mean(dim=(0, 2), keepdim=True)[0]
    sites.attention.kv.value_shift.copy_(shift)
    values = values - shift
    return _search_heads(
        sites, "value", values, bits, search, lambda restore: (restore(values) - values).square().sum(dim=(0, 2, 3))
    )


def search_keys(sites: BlockSites, bits: int, search: str) -> Found:
    """Sets shift and scale (or clip factor) of the keys, each head by the squared error of its attention output.

    Prefix and mask included. The output, not the probabilities alone as in the paper's code: an error on a token
    whose value matters little should count little.
    """
    attention = sites.attention
    groups = attention.kv_heads
    stride = max(1, sites.body.hidden.shape[1] // _SEARCH_QUERIES)
    slot = torch.arange(sites.body.hidden.shape[1], device=sites.body.device)
    mask = slot <= slot[::stride, None]
    shift = torch.stack([key.mean(dim=(0, 2)) for _, key, _ in sites.heads]).mean(dim=0).unsqueeze(1)
    attention.kv.key_shift.copy_(shift)
    heads = [(query[:, :, ::stride], key - shift, value) for query, key, value in sites.heads]
    prefix_k, prefix_v = attention.prefix_k.float() - shift, attention.prefix_v.float()

    def outputs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = query[0].reshape(groups, -1, query.shape[-1]) * attention.scaling  # [G, H / G * queries, D]
        keys = torch.cat((prefix_k, key[0]), dim=1)
        scores = (query @ keys.transpose(1, 2)).unflatten(1, (-1, mask.shape[0]))
        scores[..., prefix_k.shape[1] :].masked_fill_(~mask, float("-inf"))
        probabilities = torch.softmax(scores, dim=-1).flatten(1, 2)
        return probabilities @ torch.cat((prefix_v, value[0]), dim=1)

    targets = [outputs(*head) for head in heads]

    def loss(restore: Callable[[Tensor], Tensor]) -> Tensor:
        total = shift.new_zeros(groups)
        for (query, key, value), target in zip(heads, targets, strict=True):
            total += (outputs(query, restore(key), value) - target).square().sum(dim=(1, 2))
        return total

    return _search_heads(sites, "key", torch.cat([key for _, key, _ in heads]), bits, search, loss)
