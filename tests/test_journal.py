"""The journal: round trips, folders that it refuses, damage, full disks, locks."""

import builtins
import errno
import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from pq_ao.journal import LOCK, MANIFEST, VERSION, CalibrationJournal
from tests.journals import DISK_CALLS, FACTS, MANIFEST_MOVED, acting_at, assert_equal, block, check_all, three_blocks

DTYPES = [torch.uint8, torch.int8, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float32]
DTYPES += [torch.float64, torch.float8_e4m3fn]

processes = pytest.mark.skipif(os.name != "posix", reason="needs fork and signals")


class Wrapped(torch.Tensor):
    """A tensor subclass, whose bytes may be anything."""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A journal of three blocks, closed."""
    return three_blocks(tmp_path / "journal")


def edit_manifest(folder: Path, **changes) -> None:
    """Changes fields of the manifest; None takes one away."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in manifest.items() if value is not None}))


class TestRoundTrip:
    def test_blocks_and_facts_across_openings(self, tmp_path):
        folder = tmp_path / "new" / "journal"
        with CalibrationJournal(str(folder), FACTS) as journal:
            assert journal.finished == 0
            journal.keep(0, block(0), {"index": 0})
            assert journal.finished == 1
            check_all(journal)
        with CalibrationJournal(folder, FACTS) as journal:
            assert journal.finished == 1
            journal.keep(1, block(1), {"index": 1})
        with CalibrationJournal(folder, FACTS) as journal:
            assert journal.finished == 2
            check_all(journal)
        assert set(contents(folder)) == {MANIFEST, LOCK, "block-00000.safetensors", "block-00001.safetensors"}

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtypes_shapes_and_strides(self, tmp_path, dtype):
        x = (torch.arange(24).view(2, 3, 4) % 5).to(dtype)
        tensors = {
            "": x,
            "transposed": x.transpose(0, 2),
            "rows": x[1:],
            "same": x,
            "scalar": x[0, 0, 1],
            "empty": x[:0],
            "empty too": x[:, :, 2:2],
            "parameter": torch.nn.Parameter(x, requires_grad=dtype.is_floating_point),
        }
        expected = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        with CalibrationJournal(tmp_path, FACTS) as journal:
            journal.keep(0, tensors, {})
            found, _ = journal.read(0)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == dtype and found[name].shape == tensor.shape
            assert torch.equal(found[name].float(), tensor.float()), name

    def test_every_bit_pattern_and_lazy_sign(self, tmp_path):
        patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)  # NaNs and -0.0 too
        with CalibrationJournal(tmp_path, FACTS) as journal:
            journal.keep(0, {"x": patterns, "lazy": torch.tensor([1 + 2j]).conj().imag}, {})
            found, _ = journal.read(0)
        assert torch.equal(found["x"].view(torch.int16), patterns.view(torch.int16))
        assert torch.equal(found["lazy"], torch.tensor([-2.0]))

    def test_no_tensors_and_odd_facts(self, tmp_path):
        facts = {"loss": [0.1, 1e-300], "none": None, "text": 'quotes " \n \u00e9 \ud800', "nested": {"": []}}
        with CalibrationJournal(tmp_path, FACTS) as journal:
            journal.keep(0, {}, facts)
            assert journal.read(0) == ({}, facts)

    def test_read_tensors_outlive_the_file(self, folder):
        with CalibrationJournal(folder, FACTS) as journal:
            tensors, _ = journal.read(1)
            path = folder / "block-00001.safetensors"
            with path.open("r+b") as file:  # in place, so that a view of the file would see it
                file.write(bytes(path.stat().st_size))
            assert_equal(tensors, block(1))
            with pytest.raises(ValueError, match="block-00001.*sha256"):
                journal.read(1)

    def test_equal_facts_in_another_order_or_form(self, folder):
        facts = dict(reversed(FACTS.items())) | {"windows": (1, 2)}
        with CalibrationJournal(folder, facts) as journal:
            assert journal.finished == 3

    def test_given_facts_are_a_copy(self, tmp_path):
        facts = {"seed": [0]}
        with CalibrationJournal(tmp_path, facts) as journal:
            facts["seed"].append(1)
            journal.keep(0, {}, {})
        CalibrationJournal(tmp_path, {"seed": [0]}).close()


class TestArguments:
    @pytest.mark.parametrize("index", [-1, 0, 2, 4])
    def test_keep_goes_in_order(self, folder, index):
        before = contents(folder)
        with CalibrationJournal(folder, FACTS) as journal:
            with pytest.raises(ValueError, match=f"index={index}.*the next one is 3"):
                journal.keep(index, block(index), {})
        assert contents(folder) == before

    @pytest.mark.parametrize("index", [-1, 3])
    def test_read_knows_its_blocks(self, folder, index):
        with CalibrationJournal(folder, FACTS) as journal:
            with pytest.raises(ValueError, match=f"index={index}: 3 blocks are kept"):
                journal.read(index)

    @pytest.mark.parametrize(
        ("tensors", "facts", "error", "match"),
        [
            ({"x": torch.zeros(1, dtype=torch.complex128)}, {}, TypeError, "complex128"),
            ({"x": torch.zeros(1).to_sparse()}, {}, TypeError, r"tensors\['x'\].*sparse"),
            ({"x": torch.zeros(1, device="meta")}, {}, ValueError, "no data"),
            ({"x": 1.0}, {}, TypeError, "float"),
            ({"__metadata__": torch.zeros(1)}, {}, ValueError, "__metadata__"),
            ({1: torch.zeros(1)}, {}, ValueError, "1 cannot be a name"),
            ({"w": torch.zeros(2).as_subclass(Wrapped)}, {}, TypeError, "Wrapped"),
            ({}, {"loss": float("nan")}, ValueError, "facts: JSON cannot hold them"),
            ({}, {"x": torch.zeros(1)}, TypeError, "facts: JSON cannot hold them"),
            ({}, [], TypeError, "facts: got list"),
        ],
    )
    def test_keep_refuses_what_cannot_be_read_back(self, folder, tensors, facts, error, match):
        before = contents(folder)
        with CalibrationJournal(folder, FACTS) as journal:
            with pytest.raises(error, match=match):
                journal.keep(3, tensors, facts)
            assert contents(folder) == before
            journal.keep(3, block(3), {"index": 3})
            check_all(journal)

    @pytest.mark.parametrize(
        ("facts", "error"), [({"clip": float("inf")}, ValueError), ({"x": object()}, TypeError), (None, TypeError)]
    )
    def test_facts_of_the_run(self, tmp_path, facts, error):
        with pytest.raises(error, match="^facts: "):
            CalibrationJournal(tmp_path / "new", facts)
        assert not (tmp_path / "new").exists()

    def test_closed(self, folder):
        with CalibrationJournal(folder, FACTS) as journal:
            pass
        journal.close()
        with pytest.raises(ValueError, match="closed"):
            journal.read(0)
        with pytest.raises(ValueError, match="closed"):
            journal.keep(3, {}, {})


class TestFolder:
    def test_other_facts(self, folder):
        before = contents(folder)
        other = {"config": {"weight_bits": 8, "mode": "static"}, "seed": False, "new": "x" * 999}
        other["weights"] = "ab" * 31 + "ac"
        with pytest.raises(ValueError) as raised:
            CalibrationJournal(folder, other)
        start, *lines, remedy = str(raised.value).splitlines()
        assert str(folder) in start and "another run" in start
        half = "ab" * 14
        assert [line.strip() for line in lines] == [
            "config.weight_bits: 4 in the journal, 8 now",
            "seed: 0 in the journal, false now",
            f'weights: "{half}a...b{half}" in the journal, "{half}a...b{half[:-2]}ac" now',
            "windows: [1, 2] in the journal, absent now",
            f'new: absent in the journal, "{"x" * 29}...{"x" * 29}" now',
        ]
        assert "another folder" in remedy and "delete" in remedy
        assert contents(folder) == before
        with CalibrationJournal(folder, FACTS) as journal:  # the refused one has let the folder go
            check_all(journal)

    def test_something_else(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("years of work")
        (tmp_path / "block-00000.safetensors").write_bytes(b"")
        with pytest.raises(ValueError, match="is not empty and holds no journal"):
            CalibrationJournal(tmp_path, FACTS)
        assert contents(tmp_path) == {"thesis.txt": b"years of work", "block-00000.safetensors": b""}

    def test_a_file(self, tmp_path):
        path = tmp_path / "file"
        path.write_text("text")
        with pytest.raises(ValueError, match="is a file"):
            CalibrationJournal(path, FACTS)
        assert path.read_text() == "text"

    def test_blocks_without_their_manifest(self, folder):
        (folder / MANIFEST).unlink()
        before = contents(folder)
        with pytest.raises(ValueError, match="manifest.json is missing"):
            CalibrationJournal(folder, FACTS)
        assert contents(folder) == before

    def test_what_a_kill_before_the_first_manifest_leaves(self, tmp_path):
        (tmp_path / LOCK).touch()
        (tmp_path / f"{MANIFEST}.tmp").write_text('{"form')
        with CalibrationJournal(tmp_path, FACTS) as journal:
            journal.keep(0, block(0), {"index": 0})
            check_all(journal)
        assert f"{MANIFEST}.tmp" not in contents(tmp_path)


class TestDamage:
    @pytest.mark.parametrize(
        ("manifest", "match"),
        [
            ("", "is not JSON"),
            ('{"format": "pq', "is not JSON"),
            ("\xff", "is not JSON"),
            ("[" * 100_000, "is not JSON"),
            ("[]", "is not the manifest"),
            ('{"name": "a web page"}', "is not the manifest"),
        ],
        ids=["empty", "cut", "bytes", "deep", "list", "other"],
    )
    def test_manifest_of_something_else(self, folder, manifest, match):
        (folder / MANIFEST).write_text(manifest, encoding="latin-1")
        (folder / LOCK).unlink()
        before = contents(folder)
        with pytest.raises(ValueError, match=rf"manifest\.json: {match}.*another folder"):
            CalibrationJournal(folder, FACTS)
        assert contents(folder) == before

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"format": "another"}, "is not the manifest"),
            ({"version": VERSION + 1}, f"version {VERSION + 1} is newer"),
            ({"version": None}, "version=None is unknown"),
            ({"version": True}, "version=True is unknown"),
            ({"facts": None}, "lacks"),
            ({"blocks": None}, "lacks"),
            ({"blocks": [7]}, "lacks"),
            ({"blocks": [{"size": 3}]}, "lacks"),
            ({"blocks": [{"size": "3", "sha256": "ab"}]}, "lacks"),
        ],
    )
    def test_manifest_fields(self, folder, changes, match):
        edit_manifest(folder, **changes)
        before = contents(folder)
        with pytest.raises(ValueError, match=match):
            CalibrationJournal(folder, FACTS)
        assert contents(folder) == before

    @pytest.mark.parametrize("damage", ["missing", "truncated", "longer", "a folder"])
    def test_block_files_are_looked_at_on_opening(self, folder, damage):
        path = folder / "block-00001.safetensors"
        content = path.read_bytes()
        path.unlink()
        if damage == "a folder":
            path.mkdir()
        elif damage != "missing":
            path.write_bytes(content[:-1] if damage == "truncated" else content + b"\0")
        with pytest.raises(ValueError, match=r"block-00001.*first 1 entries; or delete the folder"):
            CalibrationJournal(folder, FACTS)

    @pytest.mark.parametrize("position", [0, 20, -1], ids=["length", "header", "data"])
    def test_one_bit(self, folder, position):
        path = folder / "block-00001.safetensors"
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(content)
        with CalibrationJournal(folder, FACTS) as journal:
            assert_equal(journal.read(0)[0], block(0))
            with pytest.raises(ValueError, match=r"block-00001.*sha256.*first 1 entries"):
                journal.read(1)
            assert_equal(journal.read(2)[0], block(2))

    def test_the_named_remedy(self, folder):
        (folder / "block-00001.safetensors").unlink()
        edit_manifest(folder, blocks=json.loads((folder / MANIFEST).read_text())["blocks"][:1])
        with CalibrationJournal(folder, FACTS) as journal:
            assert journal.finished == 1
            for index in (1, 2):
                journal.keep(index, block(index), {"index": index})
            check_all(journal)

    @pytest.mark.parametrize("content", [b"no safetensors", b"\x02" + bytes(7) + b"{}"], ids=["other", "no facts"])
    def test_listed_but_no_block(self, folder, content):
        (folder / "block-00000.safetensors").write_bytes(content)
        entry = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        edit_manifest(folder, blocks=[entry])
        with CalibrationJournal(folder, FACTS) as journal:
            with pytest.raises(ValueError, match="block-00000.*holds no block"):
                journal.read(0)

    def test_names_in_a_manifest_reach_nothing(self, folder):
        secret = folder.parent / "secret.safetensors"
        os.replace(folder / "block-00000.safetensors", secret)
        blocks = json.loads((folder / MANIFEST).read_text())["blocks"]
        edit_manifest(folder, blocks=[entry | {"file": "../secret.safetensors"} for entry in blocks])
        with pytest.raises(ValueError, match="block-00000.*is missing"):
            CalibrationJournal(folder, FACTS)

    @pytest.mark.parametrize("name", ["block-00003.safetensors", "block-00003.safetensors.tmp", f"{MANIFEST}.tmp"])
    def test_links_are_replaced_and_not_followed(self, folder, name):
        outside = folder.parent / "outside"
        outside.write_text("mine")
        (folder / name).symlink_to(outside)
        with CalibrationJournal(folder, FACTS) as journal:
            journal.keep(3, block(3), {"index": 3})
            check_all(journal)
        assert outside.read_text() == "mine" and not any(path.is_symlink() for path in folder.iterdir())


class TestFullDisk:
    @pytest.mark.parametrize("position", range(len(DISK_CALLS)))
    def test_at_each_call(self, folder, monkeypatch, position):
        with CalibrationJournal(folder, FACTS) as journal:
            wrap = acting_at(position, disk_full)
            with monkeypatch.context() as patch:
                for name in ("fsync", "replace"):
                    patch.setattr(os, name, wrap(getattr(os, name)))
                with pytest.raises(OSError, match="block 3 could not be kept.*run again") as raised:
                    journal.keep(3, block(3), {"index": 3})
            assert raised.value.errno == errno.ENOSPC
            assert not list(folder.glob("*.tmp"))
            assert journal.finished == (4 if position == MANIFEST_MOVED else 3)
            journal.keep(journal.finished, block(journal.finished), {"index": journal.finished})
            check_all(journal)
        with CalibrationJournal(folder, FACTS) as again:
            assert again.finished == journal.finished
            check_all(again)

    @processes
    def test_a_real_limit(self, folder):
        import resource

        with CalibrationJournal(folder, FACTS) as journal:
            before = contents(folder)
            ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
                with pytest.raises(OSError, match="block 3 could not be kept") as raised:
                    journal.keep(3, block(3, 200_000), {"index": 3})
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
                signal.signal(signal.SIGXFSZ, ignored)
            assert raised.value.errno == errno.EFBIG
            assert contents(folder) == before and journal.finished == 3
            journal.keep(3, block(3), {"index": 3})
            check_all(journal)

    def test_at_the_first_manifest(self, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", acting_at(0, disk_full)(os.fsync))
            with pytest.raises(OSError, match="No space left"):
                CalibrationJournal(tmp_path, FACTS)
        CalibrationJournal(tmp_path, FACTS).close()


class TestLock:
    def test_second_in_one_process(self, folder):
        with CalibrationJournal(folder, FACTS):
            with pytest.raises(RuntimeError, match="another process, or another journal of this one, has it open"):
                CalibrationJournal(folder, FACTS)
        CalibrationJournal(folder, FACTS).close()

    def test_systems_without_locks_are_told(self, folder, monkeypatch):
        real_import = builtins.__import__

        def without_fcntl(name, *args):
            if name == "fcntl":
                raise ImportError(name)
            return real_import(name, *args)

        monkeypatch.setattr(builtins, "__import__", without_fcntl)
        with pytest.warns(RuntimeWarning, match="no flock.*one process only") as warned:
            with CalibrationJournal(folder, FACTS) as journal:
                check_all(journal)
        assert warned[0].filename == __file__

    @pytest.mark.parametrize(("code", "is_lock_free"), [(errno.ENOLCK, True), (errno.EIO, False)])
    def test_file_systems_without_locks_are_told(self, folder, monkeypatch, code, is_lock_free):
        fcntl = pytest.importorskip("fcntl")

        def no_locks(*args):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(fcntl, "flock", no_locks)
        expected = pytest.warns(RuntimeWarning, match="no locks") if is_lock_free else pytest.raises(OSError)
        with expected:
            CalibrationJournal(folder, FACTS).close()
