"""The real model: its prefix, the accuracy of the integers, and generation. The slowest file of the suite."""

import copy
import os
from pathlib import Path

import pytest
import torch
from torchao.quantization import quantize_
from transformers import AutoModelForCausalLM, AutoTokenizer

import pq_ao
from pq_ao.data import load_text, token_ids
from pq_ao.outliers import OUTLIER_THRESHOLD, token_ratios

pytestmark = pytest.mark.slow

SHORT_PROMPT = "Yes."
GATE = 1.8  # seeds 0, 1 and 2 gave 1.671, 1.746 and 1.609
EMBEDDED_GATE = 1.6  # seeds 0 and 1 gave 1.524 and 1.510
SHORT_PROMPTS = (
    "The cat sat on the mat.",
    "Water boils at one hundred degrees.",
    "My name is",
    "In the year 1905",
    "Roses are red, violets are blue.",
    "def add(a, b): return a + b",
    "She opened the door and",
    "Two plus two is four.",
)
# every token of its greedy continuation wins by 0.2 and more: a near tie would go by the last bits of a run
CLEAR_PROMPT = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14,"


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2, padding_side="left")


@pytest.fixture(scope="module")
def calibrated(smollm2, tokenizer):
    """The model in float32, calibrated on WikiText-2 where it is at hand, else on the embedded text; and its record."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    folder = os.environ.get("PQ_AO_DATA")
    data = "embedded" if folder is None else str(Path(folder) / "wikitext2" / "wiki.train.first1MB.raw.gz")
    config = pq_ao.prefixquant_config()
    record = pq_ao.calibrate(model, tokenizer, config, data=data, num_sequences=4, sequence_length=256, progress=False)
    return model, record


@pytest.fixture(scope="module")
def quantized(calibrated):
    model = copy.deepcopy(calibrated[0])
    quantize_(model, pq_ao.prefixquant_config())
    return model


@pytest.fixture(scope="module")
def evaluation_ids(tokenizer):
    return token_ids(tokenizer, load_text("embedded", "test"))


def _sqnr(expected, actual):
    expected, actual = expected.double(), actual.double()
    return float(10 * torch.log10(expected.square().sum() / (expected - actual).square().sum()))


def test_prefix_takes_the_outliers_of_all_kinds_of_input(calibrated, tokenizer):
    prefix = calibrated[1].prefix
    assert prefix.rule_ids[-1] == tokenizer.bos_token_id
    assert max(prefix.ratios_before.values()) > 2000 and min(prefix.ratios_before.values()) > 1000
    assert set(prefix.ratios_after) == {"plain text", "BOS + text", "chat", "BOS BOS text"}
    assert max(prefix.ratios_after.values()) <= OUTLIER_THRESHOLD < 100


def test_prefix_without_an_ordinary_token_beside_bos_does_not_hold(smollm2, tokenizer):
    """The mechanism behind the check: after [BOS] alone, a text that begins with BOS makes the outlier again."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    ids = token_ids(tokenizer, load_text("embedded"))[:128]
    bos = tokenizer.bos_token_id
    with_bos = torch.cat((torch.tensor([bos]), ids))
    assert float(token_ratios(model, ids, (bos,)).max()) < 100
    assert float(token_ratios(model, with_bos, (bos,)).max()) > 1000


def test_accuracy_has_not_become_worse_and_is_that_of_the_reference_path(
    calibrated, quantized, tokenizer, evaluation_ids
):
    """The gate: perplexity over floating point, with the data on text that no Python version changes."""
    folder, ids, limit = os.environ.get("PQ_AO_DATA"), evaluation_ids, EMBEDDED_GATE
    if folder is not None:
        text = load_text(str(Path(folder) / "wikitext2" / "wiki.valid.first100KB.raw.gz"))
        ids, limit = token_ids(tokenizer, text), GATE
    options = {"sequence_length": 512, "windows": 6, "progress": False}
    floating = pq_ao.perplexity(calibrated[0], tokenizer, ids, **options).ppl
    integer = pq_ao.perplexity(quantized, tokenizer, ids, **options).ppl
    assert 1 < integer / floating < limit
    with pq_ao.reference_path(quantized):
        reference = pq_ao.perplexity(quantized, tokenizer, ids, **options).ppl
    # two roundings of the same numbers: four windows of 1,024 tokens differed by -0.5 to 3.7 %, these by -1.5 %
    assert integer == pytest.approx(reference, rel=0.05)


@torch.no_grad()
def test_attention_and_mlp_of_every_block_on_integers_equal_the_reference_path(quantized, evaluation_ids):
    """One window, each half block from the same input.

    Float32 sums differ in their last bits, and once in a million a code flips. One flip at down_proj leaves 70 dB;
    that of a key or value reaches all the tokens that look at it. Over several blocks flips lead to flips, so that the
    two paths drift apart like two roundings of the same numbers, and only perplexity can be compared.
    """
    calls = []
    hooks = [
        layer.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True)
        for layer in quantized.model.layers
    ]
    quantized(evaluation_ids[None, :1024], use_cache=False)
    for hook in hooks:
        hook.remove()

    def halves(layer, hidden, kwargs):
        yield layer.self_attn(layer.input_layernorm(hidden), **kwargs)[0]
        yield layer.mlp(layer.post_attention_layernorm(hidden))

    attention, mlp = [], []
    for layer, (hidden,), kwargs, _ in calls:
        integer = list(halves(layer, hidden, kwargs))
        with pq_ao.reference_path(quantized):
            reference = list(halves(layer, hidden, kwargs))
        attention.append(_sqnr(reference[0], integer[0]))
        mlp.append(_sqnr(reference[1], integer[1]))
    assert len(mlp) == 30 and min(mlp) > 55, mlp  # measured: 64 and more
    assert sorted(attention)[15] > 55 and min(attention) > 25, attention  # measured: 71 and 46


@torch.no_grad()
def test_padded_chunked_and_stepwise_runs_give_the_same_logits(quantized, tokenizer):
    """Token by token, in short texts.

    Float32 sums in another order differ in their last bits: 125 dB and more. Once in some ten tokens a code flips by
    that, other flips follow, and the rest of the text is another rounding of the same numbers (10 to 30 dB).
    """
    both = tokenizer(list(SHORT_PROMPTS), return_tensors="pt", padding=True)
    positions = (both.attention_mask.cumsum(dim=1) - 1).clamp_min(0)
    cache = pq_ao.PrefixStaticCache(quantized, len(SHORT_PROMPTS), 64)
    padded = quantized(**both, position_ids=positions, past_key_values=cache).logits
    ratios = {"padded": [], "chunked": [], "stepwise": []}
    for row, prompt in enumerate(SHORT_PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        length = ids.shape[1]
        whole = quantized(ids, use_cache=False).logits[0]
        runs = {"padded": padded[row, -length:]}
        for name, cuts in (("chunked", [length // 2, length - length // 2]), ("stepwise", [1] * length)):
            cache = pq_ao.PrefixStaticCache(quantized, 1, 64)
            parts = [quantized(part, past_key_values=cache).logits[0] for part in ids.split(cuts, dim=1)]
            runs[name] = torch.cat(parts)
        for name, logits in runs.items():
            ratios[name] += map(_sqnr, whole, logits)
    for name, found in ratios.items():
        assert len(found) > 50 and sum(ratio > 100 for ratio in found) >= 0.7 * len(found), (name, found)


def test_generation_gives_the_same_64_tokens_however_it_is_run(quantized, tokenizer):
    options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    inputs = tokenizer(CLEAR_PROMPT, return_tensors="pt")
    length = inputs.input_ids.shape[1]

    def new_cache(batch=1):
        return pq_ao.PrefixStaticCache(quantized, batch, 160)

    expected = quantized.generate(**inputs, past_key_values=new_cache(), **options)
    few = options | {"max_new_tokens": 8}  # what differs between the runs lies before them
    chunked = quantized.generate(**inputs, past_key_values=new_cache(), prefill_chunk_size=6, **few)
    assert torch.equal(chunked, expected[:, : length + 8])
    both = tokenizer([SHORT_PROMPT, CLEAR_PROMPT], return_tensors="pt", padding=True)
    batch = quantized.generate(**both, past_key_values=new_cache(2), **few)
    assert torch.equal(batch[1], expected[0, : length + 8])
    cache = new_cache()
    first = quantized.generate(**inputs, past_key_values=cache, **(options | {"max_new_tokens": 32}))
    second = quantized.generate(first, past_key_values=cache, **(options | {"max_new_tokens": 32}))
    assert torch.equal(second, expected) and expected.shape[1] == length + 64


def test_packed_weights_and_cache_are_a_quarter_of_bf16(quantized):
    report = pq_ao.memory(quantized, pq_ao.PrefixStaticCache(quantized, 1, 1024))
    assert 0.25 < report.linear_ratio <= 0.27
    assert 0.25 < report.kv_ratio <= 0.27
