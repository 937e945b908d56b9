"""The promise: a checkpoint that an older version wrote loads, and gives the same integers. Never skipped."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import pq_ao
from pq_ao.linears import CalibratedLinear
from tests.checkpoints import tensors

pytestmark = pytest.mark.usefixtures("one_thread")

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module", params=["checkpoint-v1", "checkpoint-v1-spread"])
def folder(request) -> Path:
    return FIXTURES / request.param


@pytest.fixture(scope="module")
def expected(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "expected.safetensors")


@pytest.fixture(scope="module")
def model(folder) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


def test_facts(model, folder):
    assert model.dtype == torch.bfloat16 and model.config.model_type == "qwen3"
    record = model.calibration_record
    assert record.prefix.prefix_ids == (5, 0) and record.rounding == "gptq" and record.config.scheme == "w4a4kv4"
    assert record.config.act_codes == ("spread" if folder.name.endswith("spread") else "even")
    assert pq_ao.memory(model).linear_ratio < 1
    assert "rounding: gptq" in pq_ao.explain(model)


def test_accumulators(model, expected):
    """Of every linear, fused as they are at run time."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, CalibratedLinear)}
    assert len(linears) == 2 * 4
    for name, linear in linears.items():
        x = expected[f"{name}.activation_codes"]
        if f"{name}.inputs" in expected:
            assert torch.equal(linear.quantizers[0].codes(expected[f"{name}.inputs"])[0], x), name
        assert torch.equal(x.int() @ linear.weight.codes().int().T, expected[f"{name}.accumulators"]), name
    assert torch.equal(model.lm_head.weight.qdata.sum(dim=1, dtype=torch.int32), expected["lm_head.codes_sum"])


def test_a_flipped_bit_is_seen(folder, tmp_path):
    """Of these too: they always had the fingerprint."""
    folder = shutil.copytree(folder, tmp_path / "model")
    (path,) = folder.glob("model-*.safetensors")
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path.name}: the tensors are not those that were saved"):
        AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
def test_greedy_tokens(model, expected):
    ids, tokens = expected["input_ids"], expected["greedy_tokens"]
    cache = pq_ao.PrefixStaticCache(model, batch_size=2, max_cache_len=32)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(out[:, ids.shape[1] :], tokens)


def test_saved_by_this_version_it_is_the_same(model, tmp_path):
    pq_ao.save(model, tmp_path)
    again = tensors(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors(model).items())


def test_in_a_process_that_knows_nothing_of_calibration(folder, expected, tmp_path):
    """`import pq_ao` comes first there, imports nothing large, and is all that it takes."""
    folder = shutil.copytree(folder, tmp_path / "model")
    code = (
        "import sys, pq_ao\n"
        "assert not {'torch', 'torchao', 'transformers'} & set(sys.modules)\n"
        "from transformers import AutoModelForCausalLM\n"
        "import torch\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "cache = pq_ao.PrefixStaticCache(model, batch_size=1, max_cache_len=32)\n"
        "ids = torch.tensor([[int(each) for each in sys.argv[2:]]])\n"
        "out = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False, eos_token_id=None)\n"
        "print('TOKENS', *out[0, ids.shape[1]:].tolist())"
    )
    command = [sys.executable, "-c", code, folder, *map(str, expected["input_ids"][0].tolist())]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert out.split("TOKENS")[1].split() == list(map(str, expected["greedy_tokens"][0].tolist()))
