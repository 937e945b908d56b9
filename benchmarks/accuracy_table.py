"""The README's tables of accuracy, from results of `benchmarks.accuracy`: perplexity, long contexts, tasks."""

import statistics
from collections.abc import Iterable

from benchmarks.accuracy_rows import (
    SETTING,
    Found,
    by_setting,
    current_rows,
    distinct,
    is_original,
    label,
    markdown,
    over_bf16,
    perplexity_cell,
    values,
    where,
)
from benchmarks.accuracy_tasks_table import tasks_table
from benchmarks.provenance import provenance
from benchmarks.results_file import Results, Row

_HEADER = (
    *("scheme", "mode", "prefix", "rotation", "balance", "scale search", "rounding", "fine-tuned", "calibrated on"),
    *("perplexity", "over bf16", "calibration"),
)


def accuracy(results: Iterable[Results]) -> str:
    """Markdown: tables for each model, corpus and calibration text, and what was run on what.

    Args:
        results: of the accuracy benchmark, oldest first.
    """
    rows = current_rows(results)
    texts = [found for found in rows if found[0].get("task") is None]
    parts = []
    for model, corpus in distinct(texts, ("model", "corpus")):
        parts += _perplexity_parts(_whole(where(texts, ("model", "corpus"), (model, corpus))))
    tasks = [found for found in rows if found[0].get("task") is not None]
    for (model,) in distinct(tasks, ("model",)):
        floating, groups = _by_calibration(where(tasks, ("model",), (model,)))
        parts += [tasks_table(floating, group) for group in groups]
    if not parts:
        return (
            "No results yet: `python -m benchmarks.accuracy` writes them, `python -m benchmarks.tables` this section."
        )
    return "\n\n".join([*parts, provenance(run for _, run in rows)])


def _whole(rows: list[Found]) -> list[Found]:
    """Of each length of window the rows on most windows: a run on a few, to try something, does not replace them."""
    most: dict[int, int] = {}
    for row, _ in rows:
        if row.get("path") != "reference":
            most[row["seqlen"]] = max(most.get(row["seqlen"], 0), row["windows"])
    return [(row, run) for row, run in rows if row.get("path") == "reference" or row["windows"] == most[row["seqlen"]]]


def _by_calibration(rows: list[Found]) -> tuple[list[Found], list[list[Found]]]:
    """Rows of the model as it was loaded, and the others by calibration text; at least one group, maybe empty."""
    floating = [found for found in rows if is_original(found[0])]
    rest = [found for found in rows if not is_original(found[0])]
    corpora = distinct(rest, ("calibration_corpus",))
    return floating, [where(rest, ("calibration_corpus",), corpus) for corpus in corpora] or [[]]


def _perplexity_parts(rows: list[Found]) -> list[str]:
    floating, groups = _by_calibration(rows)
    parts = []
    for group in groups:
        checks = [found for found in group if found[0].get("path") == "reference"]
        both = floating + [found for found in group if found[0].get("path") != "reference"]
        lengths = [length for (length,) in distinct(both, ("seqlen",))]
        # the length of window that most settings have; the others are a question of their own
        counts = {length: len(by_setting(where(both, ("seqlen",), (length,)))) for length in lengths}
        main = min(lengths, key=lambda length: (-counts[length], length), default=None)
        if main is not None:
            parts += _main_table(where(both, ("seqlen",), (main,)), group)
        parts += [_check(row) for row, _ in checks if row.get("error") is None]
        for length in sorted(set(lengths) - {main}):
            parts.append(_context_table(*(where(both, ("seqlen",), (size,)) for size in (main, length))))
    return parts


def _main_table(rows: list[Found], calibrated: list[Found]) -> list[str]:
    floating = [found for found in rows if is_original(found[0])]
    row = rows[0][0]
    title = f"**{row['model']}**: perplexity on `{row['corpus']}`, {_windows(row)} of {row['seqlen']:,} tokens"
    if calibrated:
        title += f"; calibrated on `{calibrated[0][0]['calibration_corpus']}`"
    lines = [_cells(seeds, floating) for seeds in by_setting(rows)]
    parts = [f"{title}.", "\n".join(markdown(_HEADER, lines))]
    prefixes = list(dict.fromkeys(tuple(row.get("prefix_ids") or ()) for row, _ in rows if row["prefix"]))
    if found := [" ".join(map(str, prefix)) for prefix in prefixes if prefix]:
        parts.append(f"Prefix found (token ids): {'; '.join(found)}.")
    return parts


def _cells(seeds: list[Found], floating: list[Found]) -> tuple[str, ...]:
    row = seeds[0][0]
    quantized = row["scheme"] != "bf16"
    yes = {True: "yes", False: "no"}
    length = row.get("calibration_length")
    return (
        row["scheme"],
        row["mode"] if quantized else "",
        yes[row["prefix"]],
        yes[row["rotation"]] if quantized else "",
        yes.get(row.get("balance"), ""),
        row["search"] or "",
        row["rounding"] or "",
        _finetuning(row) if quantized else "",
        f"{row['calibration_sequences']} x {length:,}" if length else "",
        perplexity_cell(seeds),
        _ratio(over_bf16(seeds, floating)),
        _cost(seeds) if quantized else "",
    )


def _finetuning(row: Row) -> str:
    epochs = row.get("epochs")
    if not row["finetuned"] or epochs is None:
        return "yes" if row["finetuned"] else "no"
    together = row.get("end_to_end_epochs")
    blockwise = "1 epoch" if epochs == 1 else f"{epochs} epochs"
    if not together:
        return blockwise
    learned = row["prefix"] and row.get("end_to_end_prefix_rate")
    return f"{blockwise}, {together} end to end" + ", prefix too" * bool(learned)


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"


def _cost(seeds: list[Found]) -> str:
    """Median wall time and largest peak of memory of the calibrations; "about" where one was interrupted.

    Where several ran at a time, how many: they shared the machine.
    """
    timed = [row for row, _ in seeds if row.get("calibration_seconds")]
    if not timed:
        return "-"
    about = "about " if any(row.get("restored_blocks") for row in timed) else ""
    cell = f"{about}{statistics.median(row['calibration_seconds'] for row in timed):.0f} s"
    at_once = max(row.get("calibrations_at_once") or 1 for row in timed)
    cell += f" ({at_once} at a time)" if at_once > 1 else ""
    peaks = [row["calibration_peak_gib"] for row in timed if row.get("calibration_peak_gib")]
    return f"{cell}, {max(peaks):.1f} GiB" if peaks else cell


def _windows(row: Row) -> str:
    return f"{row['windows']:,} window{'s' * (row['windows'] != 1)}"


def _check(row: Row) -> str:
    windows = "window" if row["windows"] == 1 else _windows(row)
    return (
        f"{label(row)}, on the first {windows}: {row['integer_ppl']:.3f} with integers, "
        f"{row['ppl']:.3f} with quantize-dequantize in float32."
    )


def _context_table(short: list[Found], long: list[Found]) -> str:
    """Perplexity over bf16 at two lengths of window: a quantized model should stand a long context as well as bf16."""
    floating = [[found for found in rows if is_original(found[0])] for rows in (short, long)]
    row, lines = long[0][0], []
    for seeds in by_setting(long):
        same = where(short, SETTING, values(seeds[0][0], SETTING))
        ratios = [over_bf16(rows, base) for rows, base in zip((same, seeds), floating, strict=True)]
        change = "-" if None in ratios else f"{100 * (ratios[1] / ratios[0] - 1):+.1f} %"
        lines.append((label(seeds[0][0]), perplexity_cell(seeds), *map(_ratio, ratios), change))
    header = ("", "perplexity", f"over bf16 at {short[0][0]['seqlen']:,}", f"over bf16 at {row['seqlen']:,}", "change")
    title = f"Longer contexts: `{row['corpus']}` in {_windows(row)} of {row['seqlen']:,} tokens."
    return "\n".join([title, "", *markdown(header, lines)])
