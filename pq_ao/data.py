"""Corpora by name, file or list, and token windows drawn from them.

Used by `calibration.py` (seeded random windows) and `evaluation.py` (the whole stream). A corpus is one string; which
tokens it becomes is the tokenizer's matter, always without special tokens.
"""

import gzip
import json
import logging
import operator
import os
import zlib
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["EMBEDDED", "TextSource", "calibration_windows", "load_text", "token_ids", "token_windows"]

logger = logging.getLogger(__name__)

# What may be given wherever a text is wanted: a name, a file, or the documents themselves.
TextSource = str | os.PathLike[str] | Sequence[str]

# The source that needs neither network nor file: the language reference in `pydoc_data.topics`, which every Python
# carries (about 370,000 characters of English). It changes with the Python version, so it serves a quick start and
# tests, not a number to publish.
EMBEDDED = "embedded"
# A streamed corpus is read up to this many characters, about a million tokens: far more than calibration draws from,
# and still tokenized within seconds.
STREAMED_CHARACTERS = 4_000_000

DATASET_NAMES = ("wikitext2", "pile", "c4")
SPLITS = ("train", "validation", "test")
# What stands between two documents or rows; published WikiText-2 numbers depend on it.
BLANK_LINE = "\n\n"


def load_text(source: TextSource = EMBEDDED, split: str = "train", *, argument: str = "source") -> str:
    """Returns a corpus as one string.

    Args:
        source: one of

            - `"embedded"`: English text that comes with Python, for a quick start (it changes with the Python version).
            - `"wikitext2"`: WikiText-2 raw, rows joined by blank lines, as perplexity is usually measured on it.
            - `"pile"`: documents of the Pile's validation set; every second one is for training, the others for
              evaluation, since the set has a single split.
            - `"c4"`: documents of the first English C4 training or validation file.
            - a file: `.jsonl` with a field `"text"` a line, WikiText's own `.raw` file (rebuilt to the string that
              `"wikitext2"` gives), or any other as plain UTF-8 text; each may have `.gz` after it.
            - a list of strings, joined by blank lines.

            A name wins over a file of the same name; write `./c4` for the file.
        split: `"train"`, `"validation"` or `"test"`. `"embedded"`, `"pile"` and `"c4"` have one evaluation part, which
            the last two both mean. A file or a list has no splits: all of it is returned.
        argument: what errors call `source`: the argument that it was given as.

    Raises:
        TypeError: `source` is none of these types.
        ValueError: unknown name, missing file, unknown split, a file that cannot be decoded, or an empty corpus.
        RuntimeError: a named data set could not be downloaded.

    Example:
        >>> text = load_text("wikitext2", split="test")
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; it must be one of {', '.join(map(repr, SPLITS))}")
    if isinstance(source, str) and source == EMBEDDED:
        text = BLANK_LINE.join(_embedded_paragraphs(split))
    elif isinstance(source, str) and source in DATASET_NAMES:
        text = _load_dataset_text(source, split)
    elif isinstance(source, (str, os.PathLike)):
        text = _read_file(source, f"{argument}={str(source)!r}")
    elif isinstance(source, (list, tuple)):
        wrong = next((item for item in source if not isinstance(item, str)), None)
        if wrong is not None:
            raise TypeError(f"{argument} holds a {type(wrong).__name__}; a list of texts may hold str only")
        text = BLANK_LINE.join(source)
    else:
        raise TypeError(f"{argument} is a {type(source).__name__}; give a name, a file or a list of str. {_allowed()}")
    if not text.strip():
        raise ValueError(f"{argument}={_shown(source)} (split {split!r}) holds no text")
    return text


def token_ids(tokenizer: Any, text: str) -> Tensor:
    """Tokenizes a whole corpus as one stream, without special tokens. Returns a LongTensor [T] on the CPU."""
    if not callable(tokenizer):
        raise TypeError(f"tokenizer is a {type(tokenizer).__name__}; give the model's transformers tokenizer")
    # verbose=False: the warning that the stream is longer than the model's context would be beside the point.
    encoded = tokenizer(text, add_special_tokens=False, truncation=False, return_attention_mask=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.long)


def token_windows(tokenizer: Any, text: str, num_sequences: int, sequence_length: int, seed: int) -> Tensor:
    """Draws random windows of a text that do not overlap.

    The token stream is cut into `T // sequence_length` windows behind a random offset, and `num_sequences` of them are
    chosen in random order. Equal arguments give equal windows.

    Args:
        tokenizer: a transformers tokenizer; no special tokens are added.
        text: the corpus.
        num_sequences: how many windows.
        sequence_length: tokens a window.
        seed: of the draw.

    Returns:
        LongTensor [num_sequences, sequence_length] on the CPU.

    Raises:
        TypeError: a number that is not an integer.
        ValueError: a number below 1, or a text too short.

    Example:
        >>> ids = token_windows(tokenizer, load_text("wikitext2"), num_sequences=64, sequence_length=512, seed=0)
    """
    num_sequences = check_count("num_sequences", num_sequences)
    sequence_length = check_count("sequence_length", sequence_length)
    seed = check_count("seed", seed, minimum=0)
    stream = token_ids(tokenizer, text)
    available = count_windows(stream, sequence_length)
    if available < num_sequences:
        shorter = stream.numel() // num_sequences
        raise ValueError(
            f"{num_sequences} windows of sequence_length={sequence_length} tokens are needed, but the text has "
            f"{stream.numel()} tokens, which is {available} windows; lower num_sequences by "
            f"{num_sequences - available}{f' or sequence_length to {shorter}' if shorter else ''}, or give more text"
        )
    generator = torch.Generator().manual_seed(seed)
    spare = stream.numel() - available * sequence_length
    offset = int(torch.randint(spare + 1, (1,), generator=generator))
    chosen = torch.randperm(available, generator=generator)[:num_sequences]
    return stream[offset : offset + available * sequence_length].view(available, sequence_length)[chosen]


def calibration_windows(
    tokenizer: Any,
    data: TextSource = EMBEDDED,
    num_sequences: int = 64,
    sequence_length: int = 512,
    seed: int = 0,
) -> Tensor:
    """`token_windows` of the training part of `load_text(data)`: LongTensor [num_sequences, sequence_length].

    Raises what these two raise.

    Example:
        >>> ids = calibration_windows(tokenizer, "pile", num_sequences=64, sequence_length=512, seed=2)
    """
    return token_windows(tokenizer, load_text(data, argument="data"), num_sequences, sequence_length, seed)


def check_count(name: str, value: int, minimum: int = 1) -> int:
    """Returns `value` as an int of at least `minimum`; TypeError or ValueError that name the argument otherwise."""
    try:
        count = operator.index(value)
    except TypeError:
        count = None
    if count is None or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; it must be an integer of at least {minimum}")
    if count < minimum:
        raise ValueError(f"{name}={value} is too small; it must be an integer of at least {minimum}")
    return count


def count_windows(ids: Tensor, sequence_length: int) -> int:
    """How many whole windows the stream `ids` [T] has; ValueError if there is none."""
    if ids.numel() < sequence_length:
        raise ValueError(
            f"sequence_length={sequence_length} needs at least {sequence_length} tokens, but the text has only "
            f"{ids.numel()}; lower sequence_length or give more text"
        )
    return ids.numel() // sequence_length


def _allowed() -> str:
    names = ", ".join(map(repr, (EMBEDDED, *DATASET_NAMES)))
    return f"Allowed: {names}; an existing text, .jsonl or .raw file (each also with .gz); a list of str."


def _shown(source: TextSource) -> str:
    return f"a list of {len(source)} texts" if isinstance(source, (list, tuple)) else repr(str(source))


def _embedded_paragraphs(split: str) -> list[str]:
    """The paragraphs of every second topic of the language reference; the other topics for evaluation.

    Topics repeat each other (a tenth of the paragraphs stand in both halves), so evaluation leaves out every paragraph
    that calibration has, and neither half holds one twice.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise RuntimeError(f"this Python carries no pydoc_data, so {EMBEDDED!r} has no text. {_allowed()}") from error

    seen: set[str] = set()
    halves: list[list[str]] = []
    names = sorted(topics)
    for chosen in (names[::2], names[1::2]):
        paragraphs = []
        for name in chosen:
            for paragraph in topics[name].strip("\n").split(BLANK_LINE):
                key = " ".join(paragraph.split())  # indentation differs between the repetitions
                if key and key not in seen:
                    seen.add(key)
                    paragraphs.append(paragraph)
        halves.append(paragraphs)
    return halves[0] if split == "train" else halves[1]


def _load_dataset_text(name: str, split: str) -> str:
    part = "train" if split == "train" else "validation"
    try:
        import datasets

        if name == "wikitext2":
            return BLANK_LINE.join(
                datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"]
            )
        if name == "c4":
            file = {"train": "c4-train.00000-of-01024", "validation": "c4-validation.00000-of-00008"}[part]
            files = {part: f"en/{file}.json.gz"}
            rows = datasets.load_dataset("allenai/c4", data_files=files, split=part, streaming=True)
            return _join_some(row["text"] for row in rows)
        rows = datasets.load_dataset("mit-han-lab/pile-val-backup", split="validation", streaming=True)
        parity = 0 if part == "train" else 1
        return _join_some(row["text"] for index, row in enumerate(rows) if index % 2 == parity)
    # Exception, because what a download can raise belongs to the libraries beneath `datasets` and differs by version.
    except Exception as error:
        raise RuntimeError(
            f"the data set {name!r} could not be loaded ({type(error).__name__}: {error}). It needs the package "
            f"datasets and a network, or a filled cache. Without them give a local file (text, .jsonl or WikiText's "
            f".raw, each also with .gz), or {EMBEDDED!r}, the text that comes with Python."
        ) from error


def _join_some(documents: Iterable[str]) -> str:
    """Joins whole documents until there are `STREAMED_CHARACTERS`."""
    taken, characters = [], 0
    for document in documents:
        taken.append(document)
        characters += len(document)
        if characters >= STREAMED_CHARACTERS:
            break
    return BLANK_LINE.join(taken)


def _read_file(source: str | os.PathLike[str], named: str) -> str:
    path = Path(source).expanduser()
    if not path.is_file():
        what = "a folder" if path.is_dir() else "neither a known name nor an existing file"
        raise ValueError(f"{named} is {what}{_meant(str(source))}. {_allowed()}")
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        # Bytes, not text mode: line ends stay as they are. utf-8-sig: a byte order mark is no text.
        text = data.decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{named} ends in .gz but is not whole gzip data: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{named} is not UTF-8 text: {error}; convert it first") from error
    logger.debug("read %d characters from %s", len(text), path)

    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind == ".jsonl":
        return _join_jsonl(text, named)
    if kind == ".raw":
        return _join_wikitext_rows(text)
    return text


def _meant(source: str) -> str:
    packed = f"{source}.gz"
    names = (
        [packed] if Path(packed).expanduser().is_file() else get_close_matches(source, (EMBEDDED, *DATASET_NAMES), 1)
    )
    return f"; did you mean {names[0]!r}?" if names else ""


def _join_jsonl(text: str, named: str) -> str:
    documents = []
    # Not splitlines(): JSON strings may hold other line separators (U+2028) as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{named}, line {number}, is not JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            held = f"keys {sorted(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
            raise ValueError(f'{named}, line {number}, has {held}; an object with a string "text" is needed')
        documents.append(record["text"])
    return BLANK_LINE.join(documents)


def _join_wikitext_rows(text: str) -> str:
    """Rebuilds `"\\n\\n".join(rows)` of the data set `wikitext-2-raw-v1` from WikiText's own file.

    The file's lines are the data set's rows, but a blank line (`" \\n"`) is an empty row there, while the others keep
    their line end.
    """
    lines = text.removesuffix("\n").split("\n")
    return BLANK_LINE.join(line + "\n" if line.strip() else "" for line in lines)
