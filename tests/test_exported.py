"""Exported decoders from disk: in a process that knows neither torchao nor transformers, and from damaged folders."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pq_ao
from pq_ao.export_manifest import FORMAT_VERSION, MANIFEST_NAME, sha256_of
from pq_ao.exported import load_exported
from tests.checkpoints import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(3, 300, (1, 11), generator=torch.Generator().manual_seed(6))
NO_END = {"eos_token_ids": ()}

# loads, generates, and fails where anything but torch and our ops was needed; ids and folder from the command line
ALONE = """
import json, sys
import torch
from pq_ao.exported import load_exported
decoder = load_exported(sys.argv[1])
ids = torch.tensor(json.loads(sys.argv[2]))
tokens = [decoder.generate(ids[:, :length], 32, eos_token_ids=()).tolist() for length in (11, 2, 1)]
loaded = [name for name in ("torchao", "transformers", "safetensors", "datasets", "pq_ao.cache") if name in sys.modules]
assert not loaded, loaded
print(json.dumps(tokens))
"""


@pytest.fixture(scope="module")
def model():
    return tiny("qwen2")


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """Programs, and the folder that they are saved in; not to be changed."""
    folder = tmp_path_factory.mktemp("exported") / "programs"
    programs = pq_ao.export_decoder(model, 1, 48)
    programs.save(folder)
    return programs, folder


@pytest.fixture
def folder(exported, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(exported[1], tmp_path / "copy"))


def _edit(folder, **changes):
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


def program_file(folder: Path, name: str) -> Path:
    """Of "prefill", "decode" or "state"."""
    return folder / json.loads((folder / MANIFEST_NAME).read_bytes())["files"][name]["file"]


def vouch_for(folder: Path, name: str) -> None:
    """Makes the manifest agree with a file that was changed."""
    path, facts = program_file(folder, name), json.loads((folder / MANIFEST_NAME).read_bytes())
    facts["files"][name] |= {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    (folder / MANIFEST_NAME).write_text(json.dumps(facts))


def test_a_process_without_torchao_and_transformers_gives_the_same_tokens(model, exported):
    run = subprocess.run(
        [sys.executable, "-c", ALONE, str(exported[1]), json.dumps(IDS.tolist())], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    expected = [
        model.generate(
            IDS[:, :length], past_key_values=pq_ao.PrefixStaticCache(model, 1, 48), max_new_tokens=32, do_sample=False,
            attention_mask=torch.ones(1, length), eos_token_id=None, pad_token_id=2,
        ).tolist()
        for length in (11, 2, 1)
    ]  # fmt: skip
    assert json.loads(run.stdout) == expected


def test_logits_after_loading_are_bitwise_those_before(exported):
    programs, folder = exported
    before, after = programs.decoder(), load_exported(folder)
    assert torch.equal(after.prefill(IDS), before.prefill(IDS))
    token = torch.tensor([17])
    for _ in range(3):
        assert torch.equal(after.decode(token), before.decode(token))
    assert after.manifest.logits == [1, 300] and after.held == 14


def test_a_loaded_decoder_begins_anew_whatever_was_run_before_saving(exported, tmp_path):
    programs, folder = exported
    programs.decoder().prefill(IDS)
    programs.save(tmp_path / "used")
    assert torch.equal(
        load_exported(tmp_path / "used").generate(IDS, 8, **NO_END), load_exported(folder).generate(IDS, 8, **NO_END)
    )


def test_weights_are_held_once(exported, model):
    """On disk in the file of prefill; in memory by both programs together. The cache is in neither file."""
    programs, folder = exported
    weights = sum(tensor.nbytes for tensor in programs.prefill.state_dict.values())
    large = pq_ao.export_decoder(model, 1, 4096, max_prefill_len=64)
    assert large.manifest.cache_bytes > 390_000
    large.save(folder.parent / "large")
    size = {
        (where, name): program_file(where, name).stat().st_size
        for where in (folder, folder.parent / "large")
        for name in ("prefill", "decode")
    }
    graph = size[folder, "decode"]  # as good as nothing else
    assert size[folder, "prefill"] < weights + 1.5 * graph
    assert abs(size[folder.parent / "large", "prefill"] - size[folder, "prefill"]) < 9_000
    decoder = load_exported(folder)
    theirs = dict(decoder._decode.named_parameters()) | dict(decoder._decode.named_buffers())
    mine = dict(decoder._prefill.named_parameters()) | dict(decoder._prefill.named_buffers())
    assert theirs and all(tensor.data_ptr() == mine[name].data_ptr() for name, tensor in theirs.items())


def test_files_say_nothing_of_the_machine_that_wrote_them(exported):
    for path in exported[1].iterdir():
        content = path.read_bytes()
        for place in (str(Path(__file__).parent.parent), sys.prefix, str(exported[1])):
            assert place.encode() not in content, path.name


@pytest.mark.slow
def test_decode_can_be_compiled(exported):
    programs, folder = exported
    options = {"options": {"emulate_precision_casts": True}, "fullgraph": True}
    decoder = load_exported(folder, compile_options=options)
    assert torch.equal(decoder.generate(IDS, 16, **NO_END), programs.decoder().generate(IDS, 16, **NO_END))


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_a_missing_program_is_named(folder, name):
    path = program_file(folder, name)
    path.unlink()
    with pytest.raises(ValueError, match=f"{path.name}: the file of {name} is missing.*export the model again"):
        load_exported(folder)


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_a_program_cut_short_or_changed_is_refused_before_it_is_loaded(folder, name, monkeypatch):
    monkeypatch.setattr(torch.export, "load", lambda path: pytest.fail("was loaded"))
    path = program_file(folder, name)
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=f"{path.name}: has .* bytes instead of"):
        load_exported(folder)
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path.name}: its sha256 is not the one in manifest.json"):
        load_exported(folder)


def test_a_file_that_is_no_program_is_refused(folder):
    program_file(folder, "decode").write_bytes(b"not a program")
    vouch_for(folder, "decode")
    with pytest.raises(ValueError, match="cannot load this file, which torch .* wrote .*Export the model again"):
        load_exported(folder)


def test_programs_that_do_not_belong_together_are_refused(folder, tmp_path):
    shutil.copy(program_file(folder, "prefill"), program_file(folder, "decode"))
    vouch_for(folder, "decode")
    with pytest.raises(ValueError, match=r"decode: takes tensors of \[\(1, s\d+\)\] instead of ids \(1, 1\)"):
        load_exported(folder)
    pq_ao.export_decoder(tiny("qwen2", hidden_size=48, num_hidden_layers=1), 1, 48).save(tmp_path / "other")
    shutil.copy(program_file(tmp_path / "other", "decode"), program_file(folder, "decode"))
    vouch_for(folder, "decode")
    with pytest.raises(ValueError, match="decode: 'model.*', which is another tensor in prefill or none: the programs"):
        load_exported(folder)


@pytest.mark.parametrize("change", [{"max_cache_len": 96}, {"batch_size": 2}])
def test_a_manifest_that_promises_more_room_is_refused(folder, change):
    _edit(folder, **change)
    with pytest.raises(ValueError, match="but cache_keys_0 of prefill is"):
        load_exported(folder)


def test_a_manifest_that_promises_padding_is_refused(folder):
    _edit(folder, padded=True)
    with pytest.raises(ValueError, match=r"prefill: takes tensors of .* instead of ids and a mask \[1, L\]"):
        load_exported(folder)


def test_the_folder_of_an_older_version_loads(exported, folder):
    path = folder / MANIFEST_NAME
    facts = json.loads(path.read_bytes()) | {"format_version": 1}
    del facts["padded"]
    path.write_text(json.dumps(facts))
    decoder = load_exported(folder)
    assert not decoder.manifest.padded
    assert torch.equal(decoder.generate(IDS, 8, **NO_END), exported[0].decoder().generate(IDS, 8, **NO_END))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("padded", [False, True])
def test_a_recorded_decode_gives_the_tokens_of_the_programs(tmp_path, padded):
    model = tiny("qwen2", dtype=torch.bfloat16).cuda()
    pq_ao.export_decoder(model, 1, 48, padded=padded).save(tmp_path / "programs")
    options = {"options": {"emulate_precision_casts": True, "eager_numerics.division_rounding": True}}
    plain, recorded = (load_exported(tmp_path / "programs", compile_options=chosen) for chosen in (None, options))
    for _ in range(2):  # recording, then replay
        assert torch.equal(recorded.generate(IDS, 24, **NO_END), plain.generate(IDS, 24, **NO_END))
        assert all(torch.equal(tensor, plain.cache[name]) for name, tensor in recorded.cache.items())


def test_programs_for_a_gpu_are_refused_without_one(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _edit(folder, device="cuda")
    with pytest.raises(ValueError, match="the programs are for CUDA, and there is no GPU here; export the model on"):
        load_exported(folder)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"has no manifest.json.*export_decoder\(...\).save\(folder\)"):
        load_exported(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no manifest.json"):
        load_exported(tmp_path)


def test_a_later_version_says_update(folder):
    _edit(folder, format_version=FORMAT_VERSION + 1)
    with pytest.raises(ValueError, match=f"format_version={FORMAT_VERSION + 1} is newer than this pq_ao.*update pq_ao"):
        load_exported(folder)
