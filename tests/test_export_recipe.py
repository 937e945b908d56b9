"""recipes/export.py, and recipes/run_exported.py: text from its folder, in a process without transformers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

import pq_ao
from recipes import export, run_exported

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "To be, or not"


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    """An exported decoder beside its tokenizer.json, by the recipe."""
    folder = tmp_path_factory.mktemp("recipe") / "exported"
    manifest = export.main([str(checkpoint), "--output", str(folder), "--max-cache-len", "64", "--device", "cpu"])
    assert (manifest.backend, manifest.batch_size, manifest.max_cache_len) == ("export", 1, 64)
    return folder


def test_the_text_is_the_decoder_s_and_no_transformers_is_loaded(folder):
    code = (
        "import sys; from recipes.run_exported import main; main(sys.argv[1:]); "
        "print([name for name in ('transformers', 'torchao') if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder), "--prompt", PROMPT, "--new-tokens", "12"],
        capture_output=True, encoding="utf-8", cwd=Path(__file__).parent.parent, env=os.environ | {"PYTHONUTF8": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[-1] == "[]"
    assert lines[-2].startswith("export on cpu, loaded in ") and "tokens/s" in lines[-2]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode(PROMPT, add_special_tokens=False).ids])
    reply = pq_ao.load_exported(folder).generate(ids, 12)[0, ids.shape[1] :]
    assert run.stdout.startswith(tokenizer.decode(reply.tolist()))


def test_compiled_decode_gives_the_same_text(folder, capsys, monkeypatch):
    """The option arrives; what it compiles is the product's."""
    options = {"options": {"emulate_precision_casts": True}}
    monkeypatch.setattr(run_exported, "recommended_compile_options", lambda device: options)
    arguments = [str(folder), "--prompt", PROMPT, "--new-tokens", "12"]
    assert run_exported.main([*arguments, "--compile"]) == run_exported.main(arguments)


@pytest.mark.parametrize("given, named", [("nowhere.json", "nowhere.json"), ("", "tokenizer.json")])
def test_a_missing_tokenizer_is_named(folder, tmp_path, given, named):
    with pytest.raises(SystemExit, match=f"{named}: there is no such file; name the tokenizer.json of the model"):
        run_exported.main([str(folder), "--tokenizer", str(tmp_path / given)])


def test_the_tokenizer_of_a_folder(folder):
    assert len(run_exported.main([str(folder), "--tokenizer", str(folder), "--new-tokens", "3"])) <= 3


def test_export_says_how_to_run_what_it_wrote(checkpoint, tmp_path, capsys):
    settings = "--batch-size 2 --max-cache-len 32 --max-prefill-len 8 --padded --device cpu".split()
    manifest = export.main([str(checkpoint), "--output", str(tmp_path / "two"), *settings])
    assert (manifest.batch_size, manifest.max_prefill_len, manifest.padded) == (2, 8, True)
    printed = capsys.readouterr().out
    assert "batches of 2, with padding" in printed
    assert f"load_exported({str(tmp_path / 'two')!r})" in printed and "run_exported" not in printed
    assert f"{sum(file.bytes for file in manifest.files.values()):,} bytes" in printed
    with pytest.raises(SystemExit, match="batches of 2; export with 1"):
        run_exported.main([str(tmp_path / "two")])


def test_export_refuses_before_it_works(checkpoint, make_tiny, tiny_tokenizer, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--output .*file: is a file; give a folder"):
        export.main([str(checkpoint), "--output", str(tmp_path / "file")])
    make_tiny("llama").save_pretrained(tmp_path / "floats")
    with pytest.raises(ValueError, match="is not a quantized one.*\n.*recipes.quantize --model .*floats"):
        export.main([str(tmp_path / "floats"), "--device", "cpu"])
    with pytest.raises(ValueError, match="max_cache_len=2"):
        export.main([str(checkpoint), "--output", str(tmp_path / "out"), "--max-cache-len", "2", "--device", "cpu"])
    assert {path.name for path in tmp_path.iterdir()} == {"file", "floats"}
