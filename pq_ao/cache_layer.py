"""One layer of the packed static cache: what `update` writes and what attention reads.

Shape suffixes: B batch, G KV heads, S body slots, D head dim.
"""

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from pq_ao.ops import pack_int4


class PrefixStaticLayer(StaticLayer):
    """Keys and values of one decoder layer.

    Attributes:
        keys, values: uint8 [B, G, S, D / 2] (4 bits), int8 [B, G, S, D] (8 bits) or floats [B, G, S, D].
        key_scale, value_scale: float32 [B, G, S] in dynamic mode, else None (static scales are the attention's).
        cumulative_length: int64 0-dim tensor, tokens held: one for all layers, so that a step counts once. Changed in
            place only, for compiled steps keep its address.
        is_first, is_last: whether this layer checks the room for a step, and whether it counts its tokens.
    """

    is_croppable = True
    is_first = is_last = False

    def __init__(
        self, batch_size: int, kv_heads: int, max_cache_len: int, head_dim: int, bits: int, length: Tensor, **kwargs
    ):
        super().__init__(max_cache_len)
        self.batch_size, self.num_heads = batch_size, kv_heads
        self.k_head_dim = self.v_head_dim = head_dim
        self.bits = bits
        self.cumulative_length = length
        self._allocate(**kwargs)

    def _allocate(self, dtype: torch.dtype, device: torch.device, per_token_scales: bool) -> None:
        self.dtype, self.device = dtype, device
        slots = (self.batch_size, self.num_heads, self.max_cache_len)
        width = (self.k_head_dim + 1) // 2 if self.bits == 4 else self.k_head_dim
        self.keys = torch.zeros(*slots, width, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        scales = torch.zeros(*slots, device=device) if per_token_scales else None
        self.key_scale = scales
        self.value_scale = None if scales is None else scales.clone()
        for tensor in (self.keys, self.values, self.key_scale, self.value_scale, self.cumulative_length):
            if tensor is not None:
                # CUDA graphs are skipped for mutated inputs without a fixed address
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: everything is allocated on construction."""

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args,
        key_scale: Tensor | None = None,
        value_scale: Tensor | None = None,
        **kwargs,
    ) -> tuple["PrefixStaticLayer", "PrefixStaticLayer"]:
        """Appends keys and values and hands out the layer itself, so that they reach attention still packed.

        The fused path does without: `pq_ao::rope_store` writes the slots, between `check` and `advance`.

        Args:
            key_states, value_states: [B, G, L, D], int8 codes or floats, as the layer's bits ask for.
            key_scale, value_scale: float32 [B, G, L] in dynamic mode.

        Raises:
            ValueError: see `check`.
        """
        batch, _, length, _ = key_states.shape
        self.check(batch, length)
        if self.bits == 4:
            key_states, value_states = pack_int4(key_states), pack_int4(value_states)
        slots = torch.arange(length, device=self.device) + self.cumulative_length
        self.keys.index_copy_(2, slots, key_states)
        self.values.index_copy_(2, slots, value_states)
        if self.key_scale is not None:
            self.key_scale.index_copy_(2, slots, key_scale)
            self.value_scale.index_copy_(2, slots, value_scale)
        self.advance(length)
        return self, self

    def advance(self, length: int) -> None:
        """Counts `length` tokens as held, once all layers have stored them."""
        if self.is_last:
            self.cumulative_length.add_(length)

    def check(self, batch: int, length: int) -> None:
        """Refuses a step that does not fit; the room is looked at in eager steps only.

        Raises:
            ValueError: batch larger or smaller than the cache's, or more tokens than it has room for.
        """
        if batch != self.batch_size:
            raise ValueError(
                f"past_key_values: a batch of {batch} was given to a PrefixStaticCache with "
                f"batch_size={self.batch_size}; make one with batch_size={batch}."
            )
        if not self.is_first or torch.compiler.is_compiling():
            return
        held = int(self.cumulative_length)
        if held + length > self.max_cache_len:
            raise ValueError(
                f"past_key_values: the cache holds {held} of at most {self.max_cache_len} tokens and {length} more do "
                f"not fit; make a PrefixStaticCache with max_cache_len of at least {held + length}, or reset() it."
            )

    def reset(self) -> None:
        """Forgets the body; the prefix, kept elsewhere, stays."""
        super().reset()
        if self.key_scale is not None:
            self.key_scale.zero_()
            self.value_scale.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens.

        Args:
            tokens_to_remove: negative, as in transformers: crop(-3) forgets three tokens.

        Raises:
            ValueError: not negative, or more tokens than the cache holds.
        """
        held = int(self.cumulative_length)
        if not -held <= tokens_to_remove < 0:
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove}: must be between {-held} (all the tokens held) and -1, negative "
                "to say how many of the last tokens to forget."
            )
        self.advance(tokens_to_remove)  # slots behind it are masked, then overwritten

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the batch for beam search, in place: the addresses must stay."""
        for tensor in (self.keys, self.values, self.key_scale, self.value_scale):
            if tensor is not None:
                tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))
