"""The journal of a calibration: each finished block on disk, so that a run of hours goes on where it was stopped.

A folder holds `manifest.json` (what run this is, and size and sha256 of each finished block), one safetensors file a
block, and a lock. Every file is written beside its place, flushed to the disk and then moved there, the manifest after
the block: whenever the process or the machine stops, the folder holds the blocks that `keep` returned for.
"""

import errno
import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pq_ao.files import TEMPORARY, replace_file
from pq_ao.fingerprint import plain_cpu

FORMAT = "pq_ao calibration journal"
VERSION = 1
MANIFEST = "manifest.json"
LOCK = "journal.lock"

_HASH_BYTES = 1 << 20
_SHOWN_CHARACTERS = 60

Facts = dict[str, Any]


class CalibrationJournal:
    """The finished blocks of one calibration, in a folder.

    One journal at a time has the folder: a lock (`flock`) refuses a second one of any process, and falls with the
    process that holds it, killed or not. A process forked from that one holds it too, until it ends. Where the system
    (Windows) or the folder's file system has no such lock, a warning says so: then see to it yourself that one process
    uses the folder.

    Args:
        folder: made if need be; else an empty one, or one that holds a journal with the same facts.
        facts: what run this is, as a dictionary that JSON holds: whatever a block's result depends on.

    Attributes:
        folder: its path.

    Raises:
        ValueError: the folder holds something else, a journal with other facts, of a newer version or damaged; nothing
            in it is changed then. Or `facts` hold NaN or infinity.
        TypeError: `facts` are nothing that JSON holds.
        RuntimeError: another journal has the folder.
        OSError: the folder cannot be read or written.

    Example::

        with CalibrationJournal(folder, facts) as journal:
            for index, layer in enumerate(layers):
                if index < journal.finished:
                    restore(layer, *journal.read(index))
                else:
                    journal.keep(index, *calibrated(layer))
    """

    def __init__(self, folder: str | os.PathLike[str], facts: Facts):
        self.folder = Path(folder)
        self._facts: Facts = json.loads(_to_json("facts", facts))
        self._blocks: list[dict] = []
        self._lock: BinaryIO | None = None
        self._check_folder()  # before the lock, which would be a new file in a folder that is not ours
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.folder / LOCK)
        try:
            if (self.folder / MANIFEST).exists():
                self._resume()
            else:
                replace_file(self.folder / MANIFEST, self._manifest([]))
        except BaseException:
            self.close()
            raise

    @property
    def finished(self) -> int:
        """Blocks that are kept: 0 .. finished - 1."""
        return len(self._blocks)

    def keep(self, index: int, tensors: dict[str, Tensor], facts: Facts) -> None:
        """Writes block `index`; once this returns, the block outlives a kill and a power cut.

        Host memory: up to two copies of the tensors, for a moment.

        Args:
            index: of the block; equals `finished`.
            tensors: by name; plain dense tensors of any device, strides and dtype that safetensors holds.
            facts: what else belongs to the block, as a dictionary that JSON holds.

        Raises:
            ValueError: another index, a name that safetensors reserves, NaN or infinity in `facts`, a closed journal.
            TypeError: tensors or facts that cannot be held. Nothing is written then.
            OSError: the block could not be written, such as on a full disk (errno ENOSPC). The blocks before it
                stay, and `keep` can be called again.
        """
        self._check_open()
        if index != self.finished:
            raise ValueError(f"index={index!r}: blocks are kept in order; the next one is {self.finished}.")
        content = _block(tensors, facts)
        entry = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        path = self._block_path(index)
        try:
            replace_file(path, content)
            replace_file(self.folder / MANIFEST, self._manifest([*self._blocks, entry]))
        except OSError as error:
            advice = (
                f"block {index} could not be kept safely ({len(content)} bytes); the blocks before it stand. "
                "Make room or mend the folder, then run again with the same arguments: it goes on from there"
            )
            raise OSError(error.errno, f"{error.strerror or error}: {advice}", str(path)) from error
        finally:
            self._blocks = self._load()["blocks"]  # an error or Ctrl-C may come after the manifest has moved

    def read(self, index: int) -> tuple[dict[str, Tensor], Facts]:
        """Block `index` as it was kept: tensors on the CPU that own their memory, and its facts.

        Raises:
            ValueError: no such block, its file is missing or damaged, a closed journal.
        """
        self._check_open()
        if not 0 <= index < self.finished:
            raise ValueError(f"index={index!r}: {self.finished} blocks are kept, counted from 0.")
        path = self._block_path(index)
        self._check_size(index)
        if _sha256(path) != self._blocks[index]["sha256"]:
            raise ValueError(self._damaged(index, "its sha256 is not the one in the manifest"))
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                # a copy: the tensors of safetensors are views of the file, and a fault where that shrinks
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
                facts = json.loads(file.metadata()["facts"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(self._damaged(index, f"it holds no block ({error})")) from error
        return tensors, facts

    def close(self) -> None:
        """Gives the folder free; the files stay. Closing twice is no error."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> "CalibrationJournal":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _block_path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def _manifest(self, blocks: list[dict]) -> bytes:
        manifest = {"format": FORMAT, "version": VERSION, "facts": self._facts, "blocks": blocks}
        return (json.dumps(manifest, indent=1) + "\n").encode()

    def _check_open(self) -> None:
        if self._lock is None:
            raise ValueError(f"{self.folder}: the journal is closed; open it again.")

    def _check_folder(self) -> None:
        if not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise ValueError(f"folder={str(self.folder)!r} is a file; give a folder, a new one or that of a journal.")
        names = set(os.listdir(self.folder))
        if MANIFEST in names:
            self._load()
        # the two that a process killed before its first manifest leaves
        elif names - {LOCK, MANIFEST + TEMPORARY}:
            raise ValueError(
                f"folder={str(self.folder)!r} is not empty and holds no journal ({MANIFEST} is missing); "
                "give a new or an empty folder."
            )

    def _load(self) -> dict:
        path = self.folder / MANIFEST
        try:
            manifest = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: is not JSON ({error}); give another folder or delete this one.") from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise ValueError(f"{path}: is not the manifest of a calibration journal; give another folder.")
        version = manifest.get("version")
        if type(version) is int and version > VERSION:
            raise ValueError(
                f"{path}: version {version} is newer than this pq_ao, which reads {VERSION}; "
                "go on with the pq_ao that wrote it, or give another folder."
            )
        if type(version) is not int or version != VERSION:
            raise ValueError(f"{path}: version={version!r} is unknown; give another folder or delete this one.")
        well_formed = isinstance(manifest.get("facts"), dict) and isinstance(manifest.get("blocks"), list)
        if not well_formed or not all(_is_entry(entry) for entry in manifest["blocks"]):
            raise ValueError(
                f'{path}: lacks "facts" (an object) or "blocks" (a list of "sha256" and "size"), or they are '
                "damaged; restore it, give another folder, or delete this one."
            )
        return manifest

    def _resume(self) -> None:
        manifest = self._load()
        differing = _differences(manifest["facts"], self._facts)
        if differing:
            raise ValueError(
                f"folder={str(self.folder)!r} holds the journal of another run, which differs in:\n  "
                + "\n  ".join(differing)
                + "\nGive another folder, or the arguments and versions of that run, or delete the folder."
            )
        self._blocks = manifest["blocks"]
        for index in range(self.finished):
            self._check_size(index)

    def _check_size(self, index: int) -> None:
        path, expected = self._block_path(index), self._blocks[index]["size"]
        if not path.is_file():
            raise ValueError(self._damaged(index, "it is missing"))
        if path.stat().st_size != expected:
            raise ValueError(self._damaged(index, f"it has {path.stat().st_size} bytes instead of {expected}"))

    def _damaged(self, index: int, what: str) -> str:
        return (
            f"{self._block_path(index)}: {what}. Restore the file; or, to calibrate from block {index} on again, cut "
            f'"blocks" in {MANIFEST} down to its first {index} entries; or delete the folder and begin anew.'
        )


def _block(tensors: dict[str, Tensor], facts: Facts) -> bytes:
    metadata = {"facts": _to_json("facts", facts)}
    plain: dict[str, Tensor] = {}
    storages = set()
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise ValueError(f'tensors: {name!r} cannot be a name; give strings other than "__metadata__".')
        plain[name] = plain_cpu(f"tensors[{name!r}]", tensor)
        storage = plain[name].untyped_storage().data_ptr()
        if storage in storages:
            plain[name] = plain[name].clone()  # safetensors refuses tensors that share memory
        storages.add(storage)
    try:
        return save(plain, metadata)
    except KeyError as error:  # that is how it refuses a dtype
        raise TypeError(f"tensors: safetensors does not hold {error.args[0]}; convert it.") from error


def _to_json(name: str, facts: Facts) -> str:
    if not isinstance(facts, dict):
        raise TypeError(f"{name}: got {type(facts).__name__}; give a dictionary that JSON holds.")
    try:
        return json.dumps(facts, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: JSON cannot hold them ({error}); give strings, finite numbers, lists.") from error


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and type(entry.get("size")) is int


def _differences(kept: Facts, given: Facts, inside: str = "") -> list[str]:
    """A line for each fact that differs; facts inside a fact are named with a dot."""
    lines = []
    for name in [*kept, *(name for name in given if name not in kept)]:
        values = [facts.get(name) for facts in (kept, given)]
        if all(isinstance(value, dict) for value in values):
            lines += _differences(*values, f"{inside}{name}.")
            continue
        # as JSON, for there 1, 1.0 and true are three things
        kept_text, given_text = (
            json.dumps(facts[name], sort_keys=True) if name in facts else "absent" for facts in (kept, given)
        )
        if kept_text != given_text:
            lines.append(f"{inside}{name}: {_shortened(kept_text)} in the journal, {_shortened(given_text)} now")
    return lines


def _shortened(text: str) -> str:
    half = _SHOWN_CHARACTERS // 2
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:half]}...{text[-half:]}"


def _locked(path: Path) -> BinaryIO:
    """The lock file, locked until it is closed; or, with a warning, where there are no locks, only open."""
    file = path.open("ab")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        _warn_unlocked(path.parent, "this system has no flock")
    except BlockingIOError as error:
        file.close()
        raise RuntimeError(
            f"folder={str(path.parent)!r}: another process, or another journal of this one, has it open; wait until it "
            "ends, close it, or give another folder."
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            file.close()
            raise
        _warn_unlocked(path.parent, f"its file system has no locks ({error.strerror})")
    return file


def _warn_unlocked(folder: Path, why: str) -> None:
    warnings.warn(
        f"{folder}: {why}, so nothing keeps a second process from this journal; use it from one process only.",
        RuntimeWarning,
        stacklevel=4,
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
