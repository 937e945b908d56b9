"""A model that replies to texts, streaming to the terminal, and the speed at which it did."""

import argparse
import time
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import pq_ao
from recipes.terminal import print_reply, step

MOST_CACHE = 4096  # tokens of the cache where none are asked for


class Speaker:
    """A model, its engine and its tokenizer; adds up tokens and seconds of all replies."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace):
        self.tokenizer, self.arguments = tokenizer, arguments
        length = arguments.max_cache_len or min(MOST_CACHE, model.config.get_text_config().max_position_embeddings)
        on_gpu = model.device.type == "cuda"
        compiled = on_gpu if arguments.compile is None else arguments.compile
        self.engine = pq_ao.GenerationEngine(model, batch_size=1, max_cache_len=length, compile=compiled)
        self.generator = torch.Generator(model.device).manual_seed(arguments.seed)
        if compiled:
            step("compiling, once for each length of a chunk")
            for bucket in (1, *self.engine.buckets):
                self.engine.reset()
                self.engine.prefill(torch.zeros(1, bucket, dtype=torch.int64))
        self.prompt_tokens = self.reply_tokens = 0
        self.prefill_s = self.decode_s = 0.0

    def reply(self, text: str, add_special_tokens: bool) -> str:
        """Prints the reply to a text; returns it."""
        # of the prefix nothing is added: it is hidden in the model
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=add_special_tokens).input_ids
        room = self.engine.max_cache_len - ids.shape[1]
        if room < 1 or ids.shape[1] < 1:
            raise ValueError(
                f"the text has {ids.shape[1]} tokens and the cache room for {self.engine.max_cache_len}, a reply "
                "included; give at least one token, or a larger --max-cache-len."
            )
        arguments = self.arguments
        stream = self.engine.stream(
            ids,
            max_new_tokens=min(arguments.new_tokens, room),
            do_sample=arguments.sample,
            temperature=arguments.temperature or 1.0,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            generator=self.generator,
        )
        tokens = print_reply(self._timed(stream, ids.shape[1]), self._decode)
        return self._decode(tokens)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _timed(self, stream: Iterator[torch.Tensor], prompt_tokens: int) -> Iterator[int]:
        """The ids of a stream, until it ends or Ctrl-C stops it."""
        started, times = time.perf_counter(), []
        try:
            for token in stream:
                times.append(time.perf_counter())
                yield int(token)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        finally:
            if times:
                self.prompt_tokens += prompt_tokens
                self.prefill_s += times[0] - started  # until the first token is out; a CPU computes the second before
                self.reply_tokens += len(times) - 1  # those that decode made
                self.decode_s += times[-1] - times[0]

    def speed(self) -> str:
        """What was measured, as a line."""
        parts = [("prefill", self.prompt_tokens, self.prefill_s), ("decode", self.reply_tokens, self.decode_s)]
        texts = [
            f"{name} {tokens} tokens in {s:.2f} s, {tokens / s:.1f} tokens/s" for name, tokens, s in parts if tokens
        ]
        return "; ".join(texts)
