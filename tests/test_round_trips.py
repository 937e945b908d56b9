"""Saved in every way and run in every way, a model gives the same integers and bitwise the same logits.

`python -m benchmarks.round_trips` does the same with a real model; here are tiny ones, and the packages of AOTInductor,
which take long to compile, are used for all that is to be tested of packages.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pq_ao
from benchmarks import round_trips
from benchmarks.devices import compare_devices
from benchmarks.results_file import load_results
from benchmarks.ways import SAVES, Runner, integers_of, reloaded
from pq_ao.exported import LENGTH_NAME, load_exported
from tests.checkpoints import assert_same_model, tiny
from tests.inductor import ROUNDS_AS_EAGER
from tests.test_exported import ALONE, program_file, vouch_for

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = {"qwen2": 2, "qwen3": 1}  # with biases; with norms on the heads
# What was compiled serves every model that is alike. Exporting takes seconds and packages half a minute, so they are
# made of one of the three models, which are equal, and so are their programs; packages of one family alone.
CELLS = [("eager", save) for save in SAVES] + [("exported", "sharded")]
COMPILED_CELLS = [("compiled", save) for save in SAVES] + [("aoti", "state_dict")]
IDS = torch.randint(3, 300, (1, 11), generator=torch.Generator().manual_seed(6))
NEW_TOKENS = 12
SLOTS = 48


class Trip:
    """A model, what came back of it, and its eager outcome."""

    def __init__(self, family: str, folder: Path):
        self.model = tiny(family, dtype=torch.bfloat16, num_hidden_layers=LAYERS[family])
        self.loaded = {save: reloaded(self.model, save, folder / save) for save in SAVES}
        self.runner = Runner(folder, 1, SLOTS)
        self.eager = self.runner.run("eager", self.model, IDS, NEW_TOKENS)


@pytest.fixture(scope="module", params=LAYERS)
def trip(request, tmp_path_factory) -> Trip:
    return Trip(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("save", SAVES)
def test_the_same_integers(trip, save):
    assert integers_of(trip.loaded[save]) == integers_of(trip.model)
    assert_same_model(trip.loaded[save], trip.model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "save"), [*CELLS, *(pytest.param(*cell, marks=ROUNDS_AS_EAGER) for cell in COMPILED_CELLS)]
)
def test_the_same_logits_and_cache(trip, way, save):
    """At every step those of the model that was never saved, run eagerly."""
    if way == "aoti" and trip.model.config.model_type != "qwen2":
        pytest.skip("packages of one family are enough here; `python -m benchmarks.round_trips` takes any")
    outcome = trip.runner.run(way, trip.loaded[save], IDS, NEW_TOKENS)
    assert outcome.equal_steps(trip.eager) == len(outcome.logits) == NEW_TOKENS
    assert outcome.same_cache(trip.eager) and len(outcome.cache) == 2 * len(trip.model.model.layers)


def test_differences_are_seen(trip):
    family = trip.model.config.model_type
    other = tiny(family, dtype=torch.bfloat16, num_hidden_layers=LAYERS[family], seed=1)
    assert integers_of(other) != integers_of(trip.model)
    outcome = trip.runner.run("eager", other, IDS, NEW_TOKENS)
    assert outcome.equal_steps(trip.eager) == 0 and not outcome.same_cache(trip.eager)
    assert outcome.prefill_sqnr(trip.eager) < 10 and trip.eager.prefill_sqnr(trip.eager) is None
    shorter = trip.runner.run("eager", trip.model, IDS, 3)
    assert torch.equal(shorter.logits, trip.eager.logits[:3])


@pytest.mark.slow
@pytest.mark.parametrize("trip", ["qwen2"], indirect=True)
class TestPackages:
    """Of AOTInductor, those that the cells above compiled."""

    @pytest.fixture
    def folder(self, trip) -> Path:
        folder = trip.runner.folder / "packages"
        if not folder.exists():
            trip.runner.run("aoti", trip.model, IDS, 1)
        return folder

    @ROUNDS_AS_EAGER
    def test_they_give_the_same_tokens_alone(self, trip, folder):
        lengths = (11, 2, 1)
        run = subprocess.run(
            [sys.executable, "-c", ALONE, str(folder), json.dumps(IDS.tolist())], capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        expected = [trip.runner.run("eager", trip.model, IDS[:, :length], 32).tokens for length in lengths]
        got = [torch.tensor(tokens)[:, length:] for tokens, length in zip(json.loads(run.stdout), lengths, strict=True)]
        assert all(torch.equal(mine, theirs.T) for mine, theirs in zip(got, expected, strict=True))

    @ROUNDS_AS_EAGER
    def test_prefill_goes_on_from_what_the_cache_holds(self, trip, folder):
        decoder, cache = load_exported(folder), pq_ao.PrefixStaticCache(trip.model, 1, SLOTS)
        for ids in (IDS, IDS[:, :1], IDS[:, 3:7]):
            with torch.no_grad():
                expected = trip.model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
            assert torch.equal(decoder.prefill(ids), expected)
        assert decoder.held == int(decoder.cache[LENGTH_NAME]) == 16

    def test_damaged_ones_are_refused(self, folder, tmp_path):
        folder = Path(shutil.copytree(folder, tmp_path / "copy"))
        path = program_file(folder, "state")
        with pytest.raises(ValueError, match="compile_options: packages of AOTInductor are compiled already"):
            load_exported(folder, compile_options={})
        state = torch.load(path, weights_only=True)
        torch.save({name: tensor for name, tensor in state.items() if "lm_head" not in name}, path)
        vouch_for(folder, "state")
        with pytest.raises(ValueError, match="lacks 'model.lm_head.weight', which prefill needs"):
            load_exported(folder)
        path.write_bytes(b"no tensors")
        with pytest.raises(ValueError, match="has 10 bytes instead of"):
            load_exported(folder)
        vouch_for(folder, "state")
        with pytest.raises(ValueError, match="cannot load this file"):
            load_exported(folder)


class TestCommand:
    """`python -m benchmarks.round_trips`."""

    @pytest.fixture
    def arguments(self, tmp_path) -> list[str]:
        pq_ao.save(tiny("qwen2", dtype=torch.bfloat16), tmp_path / "model")
        folders = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
        return [*folders, "--device", "cpu", "--ways", "eager", "--new-tokens", "6"]

    def test_cells_and_folders(self, arguments, tmp_path, capsys):
        assert round_trips.main([*arguments, "--saves", "single", "state_dict"]) == 0
        (results,) = load_results("round_trips", tmp_path / "out")
        cells = [row for row in results.rows if row["what"] == "cell"]
        assert [row["save"] for row in cells] == ["original", "single", "state_dict"]
        assert all(row["holds"] and row["integers"] and row["steps_as_eager"] == 6 for row in cells)
        (folder,) = (row for row in results.rows if row["what"] == "folder")
        assert folder["float_copies"] == [] and folder["load_seconds"] > 0
        assert 0.25 < folder["ratio"] < 0.32  # two tiny layers: much prefix, few weights
        assert re.search(r"eager +6, 6 of 6 +6, 6 of 6 +6, 6 of 6\n", capsys.readouterr().out)

    def test_a_cell_that_does_not_hold(self, arguments, tmp_path, capsys, monkeypatch):
        other = tiny("qwen2", dtype=torch.bfloat16, seed=1)
        monkeypatch.setattr(round_trips, "reloaded", lambda model, save, folder: other)
        assert round_trips.main([*arguments, "--saves", "state_dict"]) == 1
        (results,) = load_results("round_trips", tmp_path / "out")
        assert [row["holds"] for row in results.rows] == [True, False]
        assert results.rows[1]["integers"] is False and results.rows[1]["steps_as_original"] == 0
        assert "eager x state_dict: DIFFERS" in capsys.readouterr().out

    def test_what_programs_are_timed_against_decodes_as_the_model_does(self):
        model = tiny("qwen2", dtype=torch.bfloat16)
        ids = torch.randint(3, 300, (1, 5), generator=torch.Generator().manual_seed(0))
        cache = pq_ao.PrefixStaticCache(model, 1, 16)
        expected = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False, eos_token_id=None)
        expected = expected[0, 5:].tolist()
        step = round_trips.CompiledStep(model, 1, 16, {"backend": "eager"})
        for _ in range(2):
            tokens = [step.prefill(ids)]
            for _ in range(3):
                tokens.append(step.decode(tokens[-1]))
            assert [int(token) for token in tokens] == expected
            step.reset()

    def test_a_device_compared_with_itself(self):
        model = tiny("qwen2", dtype=torch.bfloat16)
        ids = torch.randint(3, 300, (200,), generator=torch.Generator().manual_seed(0))
        row = compare_devices(model, ids, ("cpu", "cpu"), windows=3, length=32, progress=False)
        expected = pq_ao.perplexity(model, None, ids, sequence_length=32, windows=3, progress=False).ppl
        assert row["ratio"] == 1 and row["standard_error"] == 0
        assert row["ppl"] == pytest.approx([expected] * 2, rel=1e-6)
        with pytest.raises(ValueError, match="200 tokens; 7 windows of 32"):
            compare_devices(model, ids, ("cpu", "cpu"), windows=7, length=32)

    def test_nothing_to_time_on_a_cpu(self, arguments, capsys):
        with pytest.raises(SystemExit):
            round_trips.main([*arguments, "--parts", "cells", "decode"])
        assert "--parts decode, devices: need a GPU; leave them out with --device cpu" in capsys.readouterr().err

    def test_an_error_is_a_row(self, arguments, tmp_path, capsys, monkeypatch):
        def fail(*args):
            raise RuntimeError("no compiler here\nand more")

        monkeypatch.setattr(Runner, "_exported", fail)
        assert round_trips.main([*arguments, "--ways", "eager", "exported", "--saves", "state_dict"]) == 1
        (results,) = load_results("round_trips", tmp_path / "out")
        assert [row["holds"] for row in results.rows] == [True, False, True]
        assert results.rows[1]["error"] == "RuntimeError: no compiler here"
