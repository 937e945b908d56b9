"""The README's table of how long calibration and fine-tuning take."""

from collections.abc import Iterable

from benchmarks.provenance import provenance
from benchmarks.results_file import Results, Row, newest_rows

CALIBRATION_KEYS = ("model", "scheme", "step", "sequences", "seqlen", "epochs")

_NAMES = {"nearest": "nearest rounding", "gptq": "GPTQ", "finetune": "fine-tuning"}
_HEADER = ("step", "tokens", "epochs", "a block", "all blocks", "peak GiB")


def calibration(results: Iterable[Results]) -> str:
    """Markdown.

    Args:
        results: of the calibration benchmark, oldest first.
    """
    found = newest_rows(results, CALIBRATION_KEYS)
    if not found:
        return "No results yet: `python -m benchmarks.calibration` writes them, `python -m benchmarks.tables` this."
    first = found[0][0]
    lines = [
        f"A block of {first['model']}'s shape with random weights, times {first['blocks']}; fine-tuning with the "
        "paper's settings, from fewer epochs.",
        "",
        f"| {' | '.join(_HEADER)} |",
        "|" + "---|" * len(_HEADER),
        *(f"| {' | '.join(_cells(row))} |" for row, _ in found),
    ]
    return "\n".join([*lines, "", provenance(run for _, run in found)])


def _cells(row: Row) -> tuple[str, ...]:
    size = f"{row['sequences']} x {row['seqlen']:,}"
    if row.get("error") is not None:
        return (_NAMES[row["step"]], size, "", "failed", row["error"], "")
    epochs = "" if row["epochs"] is None else f"{row['epochs']} ({row['measured_epochs']} run)"
    memory = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
    return (_NAMES[row["step"]], size, epochs, f"{row['seconds_per_block']:.2f} s", f"{row['minutes']:.1f} min", memory)
