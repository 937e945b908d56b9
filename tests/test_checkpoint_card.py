"""The model card, and what is uploaded with it."""

import shutil

import huggingface_hub
import pytest
import torch
from torchao.quantization import quantize_
from transformers import AutoModelForCausalLM

import pq_ao
from tests.checkpoints import assert_same_model, logits, tiny

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = ({"task": "wikitext2", "ppl": 21.6437, "stderr": None}, {"task": "a|b", "acc": 0.5})


def test_content(tmp_path):
    model = pq_ao.quantize_head_(tiny())
    pq_ao.save(model, tmp_path, results=ROWS)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\ntags:\n- prefixquant\n")
    for part in (
        "**Import `pq_ao` first.**",
        "| scheme | w4a4kv4, static scales |",
        "| prefix | 2 tokens, hidden",
        "| head | INT8 weights",
        "| task | ppl | stderr | acc |\n| --- | --- | --- | --- |\n",
        "| wikitext2 | 21.64 |  |  |\n| a\\|b |  |  | 0.5 |\n",
    ):
        assert part in text
    code = text.split("```python\n")[1].split("```")[0]
    names_in_code: dict = {"folder": tmp_path}
    exec(code, names_in_code)
    assert torch.equal(logits(names_in_code["model"]), logits(model))


def test_calibration_and_prefix_ids(calibrated_card):
    assert "| prefix | 2 tokens: ids 5, 0, hidden" in calibrated_card
    assert "| calibration | 2 x 32 tokens of list, none search, nearest rounding, balanced, seed 0 |" in calibrated_card


@pytest.fixture
def calibrated_card(make_tiny, tiny_tokenizer, english, tmp_path) -> str:
    model, config = make_tiny("llama"), pq_ao.prefixquant_config()
    settings = {"num_sequences": 2, "sequence_length": 32, "prefix_ids": (5, 0), "search": "none"}
    pq_ao.calibrate(model, tiny_tokenizer, config, data=english, progress=False, **settings)
    quantize_(model, config)
    pq_ao.save(model, tmp_path)
    return (tmp_path / "README.md").read_text()


def test_yours_is_kept_unless_there_are_results(tmp_path):
    folder = tmp_path
    (folder / "README.md").write_text("mine")
    pq_ao.save(tiny(), folder)
    assert (folder / "README.md").read_text() == "mine"
    pq_ao.save(tiny(), folder, results=ROWS)
    assert "wikitext2" in (folder / "README.md").read_text()


def test_push_to_hub(tiny_tokenizer, tmp_path, monkeypatch):
    """What is uploaded is a whole checkpoint with its card; only the network is left out."""

    class Repo:
        repo_id = "someone/name"

    def upload(self, *, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, tmp_path / "hub" / repo_id)
        return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **kwargs: Repo())
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    model = tiny()
    url = pq_ao.push_to_hub(model, "name", tokenizer=tiny_tokenizer, results=ROWS)
    assert url == "https://hub/commit"
    folder = tmp_path / "hub" / "someone" / "name"
    assert_same_model(AutoModelForCausalLM.from_pretrained(folder), model)
    assert "wikitext2" in (folder / "README.md").read_text()
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= {
        path.name for path in folder.iterdir()
    }
