"""The table of task accuracies, each with its standard error, and their average over bf16's."""

import math
import statistics
from dataclasses import dataclass

from benchmarks.accuracy_rows import Found, by_setting, is_failed, label, markdown
from benchmarks.results_file import Row


@dataclass(frozen=True)
class _Score:
    """A share of right answers with its standard error, of so many records (0: an average)."""

    value: float
    stderr: float | None
    records: int = 0


def tasks_table(floating: list[Found], rest: list[Found]) -> str:
    """Markdown: a row a setting and seed, a column a task; acc_norm where a task has it, else acc.

    Args:
        floating: rows of the model as it was loaded.
        rest: those of one calibration text.
    """
    rows = floating + rest
    tasks = list(dict.fromkeys(row["task"] for row, _ in rows))
    base = {row["task"]: _score(row) for row, _ in floating}
    lines = []
    for group in by_setting(rows):
        seeds = list(dict.fromkeys(row["seed"] for row, _ in group))
        for seed in seeds:
            scores = {row["task"]: _score(row) for row, _ in group if row["seed"] == seed}
            name = label(group[0][0]) + (f", seed {seed}" if len(seeds) > 1 else "")
            cells = [_cell(scores[task], "failed") if task in scores else "-" for task in tasks]
            average = _average(scores, tasks)
            lines.append((name, *cells, _cell(average, "-"), _over(average, scores, base, tasks)))
    records = {task: _records(rows, task) for task in tasks}
    header = ("", *(f"{task.removesuffix('_local')} ({records[task]})" for task in tasks), "average", "over bf16")
    title = (
        f"**{rows[0][0]['model']}**: zero-shot accuracy in %, normalised where a task has that, with standard errors, "
        "on so many records. That of the ratio takes the two models' answers as independent, which overstates it."
    )
    return "\n".join([title, "", *markdown(header, lines)])


def _score(row: Row) -> _Score | None:
    """None for a failure."""
    if is_failed(row):
        return None
    if row.get("acc_norm") is not None:
        return _Score(row["acc_norm"], row["acc_norm_stderr"], row["records"])
    return _Score(row["acc"], row["stderr"], row["records"])


def _records(rows: list[Found], task: str) -> str:
    counts = {row["records"] for row, _ in rows if row["task"] == task and not is_failed(row)}
    return " or ".join(f"{count:,}" for count in sorted(counts)) or "none"


def _cell(score: _Score | None, without: str) -> str:
    if score is None:
        return without
    error = "" if score.stderr is None else f" ± {100 * score.stderr:.1f}"
    return f"{100 * score.value:.1f}{error}"


def _average(scores: dict[str, _Score | None], tasks: list[str]) -> _Score | None:
    """Of all tasks; None where one is missing."""
    found = [scores.get(task) for task in tasks]
    if None in found:
        return None
    errors = [score.stderr for score in found]
    stderr = None if None in errors else math.hypot(*errors) / len(errors)
    return _Score(statistics.fmean(score.value for score in found), stderr)


def _over(average: _Score | None, scores: dict, base: dict, tasks: list[str]) -> str:
    """Ratio of the averages, where both are of the same records."""
    floating = _average(base, tasks)
    if average is None or floating is None or not floating.value:
        return "-"
    if any(scores[task].records != base[task].records for task in tasks):
        return "-"
    ratio = average.value / floating.value
    if scores == base or None in (average.stderr, floating.stderr):
        return f"{ratio:.3f}"
    error = math.hypot(average.stderr, ratio * floating.stderr) / floating.value
    return f"{ratio:.3f} ± {error:.3f}"
