"""recipes/run_exported.py: text from a folder and a tokenizer's file, in a process without transformers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

import pq_ao
from recipes import run_exported
from tests.checkpoints import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "To be, or not"


@pytest.fixture(scope="module")
def folder(tiny_tokenizer, tmp_path_factory):
    """An exported decoder beside its tokenizer.json."""
    folder = tmp_path_factory.mktemp("recipe")
    pq_ao.export_decoder(tiny("llama", vocab_size=len(tiny_tokenizer)), 1, 64).save(folder)
    tiny_tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
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


def test_a_missing_tokenizer_is_named(folder, tmp_path):
    with pytest.raises(SystemExit, match="nowhere.json: there is no such file; name the tokenizer.json of the model"):
        run_exported.main([str(folder), "--tokenizer", str(tmp_path / "nowhere.json")])
