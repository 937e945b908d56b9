"""The README's tables of prefill and decode, and the points of their plot, from results of `benchmarks.generation`.

A speed-up belongs to the file it was measured in; rows of one table may come from several files.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from benchmarks.provenance import provenance
from benchmarks.results_file import Results, Row, newest_rows

_KEYS = ("model", "system", "head", "phase", "batch", "context")
SYSTEM_ORDER = (
    "bf16-eager",
    "bf16-compiled",
    "torchao-float8dq",
    "torchao-int4wo",
    "torchao-int8dq",
    "pq_ao-dynamic",
    "pq_ao-static",
)

Found = tuple[Row, Results]

_OURS = ("pq_ao-static", "bf16")
_RUN_KEYS = ("model", "phase", "batch", "context", "layers", "extrapolated")


def _is_whole(row: Row) -> bool:
    """Whether a row speaks of the whole model: all layers ran, or were extrapolated to."""
    return row["layers"] == row.get("model_layers", row["layers"]) or bool(row.get("extrapolated"))


def _ours_beside(row: Row, run: Results) -> Row | None:
    """Static mode's row of the same shape in the run, unless it failed."""
    keys = [row.get(name) for name in _RUN_KEYS]
    ours = [
        other
        for other in run.rows
        if (other["system"], other["head"]) == _OURS and [other.get(name) for name in _RUN_KEYS] == keys
    ]
    return ours[-1] if ours and ours[-1].get("error") is None else None


def _worth(row: Row, run: Results) -> int:
    """What does not take the place of what: a failure of a measurement, an extrapolated number of that of all layers, a
    row of a run that was cut before it measured static mode, too, of one with both.
    """
    if row.get("error") is not None:
        return 0
    if row.get("extrapolated"):
        return 1
    return 2 if _ours_beside(row, run) is None else 3


def whole_rows(results: Iterable[Results]) -> list[Found]:
    """The newest row of each system and shape among those that are worth most."""
    results, kept = list(results), {}
    for worth in range(4):
        runs = [replace(run, rows=[r for r in run.rows if _is_whole(r) and _worth(r, run) == worth]) for run in results]
        origin = {id(chosen): run for chosen, run in zip(runs, results, strict=True)}
        for row, chosen in newest_rows(runs, _KEYS):
            kept[tuple(row.get(name) for name in _KEYS)] = (row, origin[id(chosen)])
    return sorted(kept.values(), key=lambda found: _rank(found[0]))


def _rank(row: Row) -> tuple:
    system = SYSTEM_ORDER.index(row["system"]) if row["system"] in SYSTEM_ORDER else len(SYSTEM_ORDER)
    return (row["model"], row["phase"] == "prefill", row["batch"], row["context"], system, row["head"])


def label(row: Row) -> str:
    """A system's name as people read it."""
    name = row["system"] if row["head"] == "bf16" else f"{row['system']}, {row['head']} head"
    return f"{name}, fused projections" if row.get("fused") else name


def generation(results: Iterable[Results]) -> str:
    """Markdown: a table for each model and phase, and what was run on what.

    Args:
        results: of the generation benchmark, oldest first.
    """
    rows = whole_rows(results)
    if not rows:
        return (
            "No results yet: `python -m benchmarks.generation` writes them, `python -m benchmarks.tables` this section."
        )
    parts = []
    for model in dict.fromkeys(row["model"] for row, _ in rows):
        for phase in ("decode", "prefill"):
            chosen = [found for found in rows if (found[0]["model"], found[0]["phase"]) == (model, phase)]
            if chosen:
                parts.append(_table(model, phase, chosen))
    notes = _notes([row for row, _ in rows])
    return "\n\n".join([*parts, *notes, provenance(run for _, run in rows)])


def _table(model: str, phase: str, rows: Sequence[Found]) -> str:
    decode = phase == "decode"
    unit = "ms a token" if decode else "ms"
    columns = ["batch x context", "system", unit, "tokens/s", "over compiled bf16", "our time over its", "peak GiB"]
    columns += ["of bandwidth", "kernels a layer"] if decode else ["linears, attention, rest (ms)"]
    lines = [
        f"**{phase.capitalize()}**, {model}'s shape with random weights:",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
    ]
    for row, run in rows:
        cells = [f"{row['batch']} x {row['context']:,}", label(row)]
        if row.get("error") is not None:
            cells += [f"failed: {_cut(row['error'])}", *[""] * (len(columns) - 3)]
        else:
            mark = "*" if row.get("extrapolated") else ""
            speedup = "-" if row["speedup"] is None else f"{row['speedup']:.2f}x"
            cells += [f"{row['ms']:.2f}{mark}", f"{row['tokens_per_s']:,.0f}"]
            cells += [speedup if row.get("counts", True) else f"({speedup})", _against_ours(row, run)]
            cells += ["" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"]
            if decode:
                fraction = row["bandwidth_fraction"]
                cells += ["" if fraction is None else f"{fraction:.0%}", str(row["kernels_per_layer"] or "")]
            else:
                split = {} if row.get("extrapolated") else row.get("split_ms") or {}  # that of a few layers says little
                cells += [", ".join(f"{value:.1f}" for value in split.values())]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _against_ours(row: Row, run: Results) -> str:
    """Time of static mode over that of another system, both from its run: what two runs say apart may be the GPU's."""
    ours = _ours_beside(row, run)
    if row["system"] == _OURS[0] or ours is None:
        return ""
    return f"{ours['ms'] / row['ms']:.2f}x"


def _cut(error: str, most: int = 80) -> str:
    """An error that fits into a cell."""
    error = error.replace("|", "/")
    return error if len(error) <= most else f"{error[: most - 3]}..."


def _notes(rows: Sequence[Row]) -> list[str]:
    notes = ["Ratios are those of one run: our time over its, pq_ao-static's time over that of the row's system."]
    if any(row.get("extrapolated") and row.get("error") is None for row in rows):
        notes.append("\\* extrapolated to all layers from fewer layers of the same width.")
    if not all(row.get("counts", True) for row in rows):
        notes.append("In brackets: the baseline was too slow for its bytes, so this does not count.")
    return notes


def speedups(results: Iterable[Results], phase: str) -> dict[str, dict[tuple[int, int], float]]:
    """Speed-up over compiled bf16 by system and (batch, context), for the plot; the baseline is left out."""
    series: dict[str, dict[tuple[int, int], float]] = {}
    for row, _ in whole_rows(results):
        if row["phase"] == phase and row.get("speedup") and row.get("counts", True):
            if row["system"] != "bf16-compiled":
                series.setdefault(label(row), {})[row["batch"], row["context"]] = row["speedup"]
    return series
