"""What the README says first: speed and memory against compiled bf16, and perplexity, in a few rows."""

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median

from benchmarks.accuracy_rows import Found as AccuracyRow
from benchmarks.accuracy_rows import (
    by_setting,
    current_rows,
    distinct,
    is_failed,
    is_original,
    markdown,
    perplexities,
    where,
)
from benchmarks.generation_table import Found, whole_rows
from benchmarks.results_file import Results, Row

_SCHEMES = ("bf16", "w8a8kv8", "w4a8kv4", "w4a4kv4")
_SHAPE = ("model", "phase", "batch", "context", "layers", "extrapolated")


def headline(speed: Iterable[Results], accuracy: Iterable[Results]) -> str:
    """Markdown: a table of static W4A4KV4 where all layers ran beside compiled bf16, and one of perplexity by scheme.

    Args:
        speed: of the generation benchmark, oldest first.
        accuracy: of the accuracy benchmark, oldest first.
    """
    parts = [*_speed(whole_rows(speed)), *_accuracy(current_rows(accuracy))]
    return "\n\n".join(parts) or "No results yet: `benchmarks` makes them, `python -m benchmarks.tables` this section."


def _speed(rows: Sequence[Found]) -> list[str]:
    pairs = [
        (ours, dense, run)
        for ours, run in rows
        if (ours["system"], ours["head"]) == ("pq_ao-static", "bf16") and not ours.get("extrapolated")
        for dense in _beside(ours, run)
    ]
    parts = []
    for model in dict.fromkeys(ours["model"] for ours, _, _ in pairs):
        chosen = [pair for pair in pairs if pair[0]["model"] == model]
        devices = ", ".join(dict.fromkeys(run.device for _, _, run in chosen))
        lines = [(_task(ours), _ms(dense), _ms(ours), f"{ours['speedup']:.2f}x") for ours, dense, _ in chosen]
        largest = max(chosen, key=lambda pair: (pair[0]["phase"] == "decode", pair[1]["peak_gib"] or 0))
        if largest[0]["peak_gib"] and largest[1]["peak_gib"]:
            peaks = [row["peak_gib"] for row in largest[1::-1]]
            lines.append(
                (f"memory, {_task(largest[0])}", *(f"{p:.1f} GiB" for p in peaks), f"{peaks[1] / peaks[0]:.2f}x")
            )
        header = (f"{model}'s shape, {devices}", "compiled bf16", "W4A4KV4, static", "")
        parts.append("\n".join(markdown(header, lines)))
    return parts


def _beside(ours: Row, run: Results) -> list[Row]:
    """Compiled bf16 of the same shape and run, where both gave a time."""
    same = [row for row in run.rows if row["system"] == "bf16-compiled" and not is_failed(row) and row.get("ms")]
    shape = [ours.get(name) for name in _SHAPE]
    if is_failed(ours) or not ours.get("speedup"):
        return []
    return [row for row in same if [row.get(name) for name in _SHAPE] == shape][-1:]


def _task(row: Row) -> str:
    return f"{row['phase']}, {row['batch']} x {row['context']:,} tokens"


def _ms(row: Row) -> str:
    return f"{row['ms']:.2f} ms a token" if row["phase"] == "decode" else f"{row['ms']:.1f} ms"


def _accuracy(rows: Sequence[AccuracyRow]) -> list[str]:
    texts = [(row, run) for row, run in rows if row.get("task") is None and row.get("path") != "reference"]
    parts = []
    for model, corpus in distinct(texts, ("model", "corpus")):
        same = where(texts, ("model", "corpus"), (model, corpus))
        shortest = min(row["seqlen"] for row, _ in same)
        most = max(row["windows"] for row, _ in same if row["seqlen"] == shortest)
        same = where(same, ("seqlen", "windows"), (shortest, most))
        ours = [found for found in same if _is_whole_method(found[0])]
        if not ours:
            continue
        [(text, _)] = Counter(row["calibration_corpus"] for row, _ in ours).most_common(1)
        ours = where(ours, ("calibration_corpus",), (text,)) + [found for found in same if is_original(found[0])]
        cells: dict[str, dict[bool, str]] = {}
        for seeds in by_setting(ours):  # of one scheme, what does more comes later
            if measured := perplexities(seeds):
                row = seeds[0][0]
                cells.setdefault(row["scheme"], {})[bool(row["finetuned"])] = f"{median(measured):.2f}"
        schemes = [scheme for scheme in _SCHEMES if scheme in cells]
        header = (f"perplexity of {model}, `{corpus}`", *schemes)
        lines = [
            (name, *(cells[scheme].get(trained, "") for scheme in schemes))
            for trained, name in ((False, "as calibrated"), (True, "fine-tuned"))
        ]
        parts.append("\n".join(markdown(header, lines)))
    return parts


def _is_whole_method(row: Row) -> bool:
    return row["mode"] == "static" and all(row.get(part, True) for part in ("prefix", "rotation", "balance"))
