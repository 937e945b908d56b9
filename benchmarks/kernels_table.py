"""The README's table of single ops, from results of `benchmarks.kernels`."""

from collections.abc import Iterable

from benchmarks.provenance import provenance
from benchmarks.results_file import Results, Row, newest_rows

_IDENTITY = ("model", "op", "path")
_SHAPE = ("layer", "m", "n", "k", "batch", "context")
_OPS = ("linears", "attention_decode", "attention_prefill", "silu_hadamard", "rope_store", "norm_quantize", "head")

# where single linears are left to the results files
_HIDDEN = ("linear",)


def kernels(results: Iterable[Results]) -> str:
    """Markdown: each op's time, what bf16 takes, and how near the limit is; then what was run on what.

    Args:
        results: of the kernels benchmark, oldest first.
    """
    found = [pair for pair in newest_rows(results, (*_IDENTITY, *_SHAPE)) if pair[0]["op"] not in _HIDDEN]
    if not found:
        return "No results yet: `python -m benchmarks.kernels` writes them, `python -m benchmarks.tables` this section."
    parts = []
    for model in dict.fromkeys(row["model"] for row, _ in found):
        lines = [
            f"Shapes of {model}:",
            "",
            "| op | path | shape | us | bf16, us | over bf16 | of the limit | exact |",
            "|---|---|---|---|---|---|---|---|",
        ]
        rows = sorted((row for row, _ in found if row["model"] == model), key=_rank)
        parts.append("\n".join([*lines, *map(_line, rows)]))
    return "\n\n".join([*parts, provenance(run for _, run in found)])


def _rank(row: Row) -> tuple:
    op = _OPS.index(row["op"]) if row["op"] in _OPS else len(_OPS)
    return (op, row["op"], row.get("m") or 0, row.get("batch") or 0, row.get("context") or 0, row["path"] != "auto")


def _line(row: Row) -> str:
    shape = ", ".join(f"{key} {row[key]:,}" for key in _SHAPE[1:] if row.get(key) is not None)
    path = f"{row['path']}: {row['note']}" if row["path"] == "auto" and row.get("note") else row["path"]
    cells = [row["op"].replace("_", " "), path, shape]
    if row.get("error") is not None:
        cells += ["failed", *[""] * 4]
    else:
        baseline, speedup = row["baseline_us"], row["speedup"]
        cells += [f"{row['us']:,.1f}", "" if baseline is None else f"{baseline:,.1f}"]
        cells += ["" if speedup is None else f"{speedup:.2f}x", f"{row['limit_fraction']:.0%}"]
        cells += [{True: "yes", False: "NO", None: ""}[row["exact"]]]
    return f"| {' | '.join(cells)} |"
