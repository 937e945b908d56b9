"""The folder of an exported decoder: written as a whole, or not at all."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pq_ao.export_manifest import FILES, MANIFEST_NAME, Manifest, ProgramFile, read_manifest, sha256_of
from pq_ao.files import replace_file, sync_file, sync_folder

_STAGING = ".pq_ao-exporting-"
_PROGRAM_FILES = re.compile(r"(prefill|decode|state)-[0-9a-f]{16}(\.aoti)?\.pt2?")


def write_folder(folder: Path, manifest: Manifest, write: Callable[[Path], None]) -> Manifest:
    """Puts programs and their manifest in place of what the folder holds.

    The files get names of their own, so that they stand beside older ones; the manifest, replaced by one rename, says
    which are meant. Older ones are deleted then.

    Args:
        folder: made if need be.
        manifest: without files.
        write: writes the files of `FILES[manifest.backend]`, "<name><ending>", into a given folder.

    Returns:
        the manifest with its files.

    Raises:
        ValueError: the folder is a file, or has a manifest.json that is not ours.
        OSError: it could not be written; what was there stands then.
    """
    _check_owner(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_STAGING}*"):  # by a process that was killed
        shutil.rmtree(left)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))  # inside, so that moving out of it is a rename
    try:
        write(staging)
        files = {name: _moved(staging, folder, name, ending) for name, ending in FILES[manifest.backend].items()}
        sync_folder(folder)
        manifest = replace(manifest, files=files)
        replace_file(folder / MANIFEST_NAME, manifest.to_json())
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
        raise OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"{error}: the programs could not be saved; an export that the folder held is still there. Make room or "
            "mend the folder, and save again",
            str(folder),
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    current = {entry.file for entry in files.values()}
    for path in folder.iterdir():
        if _PROGRAM_FILES.fullmatch(path.name) and path.name not in current:
            path.unlink()
    return manifest


def _moved(staging: Path, folder: Path, name: str, ending: str) -> ProgramFile:
    path = staging / f"{name}{ending}"
    sync_file(path)
    digest = sha256_of(path)
    entry = ProgramFile(f"{name}-{digest[:16]}{ending}", digest, path.stat().st_size)
    os.replace(path, folder / entry.file)
    return entry


def _check_owner(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r} is a file; give a folder.")
    if (folder / MANIFEST_NAME).exists():
        try:
            read_manifest(folder)
        except ValueError as error:
            raise ValueError(
                f"folder={str(folder)!r} has a {MANIFEST_NAME} that is not of this pq_ao ({error}); give another "
                "folder, or empty this one."
            ) from error
