"""Hidden states of the calibration sequences on their way through the decoder, one block at a time."""

import os
import tempfile
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pq_ao.families import DecoderFamily

Storage = Literal["device", "host", "disk"]
STORAGES: tuple[Storage, ...] = ("device", "host", "disk")

# tokens that run through a block at once: bounds the memory of its activations
_TOKENS_AT_ONCE = 8192


class Stream:
    """Hidden states of some sequences, moved on block by block.

    Args:
        model: its embedding and rotary embedding are used, nothing else.
        family: where they are.
        ids: int64 [N, T].
        first_position: of each sequence; negative for a prefix.
        storage: where the hidden states lie: "device" (the model's), "host" (its memory) or "disk" (a temporary file,
            memory-mapped, gone with the stream).

    Attributes:
        hidden: float32 [N, T, d].
        position_embeddings: cos and sin, [1, T, D].
        mask: bool [1, 1, T, T], causal.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: DecoderFamily,
        ids: Tensor,
        first_position: int = 0,
        storage: Storage = "device",
    ):
        self.device = model.device
        count, length = ids.shape
        embedding = model.get_submodule(family.embedding)
        self.batch_size = max(1, _TOKENS_AT_ONCE // max(1, length))
        self.hidden = _room((count, length, model.config.hidden_size), self.device, storage)
        for stored, some in zip(self.hidden.split(self.batch_size), ids.split(self.batch_size), strict=True):
            stored.copy_(embedding(some.to(self.device)))
        positions = torch.arange(first_position, first_position + length, device=self.device)
        self.position_embeddings = model.get_submodule(family.rotary)(
            torch.empty(0, device=self.device), positions.unsqueeze(0)
        )
        self.mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=self.device).tril()

    @property
    def tokens(self) -> int:
        """How many, over all sequences."""
        return self.hidden.shape[0] * self.hidden.shape[1]

    def batches(self, limit: int | None = None) -> Iterator[Tensor]:
        """The first `limit` sequences, some at a time, on the device of the model."""
        for batch in self.hidden[:limit].split(self.batch_size):
            yield batch.to(self.device)

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """One decoder block on [n, T, d]."""
        return layer(hidden, attention_mask=self.mask, position_embeddings=self.position_embeddings)

    def advance(self, layer: nn.Module) -> None:
        """Moves all sequences through `layer`, in place."""
        for stored in self.hidden.split(self.batch_size):
            stored.copy_(self.run(layer, stored.to(self.device)))


def _room(shape: tuple[int, ...], device: torch.device, storage: Storage) -> Tensor:
    if storage == "device":
        return torch.empty(shape, device=device)
    if storage == "host":
        return torch.empty(shape, pin_memory=device.type == "cuda")
    size = torch.Size(shape).numel()
    handle, path = tempfile.mkstemp(prefix="pq_ao-hidden-")
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, max(1, size * 4))  # a full disk is an error here, a crash when written to
        return torch.from_file(path, shared=True, size=size, dtype=torch.float32).view(shape)
    finally:
        os.close(handle)
        os.unlink(path)  # the mapping keeps it alive, and nothing is left behind whatever happens
