"""Fast generation: compiled prefill and decode over a static cache, as CUDA graphs on a GPU.

Shape suffixes: B batch, L tokens, S slots of the cache, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, StaticCache

from pq_ao.cache import PrefixStaticCache
from pq_ao.families import head_dim_of
from pq_ao.modules import PrefixAttention
from pq_ao.prefill_chunks import DEFAULT_BUCKETS, checked_buckets, chunks
from pq_ao.sampling import Sampling
from pq_ao.static_step import MODES_WITH_GRAPHS, StaticStep, recommended_compile_options
from pq_ao.token_inputs import check_ids, left_padding

# slots beyond `max_cache_len`, so that the last chunk of a prompt can be filled up
_SPARE_SLOTS = DEFAULT_BUCKETS[0]


class GenerationEngine:
    """Generates text from one model and one cache, without compiling again for another prompt or another step.

    A prompt runs in chunks of a few fixed lengths, each compiled once, on its first use. The last chunk is filled up
    **at its end**: later tokens are invisible to earlier ones, the logits are taken at the last real token, and the
    cache is set back, so that the filling is overwritten by what comes next. Results are exact, no mask is needed, and
    four graphs serve every length; a prompt filled up at its start would need a mask for its whole life.

    Args:
        model: a quantized model, which gets a `PrefixStaticCache`, or any other decoder of transformers with full
            attention, which gets a `StaticCache`. The graphs hold the model as it is at their first use: after a
            change (device, weights, attention implementation) make a new engine.
        batch_size: rows of every batch.
        max_cache_len: tokens of prompt and reply together.
        compile: False runs the model eagerly, without graphs: to look for errors.
        compile_options: more keyword arguments of torch.compile, such as {"mode": "max-autotune-no-cudagraphs"}; by
            default `recommended_compile_options`.
        prefill_buckets: lengths of the chunks; by default 32, 128, 512 and 2048, as far as they fit.

    Attributes:
        cache: the cache.

    Raises:
        ValueError: sizes that are not positive integers, a bucket that is below 2 or exceeds the cache, a model with
            sliding-window attention, or a compile mode that records CUDA graphs.

    Example::

        engine = pq_ao.GenerationEngine(model, batch_size=1, max_cache_len=4096)
        out = engine.generate(**tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=64)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch_size: int = 1,
        max_cache_len: int = 4096,
        *,
        compile: bool = True,
        compile_options: dict[str, Any] | None = None,
        prefill_buckets: Sequence[int] | None = None,
    ):
        if compile_options is not None and compile_options.get("mode") in MODES_WITH_GRAPHS:
            raise ValueError(
                f"compile_options: mode={compile_options['mode']!r} records CUDA graphs, which the engine does itself; "
                "use 'default' or 'max-autotune-no-cudagraphs'."
            )
        for name, size in (("batch_size", batch_size), ("max_cache_len", max_cache_len)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name}={size!r}: must be an integer of at least 1.")
        self.model, self.batch_size, self.max_cache_len = model, batch_size, max_cache_len
        self.device = model.device
        self.buckets = checked_buckets(prefill_buckets, batch_size, max_cache_len)
        slots = max_cache_len + _SPARE_SLOTS
        self.cache = _cache_for(model, batch_size, max_cache_len)
        self._compile, self._compile_options = compile, compile_options
        self._steps: dict[tuple[int, bool], StaticStep] = {}
        graphs = compile and self.device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if graphs else None
        lengths = [layer.cumulative_length for layer in self.cache.layers]
        self._lengths = list({id(length): length for length in lengths}.values())  # layers may share one
        self._visible = torch.ones(batch_size, slots, dtype=torch.bool, device=self.device)
        self._held = 0  # tokens in the cache, as the host knows it
        self._masked = False  # whether some slot of `_visible` is False
        self._positions: Tensor | None = None  # [B, 1] of the next token, where rows differ
        self._turn = 0  # tells a stream whether the cache is still its own
        self._pending: tuple[Tensor, Tensor] | None = None  # last tokens given out, not in the cache yet; which count

    def reset(self) -> None:
        """Forgets all tokens. What was compiled stays."""
        self._turn += 1
        self._set_length(0)
        self._visible.fill_(True)
        self._masked, self._positions, self._pending = False, None, None

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Appends tokens to the cache.

        Args:
            input_ids: integers [B, L].
            attention_mask: [B, L], 0 for padding on the left, else 1; None for none.

        Returns:
            [B, V] logits of the last token, valid until the next prefill or decode: clone what must survive.

        Raises:
            ValueError: wrong shape or batch, no tokens, ids that the model does not have, padding elsewhere than on
                the left, or more tokens than the cache has room for.
            TypeError: ids that are not integers.
        """
        input_ids, mask = self._checked(input_ids, attention_mask)
        self._held = int(self.cache.get_seq_length())  # the cache may have been used without the engine
        self._check_room(input_ids.shape[1])
        self._turn, self._pending = self._turn + 1, None
        return self._append(input_ids, mask)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Appends one token a row.

        Args:
            tokens: int64 [B], on the model's device.

        Returns:
            [B, V] logits, valid until the next prefill or decode.

        Raises:
            ValueError: the cache is full.
        """
        self._check_room(1)
        self._pending = None
        inputs = [tokens.view(self.batch_size, 1)]
        if self._masked:
            inputs.append(self._positions)
            self._positions = self._positions + 1
        logits = self._step(1)(*inputs)
        self._held += 1
        return logits

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, streamer=None, **options) -> Tensor:
        """Generates a whole reply.

        Args:
            input_ids, attention_mask: see `prefill`.
            streamer: a streamer of transformers, such as `TextStreamer`, that gets the prompt and each new token.
            options: see `stream`.

        Returns:
            int64 [B, L + new tokens] on the model's device: prompt and reply, as from `model.generate`.
        """
        tokens = self.stream(input_ids, attention_mask, **options)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        reply = []
        for token in tokens:
            reply.append(token)
            if streamer is not None:
                streamer.put(token)
        if streamer is not None:
            streamer.end()
        return torch.cat((input_ids.to(self.device), torch.stack(reply, dim=1).to(self.device)), dim=1)

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 128,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        generator: torch.Generator | None = None,
        append: bool = False,
    ) -> Iterator[Tensor]:
        """Yields the new tokens of each step as int64 [B] on the CPU, while the GPU is one step ahead.

        Stops after `max_new_tokens`, or when every row has given an end-of-sequence token; rows that are finished
        give padding. Stop early by leaving the loop: the cache then holds what was given out.

        Args:
            input_ids, attention_mask: see `prefill`.
            max_new_tokens: at least 1.
            do_sample, temperature, top_k, top_p: see `pq_ao.sampling.Sampling`.
            eos_token_id: one or several; None for those of `model.generation_config`, an empty tuple for none.
            pad_token_id: None for that of `model.generation_config`, or else the first end-of-sequence token.
            generator: of random numbers, on the model's device; None for the default one.
            append: False begins a new text. True goes on from what the cache holds: `input_ids` are the new tokens of
                the conversation alone.

        Raises:
            ValueError, TypeError: see `prefill`, `Sampling`; or prompt and `max_new_tokens` exceed the cache.
        """
        sampling = Sampling(do_sample, temperature, top_k, top_p)
        if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens!r}: must be an integer of at least 1.")
        ids, mask = self._checked(input_ids, attention_mask)
        if not append:
            self.reset()
        self._held = int(self.cache.get_seq_length())
        ids, mask = self._with_pending(ids, mask)
        self._check_room(ids.shape[1] + max_new_tokens)
        ends, pad = self._special_tokens(eos_token_id, pad_token_id)
        self._turn += 1
        return self._run(self._turn, ids, mask, max_new_tokens, sampling, ends, pad, generator)

    @torch.no_grad()
    def _run(
        self,
        turn: int,
        ids: Tensor,
        mask: Tensor | None,
        max_new_tokens: int,
        sampling: Sampling,
        ends: Tensor,
        pad: int,
        generator: torch.Generator | None,
    ) -> Iterator[Tensor]:
        self._check_turn(turn)
        token = sampling.choose(self._append(ids, mask), generator)
        start, given = self._held, []
        finished = torch.zeros(self.batch_size, dtype=torch.bool, device=self.device)
        ends_here, finished_here = ends.to(self.device), finished.cpu()
        arrival = _Arrival(token)
        try:
            for left in reversed(range(max_new_tokens)):
                self._check_turn(turn)
                if len(ends):
                    token = token.masked_fill(finished, pad)
                    finished |= torch.isin(token, ends_here)
                arrival.send(token)
                upcoming = sampling.choose(self.decode(token), generator) if left else token
                given.append(arrival.wait())
                finished_here |= torch.isin(given[-1], ends)
                yield given[-1]
                if finished_here.all():
                    break
                token = upcoming
        finally:
            if turn == self._turn:
                self._keep(start, given, ends)

    def _check_turn(self, turn: int) -> None:
        if turn != self._turn:
            raise RuntimeError("stream: another stream, prefill or reset of this engine has taken its cache over.")

    def _keep(self, start: int, given: list[Tensor], ends: Tensor) -> None:
        """Sets the cache back to what was given out, and hides the padding of finished rows from later turns."""
        self._set_length(start + max(0, len(given) - 1))
        if not given:
            return
        is_end = torch.isin(torch.stack(given, dim=1), ends)
        counts = (is_end.cumsum(dim=1) - is_end.long() == 0).to(self.device)  # up to and with the first end
        self._pending = given[-1].to(self.device), counts[:, -1]
        if not bool(counts[:, :-1].all()):
            self._mask_from(start)
            self._visible[:, start : self._held] = counts[:, :-1]
        if self._masked:
            self._positions = self._visible[:, : self._held].sum(dim=1, keepdim=True)

    def _with_pending(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Puts the last tokens of the reply, which the cache has not seen yet, in front."""
        if self._pending is None:
            return ids, mask
        (tokens, counts), self._pending = self._pending, None
        if mask is not None or not bool(counts.all()):
            mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
            mask = torch.cat((counts[:, None], mask), dim=1)
        return torch.cat((tokens[:, None], ids), dim=1), mask

    def _append(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        held, length = self._held, ids.shape[1]
        if mask is not None:
            self._mask_from(held)
        positions = None
        if self._masked:
            mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
            seen = self._visible[:, :held].sum(dim=1, keepdim=True)
            self._visible[:, held : held + length] = mask
            positions = (seen + mask.cumsum(dim=1) - 1).clamp_min(0)
            self._positions = positions[:, -1:] + 1
        done, logits = 0, None
        for bucket, used in chunks(length, self._visible.shape[1] - held, self.buckets, self.batch_size):
            part, fill = slice(done, done + used), (0, bucket - used)
            inputs = [F.pad(ids[:, part], fill)]
            if bucket > 1:
                inputs.append(torch.full((1,), used - 1, device=self.device))
            if positions is not None:
                inputs.append(F.pad(positions[:, part], fill))
            logits = self._step(bucket)(*inputs)
            done += used
            self._set_length(held + done)
        return logits

    def _step(self, length: int) -> StaticStep:
        """The compiled call for `length` tokens."""
        masked = self._masked
        if (length, masked) not in self._steps:

            def forward(ids: Tensor, *rest: Tensor) -> Tensor:
                output = self.model(
                    input_ids=ids,
                    attention_mask=self._visible if masked else None,
                    position_ids=rest[-1] if masked else None,
                    past_key_values=self.cache,
                    use_cache=True,
                    logits_to_keep=1 if length == 1 else rest[0],
                )
                return output.logits[:, -1]

            options = self._compile_options if self._compile else None
            if self._compile and options is None:
                options = recommended_compile_options(self.device, self.batch_size * length)
            self._steps[length, masked] = StaticStep(forward, options, lambda: self._set_length(self._held), self._pool)
        return self._steps[length, masked]

    def _set_length(self, held: int) -> None:
        self._held = held
        for length in self._lengths:
            length.fill_(held)

    def _mask_from(self, slot: int) -> None:
        self._visible[:, slot:] = True
        self._masked = True

    def _special_tokens(self, eos: int | Sequence[int] | None, pad: int | None) -> tuple[Tensor, int]:
        config = self.model.generation_config
        eos = config.eos_token_id if eos is None else eos
        ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        pad = config.pad_token_id if pad is None else pad
        if pad is None:
            pad = ends[0] if ends else 0
        return torch.tensor(ends, dtype=torch.int64), pad

    def _check_room(self, length: int) -> None:
        if self._held + length > self.max_cache_len:
            raise ValueError(
                f"max_cache_len={self.max_cache_len}: the cache holds {self._held} tokens; {length} more (prompt and "
                f"reply) do not fit; make an engine with max_cache_len={self._held + length} or more, or "
                "reset() this one."
            )

    def _checked(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """ids int64, and a boolean mask or None if it hides nothing; both on the device."""
        rows = self.model.get_input_embeddings().weight.shape[0]
        check_ids(ids, self.batch_size, rows, "this engine takes", "make an engine")
        if mask is not None:
            mask = left_padding(mask, ids)
            mask = None if mask.all() else mask.to(self.device)
        return ids.to(self.device, torch.int64), mask


class _Arrival:
    """Copies tokens to the CPU without waiting for work that was queued behind them."""

    def __init__(self, like: Tensor):
        on_gpu = like.device.type == "cuda"
        self.buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=on_gpu)
        self.event = torch.cuda.Event() if on_gpu else None

    def send(self, token: Tensor) -> None:
        self.buffer.copy_(token, non_blocking=True)
        if self.event is not None:
            self.event.record()

    def wait(self) -> Tensor:
        if self.event is not None:
            self.event.synchronize()
        return self.buffer.clone()


def _cache_for(model: PreTrainedModel, batch_size: int, max_cache_len: int) -> Cache:
    if any(isinstance(module, PrefixAttention) for module in model.modules()):
        return PrefixStaticCache(model, batch_size, max_cache_len, spare_slots=_SPARE_SLOTS)
    cache = StaticCache(config=model.config, max_cache_len=max_cache_len + _SPARE_SLOTS)
    if any(layer.is_sliding for layer in cache.layers):
        raise ValueError(
            f"model: {model.config.model_type!r} has sliding-window attention, whose cache cannot be set back; use "
            "model.generate."
        )
    config = model.config.get_text_config(decoder=True)
    heads = config.num_key_value_heads
    cache.early_initialization(batch_size, heads, head_dim_of(config), model.dtype, model.device)
    return cache
