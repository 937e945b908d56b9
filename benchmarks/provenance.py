"""What stands under a table and says where its numbers come from."""

from collections.abc import Iterable

from benchmarks.results_file import Results


def provenance(runs: Iterable[Results]) -> str:
    """Markdown: date, device, versions, commit and command; of several runs folded away, for each device a list.

    Args:
        runs: one of them may come several times.
    """
    machines: dict[str, dict[tuple[str, str, str], None]] = {}
    for run in sorted(runs, key=lambda run: run.date):
        versions = ", ".join(f"{name} {version}" for name, version in run.versions.items() if version)
        machine = f"on {run.device} ({versions})"
        machines.setdefault(machine, {})[run.date[:10], run.commit, run.command] = None
    return "\n\n".join(_part(machine, list(found)) for machine, found in machines.items())


def _part(machine: str, found: list[tuple[str, str, str]]) -> str:
    if len(found) == 1:
        [(date, commit, command)] = found
        return f"Measured {date} {machine}, commit {commit}: `{command}`"
    items = [f"- {date}, commit {commit}: `{command}`" for date, commit, command in found]
    summary = f"Measured {machine} by {len(found)} commands"
    return "\n".join([f"<details><summary>{summary}</summary>", "", *items, "", "</details>"])
