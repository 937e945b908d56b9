"""Files that are whole or not there, and stay after a power cut."""

import errno
import os
from pathlib import Path

TEMPORARY = ".tmp"


def replace_file(path: Path, content: bytes) -> None:
    """Puts `content` in the place of `path`: the old file or the new one stands there, even after a power cut.

    Raises:
        OSError: it could not be written, such as on a full disk; the old file stands then.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    temporary.unlink(missing_ok=True)  # of a process that was killed
    try:
        with temporary.open("xb") as file:  # "x" follows no link out of the folder
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Brings the names in `folder` to the disk."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot sync folders (some FUSE and network ones)
            raise
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Brings what was written to `path`, by whomever, to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
