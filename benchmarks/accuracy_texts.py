"""The texts of the accuracy benchmark, to measure on and to calibrate on, and that the two are not the same."""

from collections.abc import Sequence
from pathlib import Path

from pq_ao.data import DATASET_NAMES, EMBEDDED

# characters from which on a line that two texts share is no chance
_LONG_LINE = 120


def refuse_overlap(corpus: str, calibration: str, name: str) -> None:
    """Refuses a calibration text with lines of the test text: the model would know the answers.

    Args:
        corpus, calibration: the two texts.
        name: of the calibration text.

    Raises:
        ValueError: one text holds the other, or both hold the same long line.
    """
    small, large = sorted((corpus.strip(), calibration.strip()), key=len)
    shared = _long_lines(corpus) & _long_lines(calibration)
    if small in large or shared:
        which = f'{len(shared)} long lines, one begins "{min(shared)[:50]}"' if shared else "the whole of one of them"
        raise ValueError(f"--calibration {name} and --corpus have text in common ({which}); give another text.")


def _long_lines(text: str) -> set[str]:
    return {line for line in map(str.strip, text.split("\n")) if len(line) >= _LONG_LINE}


def text_name(source: str) -> str:
    """Name of a corpus, a file's without its folder."""
    return source if source in (EMBEDDED, *DATASET_NAMES) else Path(source).name


def text_names(sources: Sequence[str]) -> str:
    """Names of several, as results have them."""
    return " + ".join(map(text_name, sources))
