"""What recipes show in the terminal, how they end, and the JSON that they leave. Needs nothing but Python."""

import argparse
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_OURS = tuple(str(Path(__file__).parents[1] / package) + os.sep for package in ("recipes", "pq_ao"))


def step(what: str) -> None:
    """Announces a step above its progress bars."""
    print(f"-- {what}", file=sys.stderr, flush=True)


def run(main: Callable[[], Any]) -> None:
    """Calls `main` for a command line: an error that we raised says what to do, so it ends without a traceback."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # for its authors
    warnings.formatwarning = lambda message, category, *where, **line: f"{category.__name__}: {message}\n"
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
    except Exception as error:
        origin = traceback.extract_tb(error.__traceback__)[-1]
        if origin.filename.startswith(_OURS) and (origin.line or "").startswith("raise "):
            raise SystemExit(f"error: {error}") from None
        raise


def count(text: str) -> int:
    """An argument's type: a whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number of at least 1")
    return int(text)


def whole(text: str) -> int:
    """An argument's type: a whole number of at least 0."""
    return 0 if text == "0" else count(text)


def above_zero(text: str) -> float:
    """An argument's type: a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give a number above 0")
    return number


def print_reply(tokens: Iterable[int], decode: Callable[[list[int]], str]) -> list[int]:
    """Prints a reply to stdout while it is made.

    Args:
        tokens: its ids, as they come.
        decode: turns ids into text.

    Returns:
        the ids.
    """
    reply: list[int] = []
    printed = ""
    for token in tokens:
        reply.append(token)
        text = decode(reply)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character whose bytes are not all there
            print(text[len(printed) :], end="", flush=True)
            printed = text
    print(decode(reply)[len(printed) :], flush=True)
    return reply


def columns(rows: list[tuple[str, ...]]) -> str:
    """Rows of cells as aligned text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def plain(value: Any) -> Any:
    """`value` with None for NaN and infinity: JSON has no such numbers."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(facts: dict, path: Path) -> None:
    """Writes `facts`, whole or not at all, and makes the folder."""
    text = json.dumps(plain(facts), indent=1, ensure_ascii=False, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
