"""What flows through a decoder block in calibration: the inputs of its four linears, its keys and its values."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from pq_ao.families import DecoderFamily
from pq_ao.linears import CalibratedLinear
from pq_ao.modules import on_path, path_switches
from pq_ao.ops.quantize import dequantize
from pq_ao.quantizers import ActivationQuantizer, Path
from pq_ao.rounding import LayerInputs
from pq_ao.streams import Sequences, Stream

# A1 to A4 in the order that a block reaches them
SITES = ("attn_in", "o_in", "mlp_in", "down_in")

_SEARCH_SEQUENCES = 8  # for objectives that run the block or its attention
_HISTOGRAM_BINS = 16384
# Means, ranges and Gram matrices of more change nothing that could be seen, and each is a pass in float32.
MOST_TOKENS = 2**17
_RECORDED_BYTES = 2**31  # of a site's inputs, kept between passes where they fit


@dataclass
class SiteRange:
    """Range of one activation site, its shift taken off.

    Attributes:
        absmax: largest |x| over all tokens.
        histogram: float64 [bins] of x over [-absmax, absmax].
    """

    absmax: float
    histogram: Tensor

    @classmethod
    def of(cls, x: Tensor, absmax: float) -> "SiteRange":
        """Of values up to absmax."""
        return cls(absmax, torch.histc(x, _HISTOGRAM_BINS, -absmax, absmax).double())


class _Reached(Exception):
    """Ends a pass at its site: nothing behind it is needed."""


class BlockSites:
    """A decoder block, the sequences that enter it, and its quantizers and linears by site.

    A pass runs the block as its switches stand: what was rounded and is on the REFERENCE path is quantized already.

    Args:
        layer: decoder layer with our modules.
        family: where they are.
        body: the sequences, as the quantized blocks before have left them.

    Attributes:
        sequences: the first so many are looked at, `MOST_TOKENS` tokens at most (or one sequence).
        tokens: in them.
    """

    def __init__(self, layer: nn.Module, family: DecoderFamily, body: Stream):
        self.layer, self.body = layer, body
        self.attention = layer.get_submodule(family.attention)
        self.norm = layer.get_submodule(family.attention_norm)
        mlp = layer.get_submodule(family.mlp)
        self.quantizers: dict[str, ActivationQuantizer] = {
            "attn_in": self.norm.quantizer,
            "o_in": self.attention.o_in,
            "mlp_in": layer.get_submodule(family.mlp_norm).quantizer,
            "down_in": mlp.down_in,
        }
        self.linears: dict[str, CalibratedLinear] = {
            "attn_in": self.attention.qkv_proj,
            "o_in": self.attention.o_proj,
            "mlp_in": mlp.gate_up_proj,
            "down_in": mlp.down_proj,
        }
        count, length = body.hidden.shape[:2]
        # the first ones of a stream are spread over its positions like all of them
        self.sequences = min(count, max(1, MOST_TOKENS // length))
        self.tokens = self.sequences * length
        self._recorded: tuple[str, list[Tensor]] = ("", [])

    def inputs(self, site: str) -> Iterator[Tensor]:
        """Inputs of a site on the quantized path, float32 [tokens, K], batch by batch."""
        if self._recorded[0] == site:
            yield from self._recorded[1]
            return
        fits = self.tokens * self.linears[site].in_features * 4 <= _RECORDED_BYTES
        recorded = []
        for batch in self.body.batches(self.sequences):
            x = self._input(site, batch)
            yield x
            if fits:
                recorded.append(x)
        if fits:
            self._recorded = (site, recorded)

    def float_inputs(self, site: str) -> Iterator[Tensor]:
        """The same inputs where nothing of this block is quantized."""
        for batch in self.body.batches(self.sequences):
            with on_path(path_switches(self.layer), Path.FLOAT):
                x = self._input(site, batch)
            yield x

    def float_sample(self, names: tuple[str, ...], tokens: int) -> tuple[dict[str, Tensor], Tensor]:
        """Some tokens, evenly spread, where nothing of this block is quantized.

        Returns:
            inputs of the sites, float32 [T, K] each; and how much a squared error of the block's output matters for
            each token, float32 [T]: what comes next is a norm, so as much as the output is small.
        """
        stride = max(1, self.tokens // tokens)
        inputs: dict[str, list[Tensor]] = {name: [] for name in names}
        importance = []
        for name in names:
            kept = inputs[name]
            self.quantizers[name].observer = lambda x, kept=kept: kept.append(x.flatten(0, -2)[::stride].clone())
        try:
            with on_path(path_switches(self.layer), Path.FLOAT):
                for batch in self.body.batches(self.sequences):
                    output = self.body.run(self.layer, batch).flatten(0, -2)[::stride]
                    importance.append(1 / output.square().mean(dim=1).clamp_min(1e-20))
        finally:
            for name in names:
                self.quantizers[name].observer = None
        return {name: torch.cat(parts) for name, parts in inputs.items()}, torch.cat(importance)

    def _input(self, site: str, batch: Sequences) -> Tensor:
        def reached(x: Tensor) -> None:
            raise _Reached(x.flatten(0, -2))

        self.quantizers[site].observer = reached
        try:
            self.body.run(self.layer, batch)
        except _Reached as end:
            return end.args[0]
        finally:
            self.quantizers[site].observer = None
        raise RuntimeError(f"{type(self.layer).__name__} never came to its site {site}")

    def set_shift(self, site: str) -> float:
        """Gives the quantizer of a site the mean of each channel as its shift; returns the largest |x - shift|.

        Raises:
            ValueError: an activation is NaN or Inf.
        """
        total = low = high = None
        for x in self.inputs(site):
            sums, lows, highs = x.sum(dim=0, dtype=torch.float64), x.amin(dim=0), x.amax(dim=0)
            if total is None:
                total, low, high = sums, lows, highs
            else:
                total, low, high = total + sums, torch.minimum(low, lows), torch.maximum(high, highs)
        shift = self.quantizers[site].shift.copy_(total / self.tokens)
        absmax = float(torch.maximum(high - shift, shift - low).amax())
        if not absmax < float("inf"):  # catches NaN as well
            raise ValueError(f"model: the activation {site} of a block is {absmax}; check weights and data.")
        return absmax

    def range(self, site: str) -> SiteRange:
        """Sets the shift of a site, see `set_shift`, and says how x - shift is spread."""
        absmax = self.set_shift(site)
        shift = self.quantizers[site].shift
        histogram = sum(SiteRange.of(x - shift, absmax).histogram for x in self.inputs(site))
        return SiteRange(absmax, histogram)

    def layer_inputs(self, site: str) -> LayerInputs:
        """What rounding needs, with the scales that are set now."""
        quantizer, width, tokens = self.quantizers[site], self.linears[site].in_features, self.tokens
        device = self.body.device
        gram, cross = (torch.zeros(width, width, dtype=torch.float32, device=device) for _ in range(2))
        means = torch.zeros(2, width, dtype=torch.float64, device=device)
        # one shift for both, so that taking off the means afterwards costs no digits
        shift = quantizer.shift
        for x, exact in zip(self.inputs(site), self.float_inputs(site), strict=True):
            z = dequantize(*quantizer.codes(x))
            exact = exact - shift
            gram += z.T @ z
            cross += z.T @ exact
            means += torch.stack((exact.sum(dim=0, dtype=torch.float64), z.sum(dim=0, dtype=torch.float64)))
        exact_mean, quantized_mean = (means / tokens).float()
        gram -= tokens * torch.outer(quantized_mean, quantized_mean)
        cross -= tokens * torch.outer(quantized_mean, exact_mean)
        return LayerInputs(gram, cross, exact_mean + shift, quantized_mean, tokens)

    @cached_property
    def heads(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """q [1, H, T, D], k and v [1, G, T, D] of the first sequences, in float32."""
        return [
            tuple(t.float() for t in self.attention.project(self.norm(one.hidden), one.angles))
            for batch in self.body.batches(_SEARCH_SEQUENCES)
            for one in batch.split()
        ]

    def forget(self) -> None:
        """Frees the inputs and heads that were kept between passes: fine-tuning wants their memory."""
        self._recorded = ("", [])
        self.__dict__.pop("heads", None)

    def search_batches(self) -> list[Sequences]:
        """The first sequences, for objectives that run the whole block."""
        return list(self.body.batches(_SEARCH_SEQUENCES))
