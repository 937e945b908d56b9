"""Static scales of one block: statistics pass and MSE search (method section 4, in its corrected form).

Activation objectives: "tensor", the activation's own squared error, scored on a histogram; "block", the error of the
block's output with only that quantizer on. Grids are plain factors on the absmax scale; every run is masked causally
and sees the prefix.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from pq_ao.families import DecoderFamily
from pq_ao.modules import on_path
from pq_ao.ops.quantize import absmax_scale, code_range, dequantize, quantize
from pq_ao.quantizers import ActivationQuantizer, Path
from pq_ao.rounding import LayerInputs

SITES = ("attn_in", "o_in", "mlp_in", "down_in")

# factors on the absmax scale; o_in wants the hardest clipping, so the grid reaches down to 0.10 for all
_ACTIVATION_GRID = tuple(round(0.10 + 0.02 * i, 3) for i in range(46))
_BLOCK_COARSE = tuple(round(0.10 + 0.05 * i, 3) for i in range(19))
_BLOCK_FINE = (-0.04, -0.03, -0.02, -0.01, 0.01, 0.02, 0.03, 0.04)
_KV_COARSE = tuple(round(1 - i / 20, 3) for i in range(13))
_KV_FINE = (-0.025, 0.025)

_SEARCH_SEQUENCES = 8  # for objectives that run the block or its attention (method section 4.2)
_SEARCH_QUERIES = 128  # of each sequence, evenly spread, for the key search: keys matter to all of them alike
_HISTOGRAM_BINS = 16384
_RECORDED_BYTES = 2**31  # of a block's linear inputs, kept between passes where they fit


@dataclass
class SiteRange:
    """Range of one activation site, its shift taken off.

    Attributes:
        absmax: largest |x| over all tokens.
        histogram: float64 [bins] of x over [-absmax, absmax].
    """

    absmax: float
    histogram: Tensor


class BlockSites:
    """A decoder block, the hidden states that enter it, and its quantizers by name.

    Args:
        layer: decoder layer with our modules, on the FLOAT path.
        body: the calibration sequences on their way (`pq_ao.calibration`).
    """

    def __init__(self, layer: nn.Module, family: DecoderFamily, body):
        self.layer, self.body = layer, body
        self.attention = layer.get_submodule(family.attention)
        self.norm = layer.get_submodule(family.attention_norm)
        self.tokens = body.hidden.shape[0] * body.hidden.shape[1]
        self._recorded: list[tuple[str, Tensor]] | None = None
        self.quantizers: dict[str, ActivationQuantizer] = {
            "attn_in": self.norm.quantizer,
            "o_in": self.attention.o_in,
            "mlp_in": layer.get_submodule(family.mlp_norm).quantizer,
            "down_in": layer.get_submodule(family.mlp).down_in,
        }

    def observe(self) -> dict[str, SiteRange]:
        """Static mode: means and extremes over all sequences, from which come the shifts; then histograms.

        Raises:
            ValueError: an activation is NaN or Inf.
        """
        sums: dict[str, Tensor] = {}
        low: dict[str, Tensor] = {}
        high: dict[str, Tensor] = {}

        def extremes(site: str, x: Tensor) -> None:
            rows = x.flatten(0, -2)
            _accumulate(sums, site, rows.sum(dim=0, dtype=torch.float64))
            _accumulate(low, site, rows.amin(dim=0), torch.minimum)
            _accumulate(high, site, rows.amax(dim=0), torch.maximum)

        self._watch(extremes)
        absmax = {}
        for site, quantizer in self.quantizers.items():
            quantizer.shift.copy_(sums[site] / self.tokens)
            absmax[site] = float(torch.maximum(high[site] - quantizer.shift, quantizer.shift - low[site]).amax())
            if not absmax[site] < float("inf"):  # catches NaN as well
                raise ValueError(f"model: the activation {site} of a block is {absmax[site]}; check weights and data.")
        histograms: dict[str, Tensor] = {}

        def histogram(site: str, x: Tensor) -> None:
            x = x - self.quantizers[site].shift
            _accumulate(histograms, site, torch.histc(x, _HISTOGRAM_BINS, -absmax[site], absmax[site]).double())

        self._watch(histogram)
        return {site: SiteRange(absmax[site], histograms[site]) for site in SITES}

    def layer_inputs(self) -> dict[str, LayerInputs]:
        """A pass over all sequences, with the scales that are set now: what rounding needs (`pq_ao.rounding`)."""
        grams: dict[str, Tensor] = {}
        crosses: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}

        def products(site: str, x: Tensor) -> None:
            quantizer = self.quantizers[site]
            z = dequantize(*quantizer.codes(x)).flatten(0, -2)
            x = x.flatten(0, -2)
            x = x if quantizer.shift is None else x - quantizer.shift
            _accumulate(grams, site, z.T @ z)
            _accumulate(crosses, site, z.T @ x)
            _accumulate(sums, site, z.sum(dim=0, dtype=torch.float64))

        self._watch(products)
        return {
            site: LayerInputs(grams[site], crosses[site], quantizer.shift, (sums[site] / self.tokens).float())
            for site, quantizer in self.quantizers.items()
        }

    def _watch(self, observer) -> None:
        """Shows `observer` the input of every site, batch by batch; the block runs again only if they were too many."""
        if self._recorded is not None:
            for site, x in self._recorded:
                observer(site, x)
            return
        recorded: list[tuple[str, Tensor]] = []
        seen = 0

        def notice(site: str, x: Tensor) -> None:
            nonlocal seen
            observer(site, x)
            seen += x.nbytes
            if seen <= _RECORDED_BYTES:
                recorded.append((site, x))
            else:
                recorded.clear()

        for site, quantizer in self.quantizers.items():
            quantizer.observer = lambda x, site=site: notice(site, x)
        try:
            for batch in self.body.batches():
                self.body.run(self.layer, batch)
        finally:
            for quantizer in self.quantizers.values():
                quantizer.observer = None
        if seen <= _RECORDED_BYTES:
            self._recorded = recorded

    @cached_property
    def heads(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """q [1, H, T, D], k and v [1, G, T, D] of the first sequences, in float32."""
        return [
            tuple(t.float() for t in self.attention.project(self.norm(hidden), self.body.position_embeddings))
            for hidden in self.body.hidden[:_SEARCH_SEQUENCES].split(1)
        ]


def _accumulate(totals: dict[str, Tensor], site: str, value: Tensor, join=torch.add) -> None:
    totals[site] = join(totals[site], value) if site in totals else value


def _histogram_error(site: SiteRange, scale: float, bits: int) -> float:
    bins = site.histogram.numel()
    centres = torch.arange(bins, dtype=torch.float64, device=site.histogram.device)
    centres = ((centres + 0.5) * (2 / bins) - 1) * site.absmax
    low, high = code_range(bits)
    error = centres - torch.clamp(torch.round(centres / scale), low, high) * scale
    return float((site.histogram * error.square()).sum())


def search_activations(sites: BlockSites, ranges: dict[str, SiteRange], bits: int, search: str) -> dict[str, float]:
    """Sets the four static activation scales; returns them with their factors."""
    found: dict[str, float] = {}
    for site in ("o_in", "down_in", "attn_in", "mlp_in"):  # the order of method section 4.2
        start = float(absmax_scale(torch.tensor(ranges[site].absmax), bits))
        factor = 1.0
        if search == "tensor":
            factor = min(_ACTIVATION_GRID, key=lambda f: _histogram_error(ranges[site], start * f, bits))
        elif search == "block":
            factor = _search_block(sites, site, start)
        sites.quantizers[site].scale.fill_(start * factor)
        found |= {site: start * factor, f"{site}_factor": factor}
    return found


def _search_block(sites: BlockSites, site: str, start: float) -> float:
    """Factor with the least error of the block's output, only this quantizer on; ties to the larger factor."""
    batches = sites.body.batches(_SEARCH_SEQUENCES)
    targets = [sites.body.run(sites.layer, batch) for batch in batches]
    quantizer = sites.quantizers[site]

    def loss(factor: float) -> float:
        quantizer.scale.fill_(start * factor)
        total = 0.0
        with on_path([quantizer], Path.REFERENCE):
            for batch, target in zip(batches, targets, strict=True):
                total += float((sites.body.run(sites.layer, batch) - target).square().sum(dtype=torch.float64))
        return total

    losses = {factor: loss(factor) for factor in _BLOCK_COARSE}
    centre = min(losses, key=lambda f: (losses[f], -f))
    losses |= {round(centre + step, 3): loss(centre + step) for step in _BLOCK_FINE}
    return min(losses, key=lambda f: (losses[f], -f))


def _best_by_head(start: Tensor, search: str, loss) -> tuple[Tensor, Tensor]:
    """Factor and scale of each KV head by a plain grid; `loss` maps scales [G] to errors [G]."""
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


def search_values(sites: BlockSites, bits: int, search: str) -> dict[str, list[float]]:
    """Sets the value shifts and scales, each head by the squared error of its values."""
    values = torch.cat([value for _, _, value in sites.heads])  # [n, G, T, D]
    shift = values.mean(dim=(0, 2), keepdim=True)[0]
    sites.attention.kv.value_shift.copy_(shift)
    values = values - shift

    def loss(scale: Tensor) -> Tensor:
        scale = scale.view(-1, 1, 1)
        return (dequantize(quantize(values, scale, bits), scale) - values).square().sum(dim=(0, 2, 3))

    factor, scale = _best_by_head(absmax_scale(values.abs().amax(dim=(0, 2, 3)), bits), search, loss)
    sites.attention.kv.value_scale.copy_(scale)
    return {"value": scale.tolist(), "value_factor": factor.tolist()}


def search_keys(sites: BlockSites, bits: int, search: str) -> dict[str, list[float]]:
    """Sets the key shifts and scales, each head by the squared error of its attention output, prefix and mask included.

    The output, not the probabilities alone as in method section 4.2: an error on a token whose value matters little
    should count little.
    """
    attention = sites.attention
    groups = attention.kv_heads
    stride = max(1, sites.body.hidden.shape[1] // _SEARCH_QUERIES)
    mask = sites.body.mask[0, 0, ::stride]
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

    def loss(scale: Tensor) -> Tensor:
        scale = scale.view(-1, 1, 1)
        total = torch.zeros(groups, device=scale.device)
        for (query, key, value), target in zip(heads, targets, strict=True):
            error = outputs(query, dequantize(quantize(key, scale, bits), scale), value) - target
            total += error.square().sum(dim=(1, 2))
        return total

    targets = [outputs(*head) for head in heads]
    absmax = torch.stack([key.abs().amax(dim=(0, 2, 3)) for _, key, _ in heads]).amax(dim=0)
    factor, scale = _best_by_head(absmax_scale(absmax, bits), search, loss)
    attention.kv.key_scale.copy_(scale)
    return {"key": scale.tolist(), "key_factor": factor.tolist()}
