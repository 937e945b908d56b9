"""Recipes from end to end on a tiny random model."""

import math

import pytest
import torch
from matplotlib import image

from recipes import quickstart

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny_folder(make_tiny, tiny_tokenizer, tmp_path_factory):
    """A tiny random model and its tokenizer, as from_pretrained loads them."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = make_tiny("llama", tied=True, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.1)  # it is the head as well: logits of order one
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_quickstart(tiny_folder, tmp_path, capsys):
    settings = "--sequences 2 --length 64 --windows 2 --eval-length 64 --new-tokens 8 --threads 1".split()
    rows = quickstart.main(["--model", str(tiny_folder), "--output", str(tmp_path / "out"), *settings])

    assert set(rows) == set(quickstart.ORDER)
    assert all(math.isfinite(row.ppl) and row.ppl > 1 for row in rows.values())
    dense, rotated = rows[quickstart.FLOAT], rows[quickstart.FLOAT_PREFIX]
    # the same function but for the prefix; a random model cares little for that
    assert rotated.ppl == pytest.approx(dense.ppl, rel=0.1)
    assert rotated.weight_bytes == dense.weight_bytes
    assert dense.kv_bytes < rotated.kv_bytes < 1.01 * dense.kv_bytes
    for name in (quickstart.STATIC, quickstart.DYNAMIC, quickstart.PREFIXQUANT, quickstart.PREFIXQUANT_A8):
        assert dense.weight_bytes / 4 < rows[name].weight_bytes < dense.weight_bytes / 2
        assert dense.kv_bytes / 4 < rows[name].kv_bytes < dense.kv_bytes / 2

    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if line.startswith(quickstart.ORDER)]
    assert [line[:30].rstrip() for line in lines] == list(quickstart.ORDER)
    assert f"{dense.ppl:.2f}" in lines[0]
    assert any(quickstart.QUESTION in line for line in printed)
    assert any(line.startswith("Reply after") and "Tensors alive" in line for line in printed)

    (picture,) = (tmp_path / "out").iterdir()
    assert picture.name == "outliers.png"
    height, width, _ = image.imread(picture).shape
    assert height >= 600 and width >= 1200


def test_quickstart_says_where_weights_come_from(tmp_path):
    assert quickstart.origin(tmp_path) == tmp_path.name
    (tmp_path / "source.json").write_text('{"kind": "gguf", "quantization": "Q4_1, dequantized"}')
    assert quickstart.origin(tmp_path) == f"{tmp_path.name} (Q4_1, dequantized)"
    (tmp_path / "source.json").write_text('{"kind": "hub", "hub_id": "someone/something"}')
    assert quickstart.origin(tmp_path) == f"{tmp_path.name} (someone/something)"
