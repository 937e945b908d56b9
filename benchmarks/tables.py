"""Rewrites the README's tables and the plot from `benchmarks/results`: `python -m benchmarks.tables`.

`--check` looks only. No number in the README is typed by hand. Each table stands between two comments, such as
`<!-- accuracy:begin -->` and `<!-- accuracy:end -->`.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.accuracy_table import accuracy
from benchmarks.calibration_table import calibration
from benchmarks.generation_table import generation, speedups
from benchmarks.headline_table import headline
from benchmarks.kernels_table import kernels
from benchmarks.results_file import RESULTS, ROOT, Results, load_results
from benchmarks.round_trips_table import round_trips
from pq_ao.plots import plot_speedups, plotted

PLOT = "generation.png"


@dataclass(frozen=True)
class _Section:
    """A section's name, what makes it, and the benchmarks whose results that takes."""

    name: str
    render: Callable[..., str]
    benchmarks: tuple[str, ...]


def _with_plot(results: Iterable[Results]) -> str:
    results = list(results)
    text = generation(results)
    if not any(speedups(results, phase) for phase in ("decode", "prefill")):
        return text
    return f"{text}\n\n![speed-up over compiled bf16 against batch size](benchmarks/results/{PLOT})"


SECTIONS = (
    _Section("accuracy", accuracy, ("accuracy",)),
    _Section("calibration", calibration, ("calibration",)),
    _Section("generation", _with_plot, ("generation",)),
    _Section("kernels", kernels, ("kernels",)),
    _Section("round_trips", round_trips, ("round_trips",)),
    _Section("headline", headline, ("generation", "accuracy")),
)


def updated(readme: str, folder: str | os.PathLike[str] = RESULTS) -> str:
    """The README's text with its sections made anew from the results in `folder`.

    Raises:
        ValueError: the markers of a section are not there exactly once.
    """
    for section in SECTIONS:
        begin, end = (f"<!-- {section.name}:{edge} -->" for edge in ("begin", "end"))
        pattern = re.compile(f"({re.escape(begin)}\n).*?({re.escape(end)})", re.DOTALL)
        if readme.count(begin) != 1 or readme.count(end) != 1 or not pattern.search(readme):
            raise ValueError(f"the README needs the lines {begin} and {end} once each, in this order")
        body = section.render(*(load_results(benchmark, folder) for benchmark in section.benchmarks))
        readme = pattern.sub(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", readme)
    return readme


def plot_panels(folder: str | os.PathLike[str] = RESULTS) -> dict[str, dict[str, dict[tuple[int, int], float]]]:
    """What the plot shows: speed-ups of prefill and decode; empty without results."""
    results = load_results("generation", folder)
    panels = {phase: speedups(results, phase) for phase in ("decode", "prefill")}
    return {phase: panel for phase, panel in panels.items() if panel}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if anything is out of date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results; the plot is written there")
    options = parser.parse_args(arguments)
    before = options.readme.read_text(encoding="utf-8")
    after = updated(before, options.results)
    panels, picture = plot_panels(options.results), options.results / PLOT
    title = "Llama-3-8B's shape, W4A4KV4"
    stale = [options.readme.name] if before != after else []
    if panels and not plotted(picture, panels, title):
        stale.append(picture.name)
    if options.check:
        for name in stale:
            print(f"{name} is out of date: run python -m benchmarks.tables", file=sys.stderr)
        return 1 if stale else 0
    if options.readme.name in stale:
        options.readme.write_text(after, encoding="utf-8")
    if picture.name in stale:
        plot_speedups(panels, picture, title)
    for name in stale:
        print(f"{name} rewritten")
    return 0


if __name__ == "__main__":
    sys.exit(main())
