"""`manifest.json` of an exported decoder: what its programs take, and which files they are. Plain JSON, no torch."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

MANIFEST_NAME = "manifest.json"
FORMAT = "pq_ao exported decoder"
FORMAT_VERSION = 2
# the files of each backend, and how their names end
FILES = {
    "export": {"prefill": ".pt2", "decode": ".pt2"},
    "aoti": {"prefill": ".aoti.pt2", "decode": ".aoti.pt2", "state": ".pt"},
}

# fields that came with a later version -> what their absence means; programs of version 1 take no padding
_LATER = {1: {"padded": False}, 2: {}}

_CHUNK = 1 << 20
_RESTORE = "Restore the folder, or export the model again"


@dataclass(frozen=True)
class ProgramFile:
    """One file of the folder.

    Attributes:
        file: its name.
        sha256: of its content.
        bytes: its size.
    """

    file: str
    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is said of an exported decoder.

    Attributes:
        backend: "export" for programs of `torch.export`, "aoti" for packages of AOTInductor.
        batch_size: rows of every batch.
        max_cache_len: tokens of prompt and reply together.
        max_prefill_len: the most tokens of one call of prefill, which takes 2 or more.
        padded: whether prefill takes a mask of padding on the left.
        vocab_size: token ids are 0 .. vocab_size - 1.
        logits: shape of what both programs return.
        dtype: of the logits, such as "bfloat16".
        device: "cpu" or "cuda".
        cache_bytes: of the cache that both programs share.
        eos_token_ids: tokens that end a reply.
        pad_token_id: what stands behind the end of a row.
        torch: version that wrote the programs.
        files: of "prefill" and "decode", and of packages the tensors, "state"; empty for what was not saved.
    """

    backend: str
    batch_size: int
    max_cache_len: int
    max_prefill_len: int
    padded: bool
    vocab_size: int
    logits: list[int]
    dtype: str
    device: str
    cache_bytes: int
    eos_token_ids: list[int]
    pad_token_id: int
    torch: str
    files: dict[str, ProgramFile]

    def to_json(self) -> bytes:
        """What `read_manifest` reads."""
        facts = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        return (json.dumps(facts, indent=2) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks a manifest; of the programs it looks at nothing yet.

    Raises:
        ValueError: it is missing, not JSON, of another format or a later version, or a field is missing, unknown or
            not allowed.
    """
    path = folder / MANIFEST_NAME
    try:
        facts = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(
            f"folder={str(folder)!r}: has no {MANIFEST_NAME}, so it is not an exported decoder; give the folder that "
            "`export_decoder(...).save(folder)` wrote."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}). {_RESTORE}.") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise ValueError(f"{path}: is not of the format {FORMAT!r}; give the folder of an exported decoder.")
    version = facts.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version={version} is newer than this pq_ao, which reads up to {FORMAT_VERSION}; update "
            "pq_ao."
        )
    if type(version) is not int or version not in _LATER:
        raise ValueError(f"{path}: format_version={version!r} is unknown; it should be {FORMAT_VERSION}. {_RESTORE}.")
    facts = {name: value for name, value in facts.items() if name not in ("format", "format_version")}
    return _checked(_LATER[version] | facts, path)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


_ALLOWED = {
    "backend": (lambda value: value in tuple(FILES), f"one of {tuple(FILES)}"),
    "batch_size": (_is_count, "a whole number of at least 1"),
    "max_cache_len": (_is_count, "a whole number of at least 1"),
    "max_prefill_len": (_is_count, "a whole number of at least 1"),
    "padded": (lambda value: type(value) is bool, "true or false"),
    "vocab_size": (_is_count, "a whole number of at least 1"),
    "logits": (lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_count, value)), "[B, V]"),
    "dtype": (lambda value: value in ("bfloat16", "float16", "float32"), "bfloat16, float16 or float32"),
    "device": (lambda value: value in ("cpu", "cuda"), "'cpu' or 'cuda'"),
    "cache_bytes": (_is_count, "a whole number of at least 1"),
    "eos_token_ids": (lambda value: isinstance(value, list) and all(map(_is_id, value)), "a list of token ids"),
    "pad_token_id": (_is_id, "a token id"),
    "torch": (lambda value: isinstance(value, str), "a version"),
    "files": (lambda value: isinstance(value, dict), "an object"),
}


def _checked(facts: dict[str, Any], path: Path) -> Manifest:
    for problem, names in (("lacks", _ALLOWED.keys() - facts), ("has unknown fields", facts.keys() - _ALLOWED)):
        if names:
            raise ValueError(f"{path}: {problem} {', '.join(sorted(names))}. {_RESTORE}.")
    for name, (test, allowed) in _ALLOWED.items():
        if not test(facts[name]):
            raise ValueError(f"{path}: {name}={facts[name]!r:.80}: must be {allowed}. {_RESTORE}.")
    files, endings = {}, FILES[facts["backend"]]
    if facts["files"].keys() != endings.keys():
        raise ValueError(f"{path}: files={sorted(facts['files'])!r:.80}: must be {sorted(endings)}. {_RESTORE}.")
    for name, entry in facts["files"].items():
        wanted = {field.name for field in fields(ProgramFile)}
        if not isinstance(entry, dict) or entry.keys() != wanted:
            raise ValueError(f"{path}: files: {name!r} must have the fields {sorted(wanted)}. {_RESTORE}.")
        file = entry["file"]
        if not isinstance(file, str) or not file.endswith(endings[name]) or Path(file).name != file or "\\" in file:
            raise ValueError(
                f"{path}: files: {name!r} is {file!r:.80}; a {endings[name]} file of the same folder is required, and "
                "nothing outside of it is loaded."
            )
        if not _is_sha256(entry["sha256"]) or not _is_count(entry["bytes"]):
            raise ValueError(f"{path}: files: {name!r} lacks a proper sha256 or size. {_RESTORE}.")
        files[name] = ProgramFile(**entry)
    return Manifest(**(facts | {"files": files}))


def sha256_of(path: Path) -> str:
    """Hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def checked_file(folder: Path, manifest: Manifest, name: str) -> Path:
    """The path of "prefill", "decode" or "state", whose content is what the manifest says.

    Raises:
        ValueError: the file is missing, a link out of the folder, or another than was saved.
    """
    entry = manifest.files[name]
    path = folder / entry.file
    if not path.is_file() or path.resolve().parent != folder.resolve():
        raise ValueError(f"{path}: the file of {name} is missing. {_RESTORE}.")
    size = path.stat().st_size
    if size != entry.bytes:
        raise ValueError(f"{path}: has {size} bytes instead of {entry.bytes}: it was cut or replaced. {_RESTORE}.")
    if sha256_of(path) != entry.sha256:
        raise ValueError(f"{path}: its sha256 is not the one in {MANIFEST_NAME}: it is damaged. {_RESTORE}.")
    return path
