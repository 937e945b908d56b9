"""Hidden states of the calibration sequences on their way through the decoder, one block at a time."""

import math
import os
import tempfile
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pq_ao.families import DecoderFamily

Storage = Literal["device", "host", "disk"]
STORAGES: tuple[Storage, ...] = ("device", "host", "disk")

# tokens that run through a block at once: bounds the memory of its activations
_TOKENS_AT_ONCE = 8192

# each further multiple of it, modulo 1, falls into the largest gap that those before have left
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


class Sequences(NamedTuple):
    """Some sequences of a stream, on the device of the model.

    Attributes:
        hidden: [n, T, d].
        angles: cos and sin of their positions, [n, T, D].
    """

    hidden: Tensor
    angles: tuple[Tensor, Tensor]

    def split(self) -> Iterator["Sequences"]:
        """Each by itself."""
        for hidden, cos, sin in zip(self.hidden.split(1), *(angle.split(1) for angle in self.angles), strict=True):
            yield Sequences(hidden, (cos, sin))


class Stream:
    """Hidden states of some sequences, moved on block by block.

    Keys turn with their position, and so does their mean: static scales and shifts must have seen all positions that
    will occur. So each sequence begins somewhere else in the context, the first ones of a stream as evenly spread as
    all of them.

    Args:
        model: its embedding and rotary embedding are used, nothing else.
        family: where they are.
        ids: int64 [N, T].
        first_position: of the first sequence; negative for a prefix.
        context: positions, from 0, that the other sequences are spread over; up to T they all begin like the first.
        storage: where the hidden states lie: "device" (the model's), "host" (its memory) or "disk" (a temporary file,
            memory-mapped, gone with the stream).

    Attributes:
        hidden: float32 [N, T, d].
        first_positions: int64 [N].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: DecoderFamily,
        ids: Tensor,
        first_position: int = 0,
        storage: Storage = "device",
        context: int = 0,
    ):
        self.device = model.device
        count, length = ids.shape
        embedding = model.get_submodule(family.embedding)
        self.batch_size = max(1, _TOKENS_AT_ONCE // max(1, length))
        self.hidden = _room((count, length, model.config.hidden_size), self.device, storage)
        for stored, some in zip(self.hidden.split(self.batch_size), ids.split(self.batch_size), strict=True):
            stored.copy_(embedding(some.to(self.device)))
        spread = torch.arange(count, dtype=torch.float64) * _GOLDEN_RATIO % 1 * max(0, context - length)
        self.first_positions = (first_position + spread).long()
        self.rotary = model.get_submodule(family.rotary)

    @property
    def tokens(self) -> int:
        """How many, over all sequences."""
        return self.hidden.shape[0] * self.hidden.shape[1]

    def sequences(self, chosen: slice | Tensor) -> Sequences:
        """Those of a slice or of indices, int64 [n] on the CPU."""
        at_home = chosen if isinstance(chosen, slice) else chosen.to(self.hidden.device)
        hidden = self.hidden[at_home].to(self.device)
        positions = self.first_positions[chosen, None] + torch.arange(hidden.shape[1])
        return Sequences(hidden, self.rotary(self.hidden.new_empty(0, device=self.device), positions.to(self.device)))

    def batches(self, limit: int | None = None) -> Iterator[Sequences]:
        """The first `limit` sequences, some at a time."""
        for chosen in self._chosen(limit):
            yield self.sequences(chosen)

    def run(self, layer: nn.Module, sequences: Sequences) -> Tensor:
        """One decoder block on some sequences, causally: [n, T, d]."""
        return layer(sequences.hidden, attention_mask=None, position_embeddings=sequences.angles)

    def advance(self, layer: nn.Module) -> None:
        """Moves all sequences through `layer`, in place."""
        for chosen in self._chosen(None):
            self.hidden[chosen] = self.run(layer, self.sequences(chosen)).to(self.hidden)

    def _chosen(self, limit: int | None) -> Iterator[slice]:
        count = len(self.hidden[:limit])
        for start in range(0, count, self.batch_size):
            yield slice(start, min(start + self.batch_size, count))


def _room(shape: tuple[int, ...], device: torch.device, storage: Storage) -> Tensor:
    if storage == "device":
        return torch.empty(shape, dtype=torch.float32, device=device)
    if storage == "host":
        return torch.empty(shape, dtype=torch.float32, pin_memory=device.type == "cuda")
    size = torch.Size(shape).numel()
    handle, path = tempfile.mkstemp(prefix="pq_ao-hidden-")
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, max(1, size * 4))  # a full disk is an error here, a crash when written to
        return torch.from_file(path, shared=True, size=size, dtype=torch.float32).view(shape)
    finally:
        os.close(handle)
        os.unlink(path)  # the mapping keeps it alive, and nothing is left behind whatever happens
