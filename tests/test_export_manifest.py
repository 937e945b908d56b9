"""manifest.json of an exported decoder: a round trip, and everything that can be wrong with it."""

import json
from dataclasses import replace

import pytest

from pq_ao.export_manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, ProgramFile, checked_file, read_manifest

MANIFEST = Manifest(
    backend="export",
    batch_size=1,
    max_cache_len=64,
    max_prefill_len=32,
    padded=True,
    vocab_size=300,
    logits=[1, 300],
    dtype="bfloat16",
    device="cpu",
    cache_bytes=4096,
    eos_token_ids=[2, 7],
    pad_token_id=2,
    torch="2.13.0",
    files={name: ProgramFile(f"{name}-1.pt2", "0" * 64, 5) for name in ("prefill", "decode")},
)


def _write(folder, **changes):
    facts = json.loads(MANIFEST.to_json()) | changes
    (folder / MANIFEST_NAME).write_text(json.dumps({k: v for k, v in facts.items() if v is not ...}))
    return folder


def test_round_trip(tmp_path):
    (tmp_path / MANIFEST_NAME).write_bytes(MANIFEST.to_json())
    assert read_manifest(tmp_path) == MANIFEST
    assert read_manifest(tmp_path) != replace(MANIFEST, pad_token_id=3)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"format": "pq_ao exported decoder"'], ids=range(5)
)
def test_what_is_not_json_is_refused(tmp_path, content):
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest.json: cannot be read as JSON.*export the model again"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", ["[]", "null", "3", '{"format": "other"}', "{}"])
def test_the_manifest_of_something_else_is_refused(tmp_path, content):
    (tmp_path / MANIFEST_NAME).write_text(content)
    with pytest.raises(ValueError, match="is not of the format 'pq_ao exported decoder'"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("version", "message"),
    [(FORMAT_VERSION + 1, "newer than this pq_ao.*update"), (0, "unknown"), ("1", "unknown"), (True, "unknown"),
     (..., "unknown")],
)  # fmt: skip
def test_other_versions_are_refused(tmp_path, version, message):
    with pytest.raises(ValueError, match=f"format_version=.*{message}"):
        read_manifest(_write(tmp_path, format_version=version))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("backend", "onnx"), ("backend", ["export"]), ("batch_size", 0), ("batch_size", True), ("max_cache_len", "64"),
        ("max_prefill_len", -1), ("vocab_size", 2.5), ("logits", [1]), ("logits", [1, 0]), ("dtype", "int4"),
        ("dtype", {}), ("device", "cuda:0"), ("cache_bytes", None), ("eos_token_ids", 2), ("eos_token_ids", [-1]),
        ("pad_token_id", None), ("torch", 2), ("files", []),
        ("padded", None), ("padded", 1),
    ],
)  # fmt: skip
def test_a_field_with_a_value_that_is_not_allowed_is_named(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"manifest.json: {name}=.*must be .*export the model again"):
        read_manifest(_write(tmp_path, **{name: value}))


def test_version_1_knew_no_padding(tmp_path):
    assert read_manifest(_write(tmp_path, format_version=1, padded=...)) == replace(MANIFEST, padded=False)
    with pytest.raises(ValueError, match="lacks padded"):
        read_manifest(_write(tmp_path, padded=...))


def test_missing_and_unknown_fields_are_named(tmp_path):
    with pytest.raises(ValueError, match="lacks logits, torch"):
        read_manifest(_write(tmp_path, logits=..., torch=...))
    with pytest.raises(ValueError, match="has unknown fields later"):
        read_manifest(_write(tmp_path, later=1))


@pytest.mark.parametrize(
    "file", ["../prefill.pt2", "/a/prefill.pt2", "a/b.pt2", "..\\b.pt2", "prefill.pt", "", "..", 3, None]
)
def test_files_elsewhere_are_refused(tmp_path, file):
    files = json.loads(MANIFEST.to_json())["files"]
    files["prefill"]["file"] = file
    with pytest.raises(ValueError, match="nothing outside of it is loaded"):
        read_manifest(_write(tmp_path, files=files))


@pytest.mark.parametrize("entry", [{"sha256": "0" * 63}, {"sha256": "G" * 64}, {"bytes": 0}, {"bytes": "5"}])
def test_files_without_a_proper_fingerprint_are_refused(tmp_path, entry):
    files = json.loads(MANIFEST.to_json())["files"]
    files["decode"] |= entry
    with pytest.raises(ValueError, match="files: 'decode' lacks a proper sha256 or size"):
        read_manifest(_write(tmp_path, files=files))


@pytest.mark.parametrize(("backend", "names"), [("export", {"prefill"}), ("aoti", {"prefill", "decode"})])
def test_each_backend_has_its_files(tmp_path, backend, names):
    files = {name: entry for name, entry in json.loads(MANIFEST.to_json())["files"].items() if name in names}
    with pytest.raises(ValueError, match="files=.*: must be"):
        read_manifest(_write(tmp_path, backend=backend, files=files))


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "other.pt2").write_bytes(b"hello")
    (folder / "prefill-1.pt2").symlink_to(tmp_path / "other.pt2")
    with pytest.raises(ValueError, match="the file of prefill is missing"):
        checked_file(folder, MANIFEST, "prefill")
