"""The README's table of perplexity, from results of `benchmarks.accuracy`."""

import statistics
from collections.abc import Iterable, Sequence

from benchmarks.provenance import provenance
from benchmarks.results_file import Results, Row, newest_rows

# what tells one row of the accuracy benchmark from another; the rest was measured
_SETTING = ("scheme", "mode", "prefix", "rotation", "search", "rounding", "finetuned")
_TEXT = ("model", "corpus", "seqlen")
_CALIBRATION = ("calibration_corpus", "calibration_sequences", "calibration_length")
ACCURACY_KEYS = (*_TEXT, "windows", *_CALIBRATION, *_SETTING, "path", "seed")

# from the easiest setting to the hardest; an unknown one comes last
_ORDER: dict[str, tuple] = {
    "scheme": ("bf16", "w8a8kv8", "w4a8kv4", "w4a4kv16", "w4a4kv4"),
    "mode": ("none", "static", "dynamic"),
    "prefix": (True, False),
    "search": (None, "none", "tensor", "block"),
    "rounding": (None, "nearest", "gptq"),
    "finetuned": (False, True),
}

Found = tuple[Row, Results]


def accuracy(results: Iterable[Results]) -> str:
    """Markdown: a table for each model and corpus (its most complete runs), and what was run on what.

    Args:
        results: of the accuracy benchmark, oldest first.
    """
    rows = [found for found in newest_rows(results, ACCURACY_KEYS) if found[0].get("task") is None]
    reference = [found for found in rows if found[0].get("path") == "reference"]
    rows = [found for found in rows if found[0].get("path") != "reference"]
    if not rows:
        return (
            "No results yet: `python -m benchmarks.accuracy` writes them, `python -m benchmarks.tables` this section."
        )
    parts = []
    for text in _distinct(rows, _TEXT):
        same_text = _where(rows, _TEXT, text)
        # a run on a few windows, to try something, does not replace the whole corpus
        windows = max(row.get("windows") or 0 for row, _ in same_text)
        same_text = [found for found in same_text if (found[0].get("windows") or 0) == windows]
        floating = [found for found in same_text if _is_original(found[0])]
        rest = [found for found in same_text if not _is_original(found[0])]
        for calibration in _distinct(rest, _CALIBRATION) or [(None, None, None)]:
            checks = _where(_where(reference, _TEXT, text), _CALIBRATION, calibration)
            parts.append(_accuracy_table(floating, _where(rest, _CALIBRATION, calibration), checks))
    return "\n\n".join(parts)


def _is_original(row: Row) -> bool:
    """Whether a row is of the model as it was loaded."""
    return row["scheme"] == "bf16" and not row["prefix"]


def _distinct(rows: list[Found], keys: Sequence[str]) -> list[tuple]:
    return list(dict.fromkeys(tuple(row.get(key) for key in keys) for row, _ in rows))


def _where(rows: list[Found], keys: Sequence[str], values: tuple) -> list[Found]:
    return [found for found in rows if tuple(found[0].get(key) for key in keys) == values]


def _accuracy_table(floating: list[Found], rest: list[Found], checks: list[Found]) -> str:
    rows = floating + rest
    lines = [
        _what_was_run(rows[0][0], next((row for row, _ in rest), None)),
        "",
        "| scheme | mode | prefix | scale search | rounding | perplexity | over bf16 |",
        "|---|---|---|---|---|---|---|",
    ]
    for setting in sorted(_distinct(rows, _SETTING), key=_rank):
        seeds = _where(rows, _SETTING, setting)
        row = seeds[0][0]
        rounding = f"{row['rounding'] or ''}{' + fine-tuning' if row['finetuned'] else ''}"
        # scales of dynamic mode are not searched
        search = (row["search"] or "") if row["mode"] == "static" else ""
        mode = "" if row["mode"] == "none" else row["mode"]
        prefix = ("yes" if row["prefix"] else "no") + ("" if row["rotation"] or not mode else ", no rotation")
        cells = (row["scheme"], mode, prefix, search, rounding, _perplexity(seeds), _ratio(seeds, floating))
        lines.append(f"| {' | '.join(cells)} |")
    for row, _ in checks:
        if row.get("error") is None:
            windows = "window" if row["windows"] == 1 else f"{row['windows']} windows"
            lines += [
                "",
                f"{row['scheme']}, {row['mode']}, on the first {windows}: {row['integer_ppl']:.3f} with integers, "
                f"{row['ppl']:.3f} with quantize-dequantize in float32.",
            ]
    runs = {id(run): run for _, run in rows + checks}.values()
    return "\n".join([*lines, "", *map(provenance, sorted(runs, key=lambda run: run.date))])


def _what_was_run(row: Row, calibrated: Row | None) -> str:
    text = (
        f"**{row['model']}**: perplexity on `{row['corpus']}`, {row['windows']:,} windows of {row['seqlen']:,} tokens"
    )
    if calibrated is None:
        return f"{text}."
    sequences, length = calibrated["calibration_sequences"], calibrated["calibration_length"]
    return f"{text}; calibrated on {sequences} x {length:,} tokens of `{calibrated['calibration_corpus']}`."


def _rank(setting: tuple) -> tuple:
    row = dict(zip(_SETTING, setting, strict=True))
    places = (order.index(row[key]) if row[key] in order else len(order) for key, order in _ORDER.items())
    return (not _is_original(row), *places)


def _measured(seeds: list[Found]) -> list[float]:
    return [row["ppl"] for row, _ in seeds if row.get("error") is None]


def _perplexity(seeds: list[Found]) -> str:
    values = _measured(seeds)
    failed = f"{len(seeds) - len(values)} failed" if len(values) < len(seeds) else ""
    if not values:
        return "failed"
    cell = f"{statistics.median(values):.2f}"
    if len(values) > 1:
        cell += f" ({min(values):.2f} to {max(values):.2f}, {len(values)} seeds)"
    return f"{cell}, {failed}" if failed else cell


def _ratio(seeds: list[Found], floating: list[Found]) -> str:
    """Median over bf16 of the same file and windows, or the newest such row where a file has none."""
    ratios = []
    for row, run in seeds:
        if row.get("error") is None:
            same_file = [(other, run) for other in run.rows if _is_original(other)]
            text = (*_TEXT, "windows")
            same_file = _where(same_file, text, tuple(row.get(key) for key in text))
            base = _measured(same_file) or _measured(floating)
            ratios += [row["ppl"] / base[-1]] if base else []
    return f"{statistics.median(ratios):.3f}" if ratios else "-"
