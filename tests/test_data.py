"""Corpora and windows. Tests on real text need the environment variable `PQ_AO_DATA`, a folder of evaluation data."""

import gzip
import hashlib
import json
import warnings
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pq_ao.data import calibration_windows, load_text, token_ids, token_windows

# Of "\n\n".join(rows) over the data set wikitext-2-raw-v1, split test.
WIKITEXT2_TEST_SHA256 = "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"
BOS = 256


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, 256 is BOS, which it would add; a context of 8 so that every text here is longer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(alphabet)} | {"<s>": BOS}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", model_max_length=8)


def write(path: Path, text: str) -> Path:
    data = text.encode("utf-8")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


class TestEmbedded:
    def test_is_english_prose_of_useful_size(self):
        for split in ("train", "test"):
            text = load_text("embedded", split)
            assert len(text) > 50_000
            assert text.count(" the ") > 500

    def test_evaluation_shares_no_paragraph_with_calibration(self):
        train, test = (
            [" ".join(p.split()) for p in load_text("embedded", split).split("\n\n")] for split in ("train", "test")
        )
        assert not set(train) & set(test)
        assert len(set(train)) == len(train)
        assert len(set(test)) == len(test)

    def test_is_deterministic_and_the_default(self):
        assert load_text() == load_text("embedded", "train")
        assert load_text("embedded", "validation") == load_text("embedded", "test")


class TestFiles:
    @pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a", "a.md"])
    @pytest.mark.parametrize("as_path", [True, False])
    def test_plain_text_is_kept_as_it_is(self, tmp_path, name, as_path):
        text = "One.\r\nTwo.\n\n naïve \u2028 日本 "
        path = write(tmp_path / name, text)
        assert load_text(path if as_path else str(path)) == text

    @pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
    def test_jsonl(self, tmp_path, name):
        documents = ["first \u2028 one", "second\nline", "third"]
        lines = [json.dumps({"text": d, "id": i}, ensure_ascii=False) for i, d in enumerate(documents)]
        assert load_text(write(tmp_path / name, "\n".join(lines) + "\n\n")) == "\n\n".join(documents)

    def test_byte_order_mark_is_dropped(self, tmp_path):
        assert load_text(write(tmp_path / "a.txt", "\ufeffHello")) == "Hello"

    def test_list_of_texts(self):
        assert load_text(["a", "b\n"]) == "a\n\nb\n"

    @pytest.mark.parametrize("end", ["\n", ""])
    @pytest.mark.parametrize("name", ["wiki.test.raw", "wiki.test.raw.gz"])
    def test_wikitext_rows(self, tmp_path, name, end):
        path = write(tmp_path / name, " \n = Title = \n \n Some text . " + end)
        assert load_text(path) == "\n\n".join(["", " = Title = \n", "", " Some text . \n"])

    def test_wikitext2_test_is_the_published_string(self, data_folder):
        text = load_text(data_folder / "wikitext2" / "wiki.test.raw.gz", split="test")
        assert len(text) == 1_294_336
        assert hashlib.sha256(text.encode("utf-8")).hexdigest() == WIKITEXT2_TEST_SHA256

    def test_c4_sample(self, data_folder):
        text = load_text(data_folder / "c4_sample" / "c4_sample_dev.jsonl.gz")
        assert len(text) > 500_000


class TestLoadTextErrors:
    def test_unknown_name_lists_what_is_allowed(self):
        with pytest.raises(ValueError, match="'wikitext3'.*'embedded', 'wikitext2', 'pile', 'c4'.*jsonl"):
            load_text("wikitext3")

    def test_what_was_meant(self, tmp_path):
        with pytest.raises(ValueError, match="source='wikitext'.*did you mean 'wikitext2'"):
            load_text("wikitext")
        packed = write(tmp_path / "notes.txt.gz", "")
        with pytest.raises(ValueError, match=f"did you mean '{packed}'"):
            load_text(tmp_path / "notes.txt")
        with pytest.raises(ValueError, match=r"existing file\. Allowed"):
            load_text(tmp_path / "other.txt")

    def test_folder(self, tmp_path):
        with pytest.raises(ValueError, match="is a folder"):
            load_text(tmp_path)

    def test_unknown_split(self):
        with pytest.raises(ValueError, match="split='dev'.*'train', 'validation', 'test'"):
            load_text("embedded", "dev")

    @pytest.mark.parametrize("source", [[], [""], ["", " \n"]])
    def test_empty_list(self, source):
        with pytest.raises(ValueError, match="no text"):
            load_text(source)

    @pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.raw"])
    def test_empty_file(self, tmp_path, name):
        with pytest.raises(ValueError, match=f"{name}.*no text"):
            load_text(write(tmp_path / name, ""))

    @pytest.mark.parametrize("source", [None, 3, {"text": "a"}, b"bytes"])
    def test_wrong_type(self, source):
        with pytest.raises(TypeError, match=type(source).__name__):
            load_text(source)

    def test_list_with_something_else(self):
        with pytest.raises(TypeError, match="NoneType"):
            load_text(["a", None])

    @pytest.mark.parametrize(
        "line, message",
        [("{", "line 2, is not JSON"), ('{"content": 1}', "line 2.*'content'"), ("[1]", "line 2.*list")],
    )
    def test_broken_jsonl_names_the_line(self, tmp_path, line, message):
        with pytest.raises(ValueError, match=message):
            load_text(write(tmp_path / "a.jsonl", '{"text": "good"}\n' + line))

    def test_not_utf8(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"caf\xe9")
        with pytest.raises(ValueError, match="a.txt.*not UTF-8"):
            load_text(tmp_path / "a.txt")

    def test_not_gzip_and_cut_gzip(self, tmp_path):
        whole = gzip.compress(b"Hello, hello, hello")
        for data in (b"Hello", whole[:-4]):
            (tmp_path / "a.txt.gz").write_bytes(data)
            with pytest.raises(ValueError, match="a.txt.gz.*gzip"):
                load_text(tmp_path / "a.txt.gz")

    @pytest.mark.parametrize("name", ["wikitext2", "pile", "c4"])
    def test_failed_download_names_the_alternatives(self, monkeypatch, name):
        datasets = pytest.importorskip("datasets")

        def fail(*args, **kwargs):
            raise ConnectionError("no network")

        monkeypatch.setattr(datasets, "load_dataset", fail)
        with pytest.raises(RuntimeError, match=f"'{name}'.*no network.*local file.*'embedded'") as caught:
            load_text(name)
        assert isinstance(caught.value.__cause__, ConnectionError)


class TestNamedDatasets:
    """What is asked of `datasets`, and what becomes of the rows; the network is not touched."""

    @pytest.fixture
    def calls(self, monkeypatch):
        datasets = pytest.importorskip("datasets")
        calls = []

        def load_dataset(*args, **kwargs):
            calls.append((args, kwargs))
            if args[0] == "Salesforce/wikitext":
                return {"text": ["", " = A = \n", "", " b \n"]}
            return iter([{"text": f"{index} " + "x" * 999_998} for index in range(20)])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    def test_wikitext2(self, calls):
        assert load_text("wikitext2", "test") == "\n\n".join(["", " = A = \n", "", " b \n"])
        assert calls == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"})]

    def test_pile_halves_do_not_meet_and_reading_stops(self, calls):
        first = {split: [d.split()[0] for d in load_text("pile", split).split("\n\n")] for split in ("train", "test")}
        assert first == {"train": ["0", "2", "4", "6"], "test": ["1", "3", "5", "7"]}

    def test_c4_splits(self, calls):
        load_text("c4", "train")
        load_text("c4", "test")
        assert [kwargs["split"] for _, kwargs in calls] == ["train", "validation"]


class TestTokenWindows:
    def test_no_special_tokens_and_no_warning(self, tokenizer, caplog):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ids = token_ids(tokenizer, "a text of more than eight tokens")
        assert ids.dtype == torch.long and ids.dim() == 1
        assert BOS not in ids
        assert tokenizer.decode(ids) == "a text of more than eight tokens"
        assert not caplog.records

    def test_windows_are_pieces_of_the_stream_that_do_not_overlap(self, tokenizer):
        # Every token of this stream is followed by another one than anywhere else: a piece tells its position.
        text = "".join(f"{index:04d}" for index in range(500))
        windows = token_windows(tokenizer, text, num_sequences=30, sequence_length=60, seed=3)
        assert windows.shape == (30, 60) and windows.dtype == torch.long
        starts = sorted(text.find(tokenizer.decode(window)) for window in windows)
        assert starts[0] >= 0
        assert all(second - first >= 60 for first, second in zip(starts, starts[1:], strict=False))

    def test_seed_decides(self, tokenizer):
        text = load_text()[:20_000]
        first, same, other = (token_windows(tokenizer, text, 10, 100, seed) for seed in (1, 1, 2))
        assert torch.equal(first, same)
        assert not torch.equal(first, other)

    def test_leaves_the_global_generator_alone(self, tokenizer):
        state = torch.get_rng_state()
        token_windows(tokenizer, "x" * 100, 2, 10, 0)
        assert torch.equal(state, torch.get_rng_state())

    def test_exactly_enough(self, tokenizer):
        windows = token_windows(tokenizer, "abcdef", 3, 2, 0)
        assert sorted(tokenizer.decode(window) for window in windows) == ["ab", "cd", "ef"]

    def test_calibration_windows_takes_the_training_part(self, tokenizer):
        windows = calibration_windows(tokenizer, "embedded", 4, 64, seed=0)
        assert torch.equal(windows, token_windows(tokenizer, load_text("embedded", "train"), 4, 64, 0))
        assert torch.equal(windows, calibration_windows(tokenizer, "embedded", 4, 64, 0))

    def test_too_short_for_one_window(self, tokenizer):
        with pytest.raises(ValueError, match="at least 10 tokens.*only 9"):
            token_windows(tokenizer, "123456789", 1, 10, 0)

    def test_too_few_windows(self, tokenizer):
        with pytest.raises(
            ValueError, match="4 windows of sequence_length=10.*25 tokens, which is 2.*num_sequences by 2.*length to 6"
        ):
            token_windows(tokenizer, "x" * 25, 4, 10, 0)

    @pytest.mark.parametrize("name", ["num_sequences", "sequence_length", "seed"])
    @pytest.mark.parametrize(
        "value, error", [(-1, ValueError), (1.0, TypeError), ("1", TypeError), (True, TypeError), (None, TypeError)]
    )
    def test_bad_numbers(self, tokenizer, name, value, error):
        with pytest.raises(error, match=f"{name}={value!r}"):
            token_windows(tokenizer, "x" * 100, **{"num_sequences": 1, "sequence_length": 1, "seed": 0, name: value})

    @pytest.mark.parametrize(
        "data, error", [("nowhere.txt", ValueError), ([""], ValueError), (None, TypeError), ([7], TypeError)]
    )
    def test_bad_text_is_named_as_it_was_given(self, tokenizer, data, error):
        with pytest.raises(error, match="^data"):
            calibration_windows(tokenizer, data, num_sequences=1, sequence_length=8, seed=0)

    def test_zero(self, tokenizer):
        with pytest.raises(ValueError, match="sequence_length=0"):
            token_windows(tokenizer, "x", 1, 0, 0)

    def test_more_windows_asked_for_than_tokens(self, tokenizer):
        with pytest.raises(ValueError, match="3 windows; lower num_sequences by 97, or give more text"):
            token_windows(tokenizer, "abc", 100, 1, 0)

    def test_no_tokenizer(self):
        with pytest.raises(TypeError, match="tokenizer is a NoneType"):
            token_windows(None, "x", 1, 1, 0)
