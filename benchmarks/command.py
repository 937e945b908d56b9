"""What the command lines of the benchmarks share."""

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path


def described(error: Exception) -> str:
    """Type and first line of an error: the rest is in the log."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def command_line(module: str, arguments: Sequence[str]) -> str:
    """The command as results record it. Paths are shortened to their last part: results travel, folders do not."""
    return shlex.join(["python", "-m", module, *map(_shortened, arguments)])


def _shortened(argument: str) -> str:
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    is_path = value.startswith((".", "~")) or os.path.isabs(value) or ("/" in value and os.path.exists(value))
    return option + equals + (Path(value).name or value if is_path else value)


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is too small; at least 1")
    return value
