"""The journal under several processes: kills at every moment, and a second one in the same folder."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from pq_ao.journal import CalibrationJournal
from tests.journals import DISK_CALLS, FACTS, MANIFEST_MOVED, acting_at, block, check_all, three_blocks

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork and signals")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A journal of three blocks, closed."""
    return three_blocks(tmp_path / "journal")


# Children are forked from one server that has torch, for each import of it takes seconds.
def _start(target, *args) -> tuple[multiprocessing.Process, "multiprocessing.connection.Connection"]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "pytest", "pq_ao.journal"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*args, sender), daemon=True)
    process.start()
    sender.close()  # so that the child's end is the only one, and its death is seen
    return process, receiver


def _hold(folder, sender) -> None:
    with CalibrationJournal(folder, FACTS):
        sender.send("open")
        time.sleep(600)


def _keep_on(folder, numel, sender) -> None:
    with CalibrationJournal(folder, FACTS) as journal:
        while True:
            index = journal.finished
            journal.keep(index, block(index, numel), {"index": index})
            sender.send(index)


def _die_at_call(folder, position, sender) -> None:
    with CalibrationJournal(folder, FACTS) as journal:
        wrap = acting_at(position, lambda: os.kill(os.getpid(), signal.SIGKILL))
        os.fsync, os.replace = wrap(os.fsync), wrap(os.replace)
        journal.keep(3, block(3), {"index": 3})
        sender.send("survived")


class TestProcesses:
    def test_second_process_is_refused_until_the_first_is_killed(self, folder):
        process, receiver = _start(_hold, folder)
        assert receiver.recv() == "open"
        with pytest.raises(RuntimeError, match="another process"):
            CalibrationJournal(folder, FACTS)
        process.kill()
        process.join()
        with CalibrationJournal(folder, FACTS) as journal:
            check_all(journal)

    @pytest.mark.parametrize("position", range(len(DISK_CALLS)))
    def test_kill_before_each_call(self, folder, position):
        process, receiver = _start(_die_at_call, folder, position)
        with pytest.raises(EOFError):
            receiver.recv()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        with CalibrationJournal(folder, FACTS) as journal:
            assert journal.finished == (4 if position == MANIFEST_MOVED else 3)
            check_all(journal)
            journal.keep(journal.finished, block(journal.finished), {"index": journal.finished})
            check_all(journal)
        assert not list(folder.glob("*.tmp"))

    def test_kills_at_random_moments(self, tmp_path):
        numel = 300_000  # 1.5 MB a block: most of a keep is writing
        delays = random.Random(0)
        finished = 0
        for _ in range(12):
            process, receiver = _start(_keep_on, tmp_path, numel)
            last = receiver.recv()
            time.sleep(delays.uniform(0, 0.05))
            process.kill()
            process.join()
            while receiver.poll():
                try:
                    last = receiver.recv()
                except EOFError:
                    break
            with CalibrationJournal(tmp_path, FACTS) as journal:
                # what `keep` returned for is there, and at most the one block that it had no time to tell of
                assert finished <= last < journal.finished <= last + 2
                check_all(journal, numel)
                finished = journal.finished
