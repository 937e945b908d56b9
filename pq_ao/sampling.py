"""How the next token is chosen from logits."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Greedy choice, or a draw from the softmax at a temperature, cut to the likeliest tokens.

    Attributes:
        do_sample: False takes the likeliest token, and the rest does not matter.
        temperature: above 0.
        top_k: keep so many tokens; None for all.
        top_p: of these, keep the fewest whose probabilities add up to at least this; None for all.

    Raises:
        ValueError: a value out of its range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r}: must be above 0; for greedy choice do_sample=False.")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"top_k={self.top_k!r}: must be an integer of at least 1, or None for all tokens.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p!r}: must be above 0 and at most 1, or None for all tokens.")

    def choose(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """int64 [B] from logits [B, V]; nothing waits for the GPU."""
        if not self.do_sample:
            return logits.argmax(dim=-1)
        logits = logits.float() / self.temperature
        tokens = None
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits, tokens = logits.topk(self.top_k, dim=-1)  # sorted
        if self.top_p is not None and self.top_p < 1:
            if tokens is None:
                logits, tokens = logits.sort(dim=-1, descending=True)
            probabilities = logits.softmax(dim=-1)
            before = probabilities.cumsum(dim=-1) - probabilities
            logits = logits.masked_fill(before >= self.top_p, -torch.inf)  # the likeliest always stays
        # the largest of p / Exp(1) is distributed as p; multinomial would wait for the GPU
        noise = torch.empty_like(logits).exponential_(generator=generator)
        index = (logits.softmax(dim=-1) / noise).argmax(dim=-1, keepdim=True)
        return (index if tokens is None else tokens.gather(-1, index)).squeeze(-1)
