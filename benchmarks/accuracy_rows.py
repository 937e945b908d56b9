"""Which rows of the accuracy benchmark stand in its tables, in which order and under which name."""

import statistics
from collections.abc import Iterable, Sequence

from benchmarks.results_file import Results, Row, newest_rows

# what tells one row from another; the rest was measured
SETTING = (
    *("scheme", "mode", "prefix", "rotation", "balance", "search", "rounding", "finetuned"),
    *("calibration_sequences", "calibration_length", "epochs", "end_to_end_epochs"),
)
_TEXT = ("model", "corpus", "seqlen", "windows", "task")
# of fine-tuning, and in no column: a table has the newest of them alone
_TRAINING = (
    *("learning_rate", "weight_learning_rate", "end_to_end_rate"),
    *("end_to_end_weight_rate", "end_to_end_prefix_rate"),
    *("batch_size_training", "validation_sequences"),
)
ACCURACY_KEYS = (*_TEXT, "calibration_corpus", *SETTING, *_TRAINING, "path", "seed")

# the steps of the paper's ablation, then other schemes; an unknown value comes last
_ORDER: dict[str, tuple] = {
    "scheme": ("bf16", "w4a4kv4", "w4a4kv16", "w4a8kv4", "w8a8kv8"),
    "mode": ("none", "dynamic", "static"),
    "rotation": (False, True),
    "prefix": (False, True),
    "balance": (None, False, True),
    "finetuned": (False, True),
    "rounding": (None, "nearest", "gptq"),
    "search": (None, "none", "tensor", "block"),
}

Found = tuple[Row, Results]


def current_rows(results: Iterable[Results]) -> list[Found]:
    """The newest row of each setting, text or task, and seed.

    Args:
        results: of the accuracy benchmark, oldest first.
    """
    found = newest_rows(results, ACCURACY_KEYS)
    visible = tuple(key for key in ACCURACY_KEYS if key not in (*_TRAINING, "seed"))
    newest: dict[tuple, Found] = {}
    for candidate in sorted(found, key=lambda found: found[1].date):
        newest[values(candidate[0], visible)] = candidate
    return [
        (row, run) for row, run in found if values(row, _TRAINING) == values(newest[values(row, visible)][0], _TRAINING)
    ]


def values(row: Row, keys: Sequence[str]) -> tuple:
    """Those of a row; None for a key that it lacks."""
    return tuple(row.get(key) for key in keys)


def distinct(rows: Iterable[Found], keys: Sequence[str]) -> list[tuple]:
    """The values that rows have, each once."""
    return list(dict.fromkeys(values(row, keys) for row, _ in rows))


def where(rows: Iterable[Found], keys: Sequence[str], wanted: tuple) -> list[Found]:
    """Rows with these values."""
    return [found for found in rows if values(found[0], keys) == wanted]


def is_original(row: Row) -> bool:
    """Whether a row is of the model as it was loaded."""
    return row["scheme"] == "bf16" and not row["prefix"]


def is_failed(row: Row) -> bool:
    """Whether it says why there is no number, instead of one."""
    return row.get("error") is not None


def by_setting(rows: Iterable[Found]) -> list[list[Found]]:
    """Rows grouped by setting, a row a seed, in the order of the table."""
    rows = list(rows)
    return [where(rows, SETTING, setting) for setting in sorted(distinct(rows, SETTING), key=_rank)]


def _rank(setting: tuple) -> tuple:
    row = dict(zip(SETTING, setting, strict=True))
    places = (order.index(row[key]) if row[key] in order else len(order) for key, order in _ORDER.items())
    return (not is_original(row), *places, *(row[key] or 0 for key in SETTING[-4:]))


def label(row: Row) -> str:
    """A setting in few words, for tables of few columns."""
    if row["scheme"] == "bf16":
        return "bf16, prefix" if row["prefix"] else "bf16"
    words = [f"{row['scheme']} {row['mode']}"]
    words += [f"no {part}" for part in ("rotation", "prefix", "balance") if not row.get(part, True)]
    words += [] if row["search"] == "tensor" else [f"search {row['search']}"]
    words += [] if row["rounding"] == "nearest" else [row["rounding"]]
    words += ["fine-tuned"] * row["finetuned"]
    return ", ".join(words + ["end to end"] * bool(row.get("end_to_end_epochs")))


def perplexities(seeds: Iterable[Found]) -> list[float]:
    """Of the rows that have one."""
    return [row["ppl"] for row, _ in seeds if not is_failed(row)]


def perplexity_cell(seeds: list[Found]) -> str:
    """Median, and the range over seeds."""
    measured = perplexities(seeds)
    failed = f"{len(seeds) - len(measured)} failed" if len(measured) < len(seeds) else ""
    if not measured:
        return "failed"
    cell = f"{statistics.median(measured):.2f}"
    if len(measured) > 1:
        cell += f" ({min(measured):.2f} to {max(measured):.2f}, {len(measured)} seeds)"
    return f"{cell}, {failed}" if failed else cell


def over_bf16(seeds: list[Found], floating: list[Found]) -> float | None:
    """Median of perplexity over that of bf16, of the same file and windows or, where a file has none, the newest.

    Args:
        seeds: rows of one setting.
        floating: rows of bf16 on the same windows.
    """
    text, ratios = ("model", "corpus", "seqlen", "windows"), []
    for row, run in seeds:
        if not is_failed(row):
            same_file = [(other, run) for other in run.rows if is_original(other)]
            base = perplexities(where(same_file, text, values(row, text))) or perplexities(floating)
            ratios += [row["ppl"] / base[-1]] if base else []
    return statistics.median(ratios) if ratios else None


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines)]
