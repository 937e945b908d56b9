"""One run at a time in a folder that an interrupted run goes on from."""

from pathlib import Path
from typing import BinaryIO

_LOCK = "run.lock"


def run_lock(folder: Path) -> BinaryIO:
    """Locks a folder, which is made if need be, until the file that is returned is closed or the process ends.

    Two runs would overwrite each other's results. Where the system has no such lock (Windows) there is none.

    Raises:
        ValueError: another run has the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / _LOCK).open("ab")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except BlockingIOError as error:
        file.close()
        raise ValueError(f"--resume {folder}: another run has this folder; wait until it ends.") from error
    return file
