"""The line under a table that says where its numbers come from."""

from benchmarks.results_file import Results


def provenance(run: Results) -> str:
    """Date, device, versions, commit and command of a run."""
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items() if version)
    return f"Measured {run.date[:10]} on {run.device} ({versions}), commit {run.commit}: `{run.command}`"
