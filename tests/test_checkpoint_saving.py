"""`save`: the old checkpoint or the new one, whatever happens; `save_pretrained`: no mixture that loads."""

import errno
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import pq_ao
from tests.checkpoints import tensors, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
processes = pytest.mark.skipif(os.name != "posix", reason="kills and limits are those of POSIX")

SHARDS = "100KB"  # two

# what `save` does to the disk, besides writing into files that nothing refers to yet
DISK_CALLS = ("fsync", "replace", "unlink", "rmdir")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """Two models on disk, and as tensors."""
    root = tmp_path_factory.mktemp("sources")
    for seed, name in enumerate(("old", "new")):
        tiny(seed=seed).save_pretrained(root / name)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def models(sources) -> dict[str, PreTrainedModel]:
    return {name: AutoModelForCausalLM.from_pretrained(path) for name, path in sources.items()}


@pytest.fixture
def folder(models, tmp_path) -> Path:
    """Holds the old model, and a file that is none of ours."""
    folder = tmp_path / "model"
    pq_ao.save(models["old"], folder, max_shard_size=SHARDS)
    (folder / "notes.txt").write_text("mine")
    return folder


def which(folder: Path, models: dict[str, PreTrainedModel]) -> str:
    """ "old" or "new", whichever model the folder gives: all of it."""
    got = tensors(AutoModelForCausalLM.from_pretrained(folder))
    for name, model in models.items():
        expected = tensors(model)
        if all(torch.equal(got[key], tensor) for key, tensor in expected.items()):
            return name
    raise AssertionError("a mixture")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def check_clean(folder: Path) -> None:
    """Nothing of an interrupted save, no weights but the current ones, and the user's file."""
    config = json.loads((folder / "config.json").read_text())
    key = config["quantization_config"]["tensors_sha256"][:16]
    rest = {name for name in names(folder) if not name.startswith(f"model-{key}")}
    assert rest <= {"config.json", "generation_config.json", "README.md", "notes.txt"}
    assert (folder / "notes.txt").read_text() == "mine"


def counting(act: Callable[[int], None], patch: Callable[[str, Callable], None]) -> None:
    """Calls `act(n)` before the n-th call of `DISK_CALLS`."""
    calls = iter(range(10**6))
    for name in DISK_CALLS:
        original = getattr(os, name)

        def counted(*args, original=original, **kwargs):
            act(next(calls))
            return original(*args, **kwargs)

        patch(name, counted)


class TestFolder:
    def test_replaces_the_old_checkpoint(self, folder, models):
        before = names(folder)
        assert which(folder, models) == "old"
        pq_ao.save(models["new"], folder)
        assert which(folder, models) == "new"
        check_clean(folder)
        assert len(names(folder)) < len(before)  # one file instead of shards

    @pytest.mark.parametrize("sizes", [("50GB", SHARDS), (SHARDS, "50GB"), (SHARDS, "60KB"), ("50GB", "50GB")])
    def test_the_same_model_in_other_shards(self, models, tmp_path, sizes):
        (tmp_path / "notes.txt").write_text("mine")
        for size in sizes:
            pq_ao.save(models["old"], tmp_path, max_shard_size=size)
            assert which(tmp_path, models) == "old"
            check_clean(tmp_path)

    @pytest.mark.parametrize("size", ["50GB", SHARDS])
    def test_over_what_save_pretrained_wrote(self, models, tmp_path, size):
        (tmp_path / "notes.txt").write_text("mine")
        models["old"].save_pretrained(tmp_path, max_shard_size=size)
        pq_ao.save(models["new"], tmp_path)
        assert which(tmp_path, models) == "new"
        check_clean(tmp_path)

    def test_from_the_folder_into_itself(self, folder, models):
        pq_ao.save(AutoModelForCausalLM.from_pretrained(folder), folder)
        assert which(folder, models) == "old"

    def test_save_pretrained_of_a_loaded_model(self, folder, models, tmp_path):
        """Its config does not go on naming the file that it was loaded from."""
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "plain")
        assert "model.safetensors" in names(tmp_path / "plain")
        assert which(tmp_path / "plain", models) == "old"
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)
        assert which(folder, models) == "old"

    def test_tokenizer(self, models, tiny_tokenizer, tmp_path):
        pq_ao.save(models["old"], tmp_path, tokenizer=tiny_tokenizer)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert loaded("An English sentence.").input_ids == tiny_tokenizer("An English sentence.").input_ids
        pq_ao.save(models["new"], tmp_path, tokenizer=tiny_tokenizer)
        pq_ao.save(models["new"], tmp_path)
        assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tiny_tokenizer.chat_template

    @pytest.mark.parametrize("content", ['{"model_type": "llama"}', '{"quantization_config": null}', "{", "[]"])
    def test_another_model_is_not_overwritten(self, models, tmp_path, content):
        (tmp_path / "config.json").write_text(content)
        (tmp_path / "model.safetensors").write_text("weights")
        with pytest.raises(ValueError, match="holds another model, or one that is damaged.*give another folder"):
            pq_ao.save(models["old"], tmp_path)
        assert (tmp_path / "model.safetensors").read_text() == "weights" and len(names(tmp_path)) == 2

    def test_weights_without_a_config_are_not_overwritten(self, models, tmp_path):
        (tmp_path / "model-00001-of-00002.safetensors").write_text("weights")
        with pytest.raises(ValueError, match="holds another model"):
            pq_ao.save(models["old"], tmp_path)
        assert names(tmp_path) == {"model-00001-of-00002.safetensors"}

    def test_a_file(self, models, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(ValueError, match="is a file; give a folder"):
            pq_ao.save(models["old"], tmp_path / "file")

    def test_an_unquantized_model(self, make_tiny, folder, models):
        with pytest.raises(ValueError, match="not calibrated"):
            pq_ao.save(make_tiny("llama"), folder)
        assert which(folder, models) == "old"

    @processes
    def test_one_save_at_a_time(self, folder, models):
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            with pytest.raises(RuntimeError, match="another process is saving into it"):
                pq_ao.save(models["new"], folder)
        finally:
            os.close(descriptor)
        assert which(folder, models) == "old"


class TestFullDisk:
    @processes
    @pytest.mark.parametrize("limit", [100, 10_000, 50_000])
    def test_a_real_limit(self, folder, models, limit):
        import resource

        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            with pytest.raises(OSError, match="could not be saved.*is still there.*Make room") as raised:
                pq_ao.save(models["new"], folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, ignored)
        assert raised.value.errno == errno.EFBIG and raised.value.filename == str(folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert which(folder, models) == "old"

    def test_at_any_call(self, folder, models, monkeypatch):
        outcomes = []
        for position in range(1000):
            reached = []

            def full(call, position=position, reached=reached):
                if call == position:
                    reached.append(call)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            with monkeypatch.context() as patch:
                counting(full, lambda name, function, patch=patch: patch.setattr(os, name, function))
                try:
                    pq_ao.save(models["new"], folder)
                except OSError as error:
                    assert error.errno == errno.ENOSPC and "No space left" in str(error)
                    told = "new" if "the model is saved" in str(error) else "old"
                    assert which(folder, models) == told
            outcomes.append(which(folder, models))
            if not reached:
                break
            pq_ao.save(models["old"], folder)
        assert outcomes == sorted(outcomes, reverse=True)  # old up to a moment, and new from there on
        assert outcomes.count("old") > 5 and outcomes.count("new") > 2
        check_clean(folder)


# Children are forked from one server that has everything imported, for each import takes seconds.
def _start(target, *args) -> tuple[multiprocessing.Process, "multiprocessing.connection.Connection"]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "pytest", "tests.checkpoints", "pq_ao.checkpoint.saving"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*args, sender), daemon=True)
    process.start()
    sender.close()  # so that the child's end is the only one, and its death is seen
    return process, receiver


def _model(source: Path) -> PreTrainedModel:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(source)


def _die_at_call(source, folder, position, sender) -> None:
    model = _model(source)

    def die(call):
        if call == position:
            os.kill(os.getpid(), signal.SIGKILL)

    counting(die, lambda name, function: setattr(os, name, function))
    pq_ao.save(model, folder, max_shard_size=SHARDS)
    sender.send("survived")


def _save_on(sources, folder, sender) -> None:
    models = [_model(source) for source in sources]
    for model in models * 1000:
        pq_ao.save(model, folder, max_shard_size=SHARDS)
        sender.send("saved")


def _die_between_files(source, folder, position, sender) -> None:
    """In `save_pretrained`, before its n-th weights file; or after all of them, before the index."""
    import transformers.modeling_utils as modeling

    model, write, written = _model(source), modeling.safe_save_file, iter(range(1000))

    def die_or_write(*args, **kwargs):
        if next(written) == position:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*args, **kwargs)

    modeling.safe_save_file = die_or_write
    model.save_pretrained(folder, max_shard_size=SHARDS)
    sender.send("survived")


def _outcome(receiver) -> str:
    try:
        return receiver.recv()
    except EOFError:
        return "killed"


@processes
class TestKills:
    @pytest.mark.slow
    def test_before_each_call(self, folder, sources, models):
        outcomes = []
        for position in range(1000):
            process, receiver = _start(_die_at_call, sources["new"], folder, position)
            outcome = _outcome(receiver)
            process.join()
            assert process.exitcode == (-signal.SIGKILL if outcome == "killed" else 0)
            outcomes.append(which(folder, models))
            if outcome == "survived":
                break
            pq_ao.save(models["old"], folder, max_shard_size=SHARDS)
            check_clean(folder)
            assert which(folder, models) == "old"
        assert outcomes == sorted(outcomes, reverse=True)
        assert outcomes.count("old") > 5 and outcomes.count("new") > 2
        check_clean(folder)

    def test_at_random_moments(self, folder, sources, models):
        delays = random.Random(0)
        seen = set()
        for _ in range(6):
            process, receiver = _start(_save_on, list(sources.values()), folder)
            assert receiver.recv() == "saved"
            time.sleep(delays.uniform(0, 0.1))
            process.kill()
            process.join()
            seen.add(which(folder, models))
        assert seen <= {"old", "new"}
        pq_ao.save(models["new"], folder)
        check_clean(folder)

    def test_in_an_empty_folder(self, sources, models, tmp_path):
        for position in (0, 3, 7):
            folder = tmp_path / str(position)
            process, receiver = _start(_die_at_call, sources["new"], folder, position)
            assert _outcome(receiver) == "killed"
            process.join()
            try:
                assert which(folder, models) == "new"
            except (OSError, ValueError):
                assert "config.json" not in names(folder)
            pq_ao.save(models["new"], folder)
            assert which(folder, models) == "new"

    @pytest.mark.parametrize("old_size", ["50GB", SHARDS, "60KB"])
    def test_save_pretrained_leaves_no_mixture_that_loads(self, sources, models, tmp_path, old_size):
        outcomes = []
        for position in range(1000):
            folder = tmp_path / str(position)
            models["old"].save_pretrained(folder, max_shard_size=old_size)
            process, receiver = _start(_die_between_files, sources["new"], folder, position)
            outcome = _outcome(receiver)
            process.join()
            try:
                outcomes.append(which(folder, models))
            except (ValueError, OSError) as error:
                assert "another save" in str(error) or "missing" in str(error)
                outcomes.append("refused")
            if outcome == "survived":
                break
        assert "refused" in outcomes and "old" not in outcomes
        # transformers leaves an old single file beside new shards, and reads that
        assert outcomes[-1] == ("refused" if old_size == "50GB" else "new")
