"""Quantizes SmolLM2-135M-Instruct on a CPU, compares PrefixQuant with what it improves on, and lets it answer.

    python -m recipes.quickstart            (or: make quickstart)

Prints a reply of the W4A4KV4 model and the memory that it takes, then a table of perplexity and bytes; writes a picture
of the model's outlier tokens. The text is what comes with Python, so nothing but the model is downloaded; the
perplexities compare the rows with each other, not with numbers published on WikiText-2.

On two CPU cores the reply takes two minutes and the table, with three more calibrations, seven; up to twice as long
where the CPU has no bfloat16 instructions (AVX512-BF16, AMX): there float32 would be faster, but the first rows are the
model in its own dtype.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torchao.quantization import quantize_
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

import pq_ao
from pq_ao.data import load_text, token_ids
from pq_ao.evaluation import PerplexityResult
from pq_ao.outliers import OUTLIER_THRESHOLD, token_ratios
from pq_ao.plots import plot_outliers
from recipes.smollm2 import smollm2_folder
from recipes.terminal import count, run, step, whole

QUESTION = "What is the capital of France?"
REPLY_CACHE = 512  # tokens of question and reply
MEASURED_CACHE = 512  # tokens of the cache whose bytes are in the table
PICTURE_TOKENS = 64

FLOAT, FLOAT_PREFIX = "bf16", "bf16 + prefix (rotated)"
STATIC, DYNAMIC = "W4A4KV4 static, no prefix", "W4A4KV4 per token, no prefix"
PREFIXQUANT, PREFIXQUANT_A8 = "W4A4KV4 PrefixQuant (static)", "W4A8KV4 PrefixQuant (static)"
ORDER = (FLOAT, FLOAT_PREFIX, STATIC, DYNAMIC, PREFIXQUANT, PREFIXQUANT_A8)


@dataclass(frozen=True)
class Row:
    """One line of the table: bytes of the block linears' weights and of a cache, and wall seconds."""

    ppl: float
    weight_bytes: int
    kv_bytes: int
    calibration_s: float
    perplexity_s: float


class Quickstart:
    """The steps, over one model in `folder`; `rows` fills up by the settings' names."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace):
        self.folder, self.tokenizer, self.arguments = folder, tokenizer, arguments
        self.rows: dict[str, Row] = {}

    def load(self) -> PreTrainedModel:
        """The model in floating point."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.bfloat16)

    def perplexity(self, model: PreTrainedModel) -> PerplexityResult:
        """On the half of the embedded text that calibration does not see."""
        length, windows = self.arguments.eval_length, self.arguments.windows
        return pq_ao.perplexity(
            model, self.tokenizer, "embedded", split="test", sequence_length=length, windows=windows, batch_size=2
        )

    def calibrate(self, config: pq_ao.PrefixQuantConfig, **options) -> PreTrainedModel:
        """A calibrated model, not yet quantized."""
        arguments = self.arguments
        model = self.load()
        pq_ao.calibrate(
            model,
            self.tokenizer,
            config,
            num_sequences=arguments.sequences,
            sequence_length=arguments.length,
            seed=arguments.seed,
            **options,
        )
        return model

    def compare_float(self, original: PreTrainedModel, calibrated: PreTrainedModel) -> None:
        """Rows of the model as loaded and of the calibrated one, which still computes in floating point."""
        step(f"{FLOAT}, {FLOAT_PREFIX}")
        report = self._memory(calibrated)
        found = self.perplexity(original)
        self.rows[FLOAT] = Row(found.ppl, report.linear_bf16_bytes, report.kv_bf16_bytes, 0.0, found.seconds)
        found = self.perplexity(calibrated)
        seconds = calibrated.calibration_record.seconds
        # it also holds the codes that quantize_ will put in place; the row is about the weights in use
        self.rows[FLOAT_PREFIX] = Row(found.ppl, report.linear_bf16_bytes, report.kv_bytes, seconds, found.seconds)

    def compare_quantized(self, name: str, model: PreTrainedModel) -> None:
        """Row of a quantized model."""
        step(name)
        report, found = self._memory(model), self.perplexity(model)
        seconds = model.calibration_record.seconds
        self.rows[name] = Row(found.ppl, report.linear_bytes, report.kv_bytes, seconds, found.seconds)

    def _memory(self, model: PreTrainedModel) -> pq_ao.MemoryReport:
        return pq_ao.memory(model, pq_ao.PrefixStaticCache(model, batch_size=1, max_cache_len=MEASURED_CACHE))

    def picture(self, original: PreTrainedModel, prefix_ids: tuple[int, ...]) -> Path:
        """Outlier tokens of the original model, without the prefix and with it."""
        ids = token_ids(self.tokenizer, load_text("embedded", "test"))[:PICTURE_TOKENS]
        ratios = token_ratios(original, ids), token_ratios(original, ids, prefix_ids)
        return plot_outliers(*ratios, Path(self.arguments.output) / "outliers.png", threshold=OUTLIER_THRESHOLD)


def reply(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str, new_tokens: int) -> None:
    """Streams the model's answer to stdout, from a packed cache."""
    text = question
    if tokenizer.chat_template:
        conversation = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    # the template has its own special tokens, and the prefix is hidden in the model: nothing is added
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
    model.generate(
        **inputs,
        past_key_values=pq_ao.PrefixStaticCache(model, batch_size=1, max_cache_len=REPLY_CACHE),
        max_new_tokens=new_tokens,
        do_sample=False,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )


def table(rows: dict[str, Row]) -> str:
    """The rows as aligned text; ratios to the first one."""
    dense = rows[FLOAT]
    lines = [f"{'':30}{'ppl':>9}{'weights':>11}{'ratio':>8}{'KV cache':>11}{'ratio':>8}{'calibrate':>11}{'measure':>9}"]
    for name in ORDER:
        row = rows[name]
        weights, cache = row.weight_bytes / dense.weight_bytes, row.kv_bytes / dense.kv_bytes
        lines.append(
            f"{name:30}{row.ppl:9.2f}{megabytes(row.weight_bytes):>11}{weights:8.3f}"
            f"{megabytes(row.kv_bytes):>11}{cache:8.3f}{row.calibration_s:9.1f} s{row.perplexity_s:7.1f} s"
        )
    return "\n".join(lines)


def megabytes(number: int) -> str:
    """Bytes as text."""
    return f"{number / 1e6:.2f} MB"


def origin(folder: Path) -> str:
    """What `recipes.smollm2` noted about the weights, as text."""
    note = folder / "source.json"
    facts = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    kind = facts.get("quantization") or facts.get("hub_id")
    return f"{folder.name} ({kind})" if kind else folder.name


def main(argv: list[str] | None = None) -> dict[str, Row]:
    """Runs everything; returns the table's rows."""
    arguments = parse(argv)
    started = time.perf_counter()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    step("model")
    folder = smollm2_folder(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    quickstart = Quickstart(folder, tokenizer, arguments)
    original = quickstart.load()
    original_bytes = sum(parameter.nbytes for parameter in original.parameters())
    ready = time.perf_counter() - started

    step(f"{PREFIXQUANT}: calibration")
    config = pq_ao.prefixquant_config()  # w4a4kv4, static
    quantized = quickstart.calibrate(config)
    prefix_ids = quantized.calibration_record.prefix.prefix_ids
    quickstart.compare_float(original, quantized)
    step("picture of the outlier tokens")
    picture = quickstart.picture(original, prefix_ids)
    del original  # what is counted below is the quantized model alone
    quantize_(quantized, config)

    print(f"\nPrefix: {[tokenizer.decode([token]) for token in prefix_ids]}. {PREFIXQUANT} is asked: {QUESTION}")
    replying = time.perf_counter()
    reply(quantized, tokenizer, QUESTION, arguments.new_tokens)
    replied = time.perf_counter()
    alive = pq_ao.live_bytes()
    by_dtype = ", ".join(f"{dtype} {megabytes(number)}" for dtype, number in alive.most_common(3))
    print(f"\nReply after {replied - replying:.1f} s. Tensors alive then: {megabytes(alive.total())} ({by_dtype});")
    print(f"the weights of the bf16 model alone: {megabytes(original_bytes)}.")
    print(f"Picture of the outlier tokens: {os.path.relpath(picture)}\n")

    quickstart.compare_quantized(PREFIXQUANT, quantized)
    del quantized
    others = {
        PREFIXQUANT_A8: (pq_ao.prefixquant_config("w4a8kv4"), prefix_ids),  # the prefix does not depend on the bits
        STATIC: (pq_ao.prefixquant_config(prefix=False), None),
        DYNAMIC: (pq_ao.prefixquant_config(mode="dynamic", prefix=False), None),
    }
    for name, (config, prefix) in others.items():
        step(f"{name}: calibration")
        other = quickstart.calibrate(config, prefix_ids=prefix)
        quantize_(other, config)
        quickstart.compare_quantized(name, other)

    print(f"\n{origin(folder)}, {torch.bfloat16}, calibrated on {arguments.sequences} x {arguments.length} tokens.")
    print(
        f"ppl: {arguments.windows} x {arguments.eval_length} tokens of the other half of Python's language reference;"
    )
    print(f"weights: linears of the decoder blocks; KV cache: 1 x {MEASURED_CACHE} tokens, with the prefix.\n")
    print(table(quickstart.rows))
    print(f"\nModel ready after {ready:.1f} s, everything after {time.perf_counter() - started:.1f} s.")
    return quickstart.rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Quantize a small model, compare, and let it answer.")
    parser.add_argument("--model", help="a local folder or a hub id (default: SmolLM2-135M-Instruct, hub or PyPI)")
    parser.add_argument("--output", default="out/quickstart", help="folder of the picture (default: %(default)s)")
    parser.add_argument("--sequences", type=count, default=8, help="of calibration (default: %(default)s)")
    parser.add_argument("--length", type=count, default=256, help="tokens of each (default: %(default)s)")
    parser.add_argument("--windows", type=count, default=6, help="of evaluation (default: %(default)s)")
    parser.add_argument("--eval-length", type=count, default=512, help="tokens of each (default: %(default)s)")
    parser.add_argument("--new-tokens", type=count, default=64, help="of the reply (default: %(default)s)")
    parser.add_argument("--seed", type=whole, default=0, help="of rotation and windows (default: %(default)s)")
    parser.add_argument("--threads", type=count, help="of torch (default: its own choice)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
