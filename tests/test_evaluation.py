"""Perplexity against a plain computation on a tiny random model, and on a tiny trained one if `PQ_AO_DATA` is set."""

import dataclasses
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pq_ao import evaluation
from pq_ao.data import load_text, token_ids
from pq_ao.evaluation import perplexity

TEXT = "The quick brown fox jumps over the lazy dog, again and again. " * 4


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny operations on several threads wait for each other more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.5,  # so that a model left in training mode is noticed
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def plain_perplexity(model, ids: torch.Tensor, length: int, windows: int) -> float:
    """The protocol written down as directly as possible: windows one by one, transformers' own loss."""
    losses = []
    for index in range(windows):
        window = ids[None, index * length : (index + 1) * length]
        losses.append(model(window, labels=window).loss.double())
    return math.exp(sum(losses) / windows)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("windows", [None, 4])
@pytest.mark.parametrize("loss_rows", [1, 7, 256])
def test_equals_the_plain_computation(model, tokenizer, monkeypatch, batch_size, windows, loss_rows):
    monkeypatch.setattr(evaluation, "LOSS_ROWS", loss_rows)
    ids = token_ids(tokenizer, TEXT)
    count = windows or len(ids) // 32
    result = perplexity(
        model, tokenizer, [TEXT], sequence_length=32, windows=windows, batch_size=batch_size, progress=False
    )
    assert result.ppl == pytest.approx(plain_perplexity(model, ids, 32, count), rel=1e-5)
    assert result.ppl > 10  # a random model: anything small would mean that it sees its targets
    assert (result.windows, result.sequence_length, result.tokens) == (count, 32, count * 31)
    assert result.corpus == "texts" and result.seconds > 0


def test_corpus_as_file_name_or_ids(model, tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    options = {"sequence_length": 32, "progress": False}
    by_file = perplexity(model, tokenizer, tmp_path / "text.txt", **options)
    assert by_file.corpus == "text.txt"
    ids = token_ids(tokenizer, TEXT)
    for given in (ids, ids[None], ids.int(), ids[None].to(torch.uint8)):
        by_ids = perplexity(model, None, given, **options)
        assert by_ids.corpus == "ids"
        assert by_ids.ppl == by_file.ppl
    embedded = perplexity(model, tokenizer, "embedded", windows=2, **options)
    assert embedded.corpus == "embedded"
    assert embedded.ppl == perplexity(model, tokenizer, [load_text("embedded", "test")], windows=2, **options).ppl


def test_bfloat16_logits_get_a_float32_loss(model, tokenizer):
    model = model.bfloat16()
    result = perplexity(model, tokenizer, [TEXT], sequence_length=32, windows=2, progress=False)
    with torch.no_grad():
        ids = token_ids(tokenizer, TEXT)[:64].view(2, 32)
        loss = F.cross_entropy(model(ids).logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
    assert result.ppl == pytest.approx(loss.exp().item(), rel=1e-5)


def test_training_modes_come_back(model, tokenizer):
    expected = perplexity(model, tokenizer, [TEXT], sequence_length=32, windows=2, progress=False)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    result = perplexity(model, tokenizer, [TEXT], sequence_length=32, windows=2, progress=False)
    assert result.ppl == expected.ppl
    assert [module.training for module in model.modules()] == modes


def test_progress_shows_the_running_perplexity(model, tokenizer, capsys):
    perplexity(model, tokenizer, [TEXT], sequence_length=32, windows=2)
    captured = capsys.readouterr()
    assert "ppl=" in captured.err and not captured.out
    perplexity(model, tokenizer, [TEXT], sequence_length=32, windows=2, progress=False)
    assert not capsys.readouterr().err


def test_result_is_frozen(model, tokenizer):
    result = perplexity(model, tokenizer, [TEXT], sequence_length=32, windows=1, progress=False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.ppl = 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_names_the_window(model, tokenizer, value):
    ids = token_ids(tokenizer, TEXT).remainder(128)
    ids[3 * 32 + 5] = 200  # in window 3, and nowhere else
    with torch.no_grad():
        model.model.embed_tokens.weight[200] = value
    for batch_size in (1, 2, 4):
        with pytest.raises(FloatingPointError, match="window 3 "):
            perplexity(model, None, ids, sequence_length=32, batch_size=batch_size, progress=False)
    assert perplexity(model, None, ids, sequence_length=32, windows=3, progress=False).windows == 3


class TestErrors:
    def test_text_shorter_than_a_window(self, model, tokenizer):
        with pytest.raises(ValueError, match="sequence_length=32.*only 5"):
            perplexity(model, tokenizer, ["short"], sequence_length=32)

    def test_more_windows_than_there_are(self, model, tokenizer):
        with pytest.raises(ValueError, match="windows=3.*has 2 "):
            perplexity(model, tokenizer, ["x" * 70], sequence_length=32, windows=3)

    def test_longer_than_the_context(self, model, tokenizer):
        with pytest.raises(ValueError, match="sequence_length=2048.*context of 64"):
            perplexity(model, tokenizer, [TEXT])

    @pytest.mark.parametrize("name", ["sequence_length", "windows", "batch_size"])
    @pytest.mark.parametrize("value, error", [(0, ValueError), (-2, ValueError), (2.5, TypeError), (True, TypeError)])
    def test_bad_numbers(self, model, tokenizer, name, value, error):
        with pytest.raises(error, match=f"{name}={value}"):
            perplexity(model, tokenizer, [TEXT], **{"sequence_length": 32, name: value})

    def test_windows_of_one_token_predict_nothing(self, model, tokenizer):
        with pytest.raises(ValueError, match="sequence_length=1 .*at least 2"):
            perplexity(model, tokenizer, [TEXT], sequence_length=1)

    def test_tokenizer_of_another_model(self, model):
        with pytest.raises(ValueError, match="ids from 1 to 256.*rows 0 to 255"):
            perplexity(model, None, torch.arange(1, 257), sequence_length=32)

    @pytest.mark.parametrize(
        "ids, error",
        [(torch.zeros(64), TypeError), (torch.zeros(2, 64).long(), ValueError), (torch.tensor(3), ValueError)],
    )
    def test_wrong_ids(self, model, ids, error):
        with pytest.raises(error, match="token ids must be"):
            perplexity(model, None, ids, sequence_length=32)

    def test_text_without_a_tokenizer(self, model):
        with pytest.raises(TypeError, match="tokenizer"):
            perplexity(model, None, [TEXT], sequence_length=32)

    def test_unknown_corpus(self, model, tokenizer):
        with pytest.raises(ValueError, match="^corpus='wikitext'.*did you mean 'wikitext2'"):
            perplexity(model, tokenizer, "wikitext", sequence_length=32)


def test_trained_model_on_real_text():
    folder = os.environ.get("PQ_AO_DATA")
    if not folder:
        pytest.skip("PQ_AO_DATA does not name the folder of evaluation data")
    path = Path(folder) / "models" / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    stories = Path(folder) / "tinystories_sample" / "tinystories_sample_dev.jsonl.gz"
    result = perplexity(model, tokenizer, stories, sequence_length=256, windows=8, batch_size=4, progress=False)
    # Over 200 stories, each alone behind BOS, it is 4.49; these are the first ten, with longer contexts.
    assert 3.0 < result.ppl < 5.0
    assert result.ppl == pytest.approx(
        plain_perplexity(model, token_ids(tokenizer, load_text(stories)), 256, 8), rel=1e-5
    )
