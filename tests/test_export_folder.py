"""Writing the folder of an exported decoder: whole or not at all, and nobody else's files."""

import errno
import os
import subprocess
import sys

import pytest

from pq_ao.export_folder import write_folder
from pq_ao.export_manifest import MANIFEST_NAME, checked_file, read_manifest
from tests.test_export_manifest import MANIFEST

PROGRAMS = ("prefill", "decode")

# writes version b over version a and is killed at the given os.replace: 0 and 1 move programs, 2 is the manifest
KILLED = """
import os, sys
from pathlib import Path
from pq_ao.export_folder import write_folder
from tests.test_export_folder import MANIFEST, writer
count, replace = 0, os.replace
def killing(*args):
    global count
    if count == int(sys.argv[2]):
        os._exit(9)
    count += 1
    replace(*args)
os.replace = killing
write_folder(Path(sys.argv[1]), MANIFEST, writer("b"))
os._exit(0 if sys.argv[2] == "3" else 1)
"""


def writer(letter: str):
    """Writes files that are told apart by a letter."""

    def write(folder):
        for program in PROGRAMS:
            (folder / f"{program}.pt2").write_text(f"{program} {letter}")

    return write


def _held(folder) -> list[str]:
    manifest = read_manifest(folder)
    return [checked_file(folder, manifest, program).read_text() for program in PROGRAMS]


def test_a_new_export_replaces_the_old_one_and_leaves_other_files(tmp_path):
    folder = tmp_path / "deep" / "folder"
    first = write_folder(folder, MANIFEST, writer("a"))
    assert first == read_manifest(folder) and _held(folder) == ["prefill a", "decode a"]
    (folder / "tokenizer.json").write_text("{}")
    second = write_folder(folder, MANIFEST, writer("b"))
    assert _held(folder) == ["prefill b", "decode b"]
    names = {entry.file for entry in second.files.values()} | {MANIFEST_NAME, "tokenizer.json"}
    assert set(os.listdir(folder)) == names
    assert write_folder(folder, MANIFEST, writer("b")) == second  # the same again
    assert set(os.listdir(folder)) == names


@pytest.mark.parametrize("moment", range(4))
def test_a_writer_killed_at_any_moment_leaves_the_old_export_or_the_new(tmp_path, moment):
    write_folder(tmp_path, MANIFEST, writer("a"))
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(moment)], capture_output=True, text=True)
    assert run.returncode == (9 if moment < 3 else 0), run.stderr
    letter = "a" if moment < 3 else "b"
    assert _held(tmp_path) == [f"prefill {letter}", f"decode {letter}"]
    write_folder(tmp_path, MANIFEST, writer("c"))
    assert _held(tmp_path) == ["prefill c", "decode c"]
    assert len(os.listdir(tmp_path)) == 3  # what the killed one left is gone


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file")]
)
def test_a_full_disk_says_so_and_keeps_the_old_export(tmp_path, error):
    write_folder(tmp_path, MANIFEST, writer("a"))

    def fail(folder):
        (folder / "prefill.pt2").write_text("half")
        raise error

    with pytest.raises(OSError, match="an export that the folder held is still there. Make room") as caught:
        write_folder(tmp_path, MANIFEST, fail)
    assert caught.value.errno == (errno.ENOSPC if isinstance(error, OSError) else errno.EIO)
    assert _held(tmp_path) == ["prefill a", "decode a"] and len(os.listdir(tmp_path)) == 3


def test_the_manifest_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / MANIFEST_NAME).write_text('{"name": "a browser extension"}')
    with pytest.raises(ValueError, match="has a manifest.json that is not of this pq_ao.*give another folder"):
        write_folder(tmp_path, MANIFEST, writer("a"))
    assert os.listdir(tmp_path) == [MANIFEST_NAME]


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        write_folder(tmp_path / "file", MANIFEST, writer("a"))
