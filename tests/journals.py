"""What the tests of the journal share: blocks to keep, and a journal of three of them."""

import itertools
from collections.abc import Callable
from pathlib import Path

import torch

from pq_ao.journal import CalibrationJournal

FACTS = {"config": {"weight_bits": 4, "mode": "static"}, "seed": 0, "weights": "ab" * 32, "windows": [1, 2]}

# what `keep` asks of the disk, in order: block file, its move, the folder; the same for the manifest
DISK_CALLS = ("fsync", "replace", "fsync", "fsync", "replace", "fsync")
MANIFEST_MOVED = 5


def block(index: int, numel: int = 1000) -> dict[str, torch.Tensor]:
    """Tensors that tell their block, of several dtypes."""
    codes = torch.arange(numel, dtype=torch.int64) * 7 + index
    return {
        "qdata": (codes % 256).to(torch.uint8),
        "scale": codes.float() / 3,
        "prefix_k": (codes[:6].view(1, 3, 2) - 3).bfloat16(),
        "prefix_v": torch.zeros(4, 0, 64, dtype=torch.bfloat16),
    }


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].device.type == "cpu"
        assert torch.equal(found[name], tensor), name


def check_all(journal: CalibrationJournal, numel: int = 1000) -> None:
    for index in range(journal.finished):
        tensors, facts = journal.read(index)
        assert_equal(tensors, block(index, numel))
        assert facts == {"index": index}


def acting_at(position: int, action: Callable[[], None]) -> Callable[[Callable], Callable]:
    """Wraps functions: just before the call of number `position` to any of them comes `action`."""
    calls = itertools.count()

    def wrap(call: Callable) -> Callable:
        def run(*args):
            if next(calls) == position:
                action()
            return call(*args)

        return run

    return wrap


def three_blocks(folder: Path) -> Path:
    """A journal of three blocks, closed."""
    with CalibrationJournal(folder, FACTS) as journal:
        for index in range(3):
            journal.keep(index, block(index), {"index": index})
    return folder
