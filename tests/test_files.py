"""Files that are whole or not there. Kills and power cuts are tested where files are used: journal and checkpoint."""

import errno
import os

import pytest

from pq_ao.files import TEMPORARY, replace_file


def test_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "file"
    (tmp_path / f"file{TEMPORARY}").write_bytes(b"of a process that was killed")
    for content in (b"first", b"", b"second" * 1000):
        replace_file(path, content)
        assert path.read_bytes() == content and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_keeps_the_old_one(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    replace_file(path, b"old")

    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_follows_no_link(tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").symlink_to(outside)
    (folder / f"file{TEMPORARY}").symlink_to(outside)
    replace_file(folder / "file", b"new")
    assert outside.read_bytes() == b"mine" and not (folder / "file").is_symlink()
