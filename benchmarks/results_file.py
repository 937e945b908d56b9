"""Results files: one JSON object a run, `results/<benchmark>-<date>-<time>-<gpu or cpu>.json`, its rows a flat list.

A writer rewrites its file after every row, so that an interrupted run keeps what it has, and the same command can go on
with it. A reader takes the newest row of each key.
"""

import importlib.metadata
import json
import logging
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# names the commit where a copy of the tree, without git, is measured
COMMIT_VARIABLE = "PQ_AO_COMMIT"

Row = dict[str, Any]


@dataclass
class Results:
    """One run of a benchmark.

    Attributes:
        benchmark: its name, such as "accuracy".
        date: UTC, ISO 8601, when the run began.
        commit: short hash, or "unknown".
        device: name of the GPU, or the kind of CPU.
        versions: of torch, torchao, transformers, triton, cuda (None where absent) and python.
        command: what was run; paths are shortened to their last part.
        rows: the measurements, in order.
    """

    benchmark: str
    date: str
    commit: str
    device: str
    versions: dict[str, str | None]
    command: str
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def begin(cls, benchmark: str, command: str, device: str = "cpu") -> "Results":
        """Empty results of a run that begins now on `device`, a torch device such as "cuda"."""
        date = datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")
        return cls(benchmark, date, commit(), device_name(device), versions(), command)


class SentResults:
    """Results like those of a file, for a process whose rows another one writes.

    Args:
        results: what is held already.
        rows: a queue between the processes, receives the rows.
    """

    def __init__(self, results: Results, rows: Queue):
        self.results, self.rows = results, rows

    def append(self, row: Row) -> None:
        """Adds a row and sends it; errors as `ResultsFile.append`'s."""
        json.dumps(row, allow_nan=False)
        self.results.rows.append(row)
        self.rows.put(row)


class ResultsFile:
    """Writes the results of one run, row by row.

    Args:
        results: from `Results.begin`.
        folder: where to write; made if need be.

    Example::

        file = ResultsFile(Results.begin("accuracy", command, "cuda"))
        file.append({"model": "...", "ppl": 6.14})
    """

    def __init__(self, results: Results, folder: str | os.PathLike[str] = RESULTS):
        self.results = results
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        when = results.date.replace("T", "-").replace(":", "").removesuffix("Z")
        device = re.sub(r"[^a-z0-9]+", "-", results.device.lower()).strip("-")
        device = "cpu" if device.startswith("cpu") else device
        stem = f"{results.benchmark}-{when}-{device}"
        self._names = (folder / f"{stem}{suffix}.json" for suffix in ("", *(f"-{number}" for number in range(2, 1000))))
        self.path = next(path for path in self._names if not path.exists())
        self._is_ours = False

    @classmethod
    def go_on(cls, results: Results, folder: str | os.PathLike[str] = RESULTS) -> "ResultsFile":
        """The newest file of the same run in `folder`, without its failed rows; a new one where there is none.

        The same run: benchmark, command, commit, device and versions are those of `results`. A warning names a file
        that only the last three keep apart.

        Raises:
            ValueError: a file is not a results file; it is named.
        """
        file = cls(results, folder)
        for path, found in reversed(_loaded(results.benchmark, folder)):
            if found.command != results.command:
                continue
            names = ("commit", "device", "versions")
            differing = [name for name in names if getattr(found, name) != getattr(results, name)]
            if not differing:
                file.path, file._is_ours = path, True
                file.results = replace(found, rows=[row for row in found.rows if row.get("error") is None])
                break
            logger.warning("%s is of the same command, but of another %s: a new file", path.name, ", ".join(differing))
        return file

    def append(self, row: Row) -> None:
        """Adds a row and rewrites the file.

        Raises:
            TypeError, ValueError: the row holds something that JSON does not have (NaN and infinity included).
        """
        json.dumps(row, allow_nan=False)  # before it is kept: one bad row must not spoil the later ones
        self.results.rows.append(row)
        text = json.dumps(asdict(self.results), indent=1, ensure_ascii=False, allow_nan=False)
        # a reader sees the old file or the new one, never half of one
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(text + "\n", encoding="utf-8")
            # of two runs that began in one second, the one that writes first has the name and the other takes the next
            while not self._is_ours:
                try:
                    os.link(temporary, self.path)
                    self._is_ours = True
                except FileExistsError:
                    self.path = next(self._names)
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)


def load_results(benchmark: str, folder: str | os.PathLike[str] = RESULTS) -> list[Results]:
    """All results of a benchmark, oldest first; an empty list where there are none.

    Raises:
        ValueError: a file is not a results file; it is named.
    """
    return [results for _, results in _loaded(benchmark, folder)]


def _loaded(benchmark: str, folder: str | os.PathLike[str]) -> list[tuple[Path, Results]]:
    loaded = []
    for path in sorted(Path(folder).glob(f"{benchmark}-*.json"), key=lambda path: path.stem):
        try:
            results = Results(**json.loads(path.read_text(encoding="utf-8")))
            if not isinstance(results.rows, list) or not all(isinstance(row, dict) for row in results.rows):
                raise ValueError("rows are no list of objects")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path.name} is not a results file ({error}); mend it or take it away") from error
        if results.benchmark == benchmark:
            loaded.append((path, results))
    return sorted(loaded, key=lambda found: found[1].date)  # stable, so equal dates stay in order of name


def newest_rows(results: Iterable[Results], keys: Sequence[str]) -> list[tuple[Row, Results]]:
    """The newest row of each key, with the results that it stands in.

    Args:
        results: oldest first, as `load_results` gives them.
        keys: names of what tells rows apart; a row that lacks one counts as None there.
    """
    newest: dict[tuple, tuple[Row, Results]] = {}
    for run in results:
        for row in run.rows:
            newest[tuple(row.get(key) for key in keys)] = (row, run)
    return list(newest.values())


def commit() -> str:
    """Commit that is measured: `$PQ_AO_COMMIT`, else what git says, else "unknown"."""
    given = os.environ.get(COMMIT_VARIABLE)
    if given:
        return given
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_name(device: str) -> str:
    """Name of the GPU behind a torch device, or "cpu" with its architecture."""
    import torch

    if torch.device(device).type == "cpu":
        return f"cpu {platform.machine()}"
    return torch.cuda.get_device_name(device)


def versions() -> dict[str, str | None]:
    """Versions that results depend on; None for what is not installed."""
    import torch

    found: dict[str, str | None] = {"torch": str(torch.__version__)}
    for package in ("torchao", "transformers", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found | {"cuda": torch.version.cuda, "python": platform.python_version()}
