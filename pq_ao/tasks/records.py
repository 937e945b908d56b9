"""Records of jsonl files, one function a format, as the documents that lm-eval's task definitions expect.

Nothing here needs lm-eval. A record that does not fit is an error that names file, line and field: a record left out
would change the score.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def find_file(folder: str | Path, name: str) -> Path:
    """The records of task `name` in `folder`: `<name>.jsonl`, or the one jsonl file of the folder `<name>`, or .gz.

    Raises:
        ValueError: no such file, or several.
    """
    folder = Path(folder).expanduser()
    places = (f"{name}.jsonl", f"{name}.jsonl.gz", f"{name}/*.jsonl", f"{name}/*.jsonl.gz")
    found = [path for place in places for path in folder.glob(place)]
    if not found:
        raise ValueError(f"folder={str(folder)!r} holds no records of {name}; put there one of {', '.join(places)}.")
    if len(found) > 1:
        names = ", ".join(sorted(path.relative_to(folder).as_posix() for path in found))
        raise ValueError(f"folder={str(folder)!r} holds several files for {name}: {names}; keep one of them.")
    return found[0]


def read_docs(path: Path, to_doc: Callable[[Record], Record]) -> list[Record]:
    """Every record of a jsonl file (.gz or not), each made a document by `to_doc`; blank lines are passed over.

    Raises:
        ValueError: a file that cannot be decoded or is empty, or a record that does not fit; names file and line.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not whole UTF-8 text (or gzip of it): {error}") from error
    docs = []
    # not splitlines(): JSON strings may hold other line separators (U+2028) as they are
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"an object is needed, got a {type(record).__name__}")
            docs.append(to_doc(record))
        except ValueError as error:  # json's own errors are ValueErrors too
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not docs:
        raise ValueError(f"{path} holds no records.")
    return docs


def piqa(record: Record) -> Record:
    """`goal`, `sol1`, `sol2`, `label` (0 or 1): the original record."""
    solutions = {name: _text(record, name) for name in ("goal", "sol1", "sol2")}
    return solutions | {"label": _index(record, "label", 2)}


def arc(record: Record) -> Record:
    """`question` with `stem` and `choices` (`text`, `label`), and `answerKey`; any number of choices, any labels."""
    question = _field(record, "question", dict)
    choices = [_checked(choice, "question.choices[]", dict) for choice in _field(question, "choices", list)]
    labels = [_label(choice, "label") for choice in choices]
    answer = _label(record, "answerKey")
    if answer not in labels:
        raise ValueError(f"answerKey={answer!r} is none of the labels {labels}")
    return {
        "question": _text(question, "stem"),
        "choices": {"text": [_text(choice, "text") for choice in choices], "label": labels},
        "answerKey": answer,
    }


def hellaswag(record: Record) -> Record:
    """`query` (activity and context already put together), `endings`, `label`.

    lm-eval builds the query from parts, with the first letter of its second part (`ctx_b`) capital. Where that part
    begins is lost in a ready query, so its case stays; the rest of lm-eval's cleaning is applied.
    """
    endings = [_without_brackets(_checked(ending, "endings[]", str)) for ending in _field(record, "endings", list)]
    label = _index(record, "label", len(endings))
    return {"query": _without_brackets(_text(record, "query")), "choices": endings, "label": label}


def winogrande(record: Record) -> Record:
    """`sentence` with the blank `_`, `option1`, `option2`, `answer` ("1" or "2"): the original record."""
    doc = {name: _text(record, name) for name in ("sentence", "option1", "option2")}
    if "_" not in doc["sentence"]:
        raise ValueError(f"sentence={doc['sentence']!r} has no blank '_'")
    answer = _label(record, "answer")
    if answer not in ("1", "2"):
        raise ValueError(f"answer={answer!r}: must be '1' or '2'")
    return doc | {"answer": answer}


def lambada(record: Record) -> Record:
    """`context` and the last word `continuation`."""
    return {name: _text(record, name) for name in ("context", "continuation")}


# WinoGrande is scored on what follows the blank, given each option in its place (partial scoring): lm-eval then takes
# the context from `doc_to_choice`, its index from `doc_to_text` and the continuation from `doc_to_target`.
def winogrande_text(doc: Record) -> int:
    """Index of the right option."""
    return int(doc["answer"]) - 1


def winogrande_choice(doc: Record) -> list[str]:
    """The sentence up to the blank, with each option in its place."""
    start = doc["sentence"].partition("_")[0]
    return [start + doc["option1"], start + doc["option2"]]


def winogrande_target(doc: Record) -> str:
    """The sentence behind the blank."""
    return doc["sentence"].partition("_")[2].strip()


def _without_brackets(text: str) -> str:
    """lm-eval's cleaning of HellaSwag: marks of WikiHow such as [header] go away."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _field(record: Record, name: str, kind: type) -> Any:
    if name not in record:
        raise ValueError(f"field {name!r} is missing; there are {sorted(record)}")
    return _checked(record[name], name, kind)


def _checked(value: Any, name: str, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{name}={value!r} is a {type(value).__name__}; must be a {kind.__name__}")
    return value


def _text(record: Record, name: str) -> str:
    return _field(record, name, str)


def _label(record: Record, name: str) -> str:
    """A label, which some files write as a number."""
    return str(_field(record, name, str | int))


def _index(record: Record, name: str, count: int) -> int:
    """An index into `count` choices, which some files write as a string."""
    label = _label(record, name)
    if label not in map(str, range(count)):
        raise ValueError(f"{name}={record[name]!r}: must be an index from 0 to {count - 1}")
    return int(label)
