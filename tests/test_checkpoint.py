"""Saving and loading: the same integers and bitwise the same logits, by way of every kind of file."""

import copy
import filecmp
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torchao.quantization import quantize_
from transformers import AutoModel, AutoModelForCausalLM

import pq_ao
from benchmarks.loading import FloatSizes
from pq_ao import prefixquant_config
from pq_ao.modules import attention_modules, path_switches
from pq_ao.quantizers import Path as Arithmetic
from tests.checkpoints import IDS, assert_same_model, logits, tensors, tiny

pytestmark = pytest.mark.usefixtures("one_thread")

MAPS = Path("/proc/self/maps")

MODELS = {
    "llama": lambda seed: tiny(seed=seed),
    "granite with multipliers": lambda seed: tiny("granite", seed=seed),
    "phi3 with fused linears": lambda seed: tiny("phi3", seed=seed),
    "qwen2 with biases": lambda seed: tiny("qwen2", seed=seed),
    "qwen3": lambda seed: tiny("qwen3", seed=seed),
    "smollm3 with a layer without RoPE": lambda seed: tiny("smollm3", seed=seed),
    "tied embeddings": lambda seed: tiny(tie_word_embeddings=True, seed=seed),
    "int8 head": lambda seed: pq_ao.quantize_head_(tiny(seed=seed)),
    "dynamic": lambda seed: tiny(scheme=prefixquant_config(mode="dynamic"), seed=seed),
    "w4a8kv4": lambda seed: tiny(scheme="w4a8kv4", seed=seed),
    "w8a8kv8": lambda seed: tiny(scheme="w8a8kv8", seed=seed),
    "w4a4kv16": lambda seed: tiny(scheme="w4a4kv16", seed=seed),
    "no prefix": lambda seed: tiny(scheme=prefixquant_config(prefix=False), prefix_tokens=0, seed=seed),
    "no rotation": lambda seed: tiny(scheme=prefixquant_config(rotation=False), seed=seed),
    "bfloat16": lambda seed: tiny(dtype=torch.bfloat16, seed=seed),
    "float16": lambda seed: tiny("qwen3", dtype=torch.float16, seed=seed),
}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("kind", MODELS)
class TestRoundTrip:
    @pytest.mark.parametrize("shard_size", ["50GB", "60KB"])
    @pytest.mark.parametrize("how", ["save_pretrained", "save"])
    def test_folder(self, tmp_path, kind, how, shard_size):
        model = MODELS[kind](0)
        if how == "save":
            pq_ao.save(model, tmp_path, max_shard_size=shard_size)
        else:
            model.save_pretrained(tmp_path, max_shard_size=shard_size)
        assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size != "50GB")
        assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path), model)

    def test_state_dict(self, tmp_path, kind):
        source, target = MODELS[kind](0), MODELS[kind](1)
        torch.save(source.state_dict(), tmp_path / "model.pt")
        target.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
        assert_same_model(target, source)

    def test_saved_again_gives_the_same_bytes(self, tmp_path, kind):
        first, second = tmp_path / "model", tmp_path / "again" / "model"
        pq_ao.save(MODELS[kind](0), first, max_shard_size="60KB")
        pq_ao.save(AutoModelForCausalLM.from_pretrained(first), second, max_shard_size="60KB")
        names = sorted(os.listdir(first))
        assert names == sorted(os.listdir(second))
        names.remove("README.md")  # the second is called after the folder that it was loaded from
        assert filecmp.cmpfiles(first, second, names, shallow=False) == (names, [], [])


@pytest.fixture(scope="module")
def calibrated(make_tiny, tiny_tokenizer, english):
    """Calibrated, not quantized; tests copy it."""
    model = make_tiny("qwen2", tied=True)
    pq_ao.calibrate(
        model,
        tiny_tokenizer,
        prefixquant_config(),
        data=english,
        num_sequences=2,
        sequence_length=32,
        prefix_ids=(5, 0),
        search="none",
        finetune=pq_ao.FinetuneConfig(epochs=1, validation_sequences=2),
        progress=False,
    )
    return model


@pytest.fixture
def quantized(calibrated):
    model = copy.deepcopy(calibrated)
    quantize_(model, prefixquant_config())
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of a saved model in bfloat16."""
    folder = tmp_path_factory.mktemp("bfloat16")
    tiny(dtype=torch.bfloat16).save_pretrained(folder)
    return folder


class TestCalibrated:
    def test_not_quantized_yet(self, calibrated, tmp_path):
        for save in (calibrated.save_pretrained, lambda folder: pq_ao.save(calibrated, folder)):
            with pytest.raises(ValueError, match=r"calibrated but not quantized(.|\n)*quantize_\(model, config\)"):
                save(tmp_path / "folder")
        assert not list(tmp_path.rglob("*.json"))

    def test_round_trip_with_its_record(self, quantized, tmp_path):
        quantized.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert_same_model(loaded, quantized)
        record, known = loaded.calibration_record, quantized.calibration_record
        for name in ("config", "data", "num_sequences", "sequence_length", "rounding", "search", "finetune", "seed"):
            assert getattr(record, name) == getattr(known, name), name
        assert record.prefix.prefix_ids == (5, 0) and record.prefix.ratios_after == known.prefix.ratios_after
        assert record.seconds == known.seconds
        assert "prefix_ids: [5, 0]" in pq_ao.explain(loaded) and "seed: 0" in pq_ao.explain(loaded)
        facts = json.loads((tmp_path / "config.json").read_text())
        assert facts["quantization_config"]["prefix_ids"] == [5, 0] and facts["tie_word_embeddings"] is False

    def test_it_cannot_be_calibrated_or_quantized_again(self, quantized, tiny_tokenizer, tmp_path):
        quantized.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="calibrated already"):
            pq_ao.calibrate(loaded, tiny_tokenizer)
        with pytest.raises(ValueError, match="quantized already"):
            quantize_(loaded, prefixquant_config())

    def test_state_dict_into_an_unquantized_model(self, calibrated, quantized):
        with pytest.raises(RuntimeError, match=r"is quantized.*quantize_\(model, config\)"):
            calibrated.load_state_dict(quantized.state_dict())


class TestFormat:
    @pytest.mark.parametrize("family", ["llama", "qwen3"])
    def test_original_names(self, tmp_path, family):
        model = tiny(family)
        model.save_pretrained(tmp_path)
        found = stored(tmp_path)
        layer = "model.layers.1."
        linears = {
            "self_attn.q_proj": (96, 96),
            "self_attn.k_proj": (48, 96),
            "self_attn.v_proj": (48, 96),
            "self_attn.o_proj": (96, 96),
            "mlp.gate_proj": (160, 96),
            "mlp.up_proj": (160, 96),
            "mlp.down_proj": (96, 160),
        }
        for name, (rows, columns) in linears.items():
            weight, scale, bias = (found[f"{layer}{name}.{kind}"] for kind in ("weight", "weight_scale", "bias"))
            assert weight.shape == (rows, columns // 2) and weight.dtype == torch.uint8
            assert scale.shape == bias.shape == (rows,) and scale.dtype == bias.dtype == torch.float32
        fused = attention_modules(model)[1].qkv_proj.weight
        parts = [found[f"{layer}self_attn.{name}_proj.weight"] for name in "qkv"]
        assert torch.equal(torch.cat(parts), fused.qdata)
        assert not any(word in name for name in found for word in ("qkv", "gate_up", "query_norm", "packed", "_base"))
        assert (f"{layer}self_attn.q_norm.weight" in found) == (family == "qwen3")
        assert found[f"{layer}self_attn.prefix_k"].shape == (2, 2, 24)

    def test_linears_that_the_family_keeps_fused_stay_so(self, tmp_path):
        model = tiny("phi3")
        model.save_pretrained(tmp_path)
        found, layer = stored(tmp_path), "model.layers.1."
        for name, rows in (("self_attn.qkv_proj", 192), ("mlp.gate_up_proj", 320)):
            assert torch.equal(found[f"{layer}{name}.weight"], model.get_parameter(f"{layer}{name}.weight").qdata)
            assert found[f"{layer}{name}.weight"].shape == (rows, 48)
        assert not any(f".{part}_proj." in name for name in found for part in ("q", "k", "v", "gate", "up"))

    def test_files_name_the_remedy_and_hold_no_pickle(self, tmp_path):
        pq_ao.save(tiny(), tmp_path)
        assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors", ".md"}
        with safe_open(next(tmp_path.glob("*.safetensors")), "pt") as file:
            assert file.metadata()["pq_ao"] == "import pq_ao before from_pretrained"

    def test_bytes_of_smollm2s_shape(self, tmp_path):
        shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
        model = tiny(head_dim=64, num_hidden_layers=1, dtype=torch.bfloat16, **shape)
        model.save_pretrained(tmp_path)
        found = {name: tensor for name, tensor in stored(tmp_path).items() if ".layers." in name}
        dense = 2 * (576 * 576 * 2 + 192 * 576 * 2 + 1536 * 576 * 3)
        assert sum(tensor.nbytes for tensor in found.values()) <= 0.27 * dense  # shifts, prefix and all

    def test_config_of_the_model_in_memory_is_the_one_on_disk(self, tmp_path):
        model = tiny()
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
        assert model.config.quantization_config.to_dict() == config
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.config.quantization_config.to_dict() == config

    def test_the_head_may_be_rounded_after_loading(self, tmp_path):
        tiny().save_pretrained(tmp_path)
        loaded = pq_ao.quantize_head_(AutoModelForCausalLM.from_pretrained(tmp_path))
        loaded.save_pretrained(tmp_path)
        assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path), loaded)


class TestLoading:
    @pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}])
    def test_device_map(self, folder, device_map):
        loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
        if loaded.device.type == "cpu":
            assert_same_model(loaded, tiny(dtype=torch.bfloat16))
        assert {module.path for module in path_switches(loaded)} == {Arithmetic.INTEGER}

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    def test_on_a_gpu(self, folder):
        loaded = AutoModelForCausalLM.from_pretrained(folder, device_map="cuda")
        expected = tensors(tiny(dtype=torch.bfloat16))
        assert {tensor.device.type for tensor in tensors(loaded).values()} == {"cuda"}
        assert all(torch.equal(tensor.cpu(), expected[name]) for name, tensor in tensors(loaded).items())

    @pytest.mark.parametrize("device_map", [{"model": "cpu", "lm_head": "disk"}, {"model": 0, "lm_head": "cpu"}])
    def test_several_devices_are_refused(self, folder, device_map):
        with pytest.raises(ValueError, match="device_map.*on one device"):
            AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)

    @pytest.mark.parametrize("dtype", ["auto", None, torch.bfloat16, "bfloat16"])
    def test_the_saved_dtype(self, folder, dtype):
        assert AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).dtype == torch.bfloat16

    @pytest.mark.parametrize("dtype", [torch.float16, "float32"])
    def test_another_dtype(self, folder, dtype):
        with pytest.raises(ValueError, match=r"this checkpoint is in torch.bfloat16.*Leave `dtype` out"):
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    def test_conversions_still_raise(self, folder):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        for convert in (loaded.half, loaded.float, lambda: loaded.to(torch.float16), loaded.model.half):
            with pytest.raises(ValueError):
                convert()
        assert loaded.dtype == torch.bfloat16

    def test_nothing_is_unpickled(self, folder):
        with pytest.raises(ValueError, match="weights_only=False"):
            AutoModelForCausalLM.from_pretrained(folder, weights_only=False)

    def test_without_a_head(self, folder):
        with pytest.raises(ValueError, match="no language-model head.*AutoModelForCausalLM"):
            AutoModel.from_pretrained(folder)

    def test_default_dtype_of_torch_does_not_matter(self, folder):
        torch.set_default_dtype(torch.float64)
        try:
            loaded = AutoModelForCausalLM.from_pretrained(folder)
        finally:
            torch.set_default_dtype(torch.float32)
        assert_same_model(loaded, tiny(dtype=torch.bfloat16))

    def test_the_model_does_not_hang_on_its_files(self, folder, tmp_path):
        """On the CPU safetensors gives views of the mapped file."""
        tiny(dtype=torch.bfloat16).save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        expected = logits(loaded)
        (path,) = tmp_path.glob("*.safetensors")
        with path.open("rb+") as file:
            file.write(bytes(path.stat().st_size))
        assert torch.equal(logits(loaded), expected)
        if MAPS.exists():
            assert str(path) not in MAPS.read_text()
        loaded.save_pretrained(tmp_path)  # into the folder that it came from
        assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path), loaded)

    @torch.no_grad()
    def test_generation(self, folder):
        model, loaded = tiny(dtype=torch.bfloat16), AutoModelForCausalLM.from_pretrained(folder)
        prompt = IDS[:1]
        texts = []
        for each in (model, loaded):
            cache = pq_ao.PrefixStaticCache(each, batch_size=1, max_cache_len=64)
            options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
            texts.append(each.generate(prompt, past_key_values=cache, **options))
            engine = pq_ao.GenerationEngine(each, batch_size=1, max_cache_len=64, compile=False)
            texts.append(engine.generate(prompt, max_new_tokens=12))
        assert torch.equal(texts[0], texts[2]) and torch.equal(texts[1], texts[3])
        assert texts[0].shape[1] > prompt.shape[1]


class TestMemory:
    def test_no_float_weight_of_a_quantized_linear(self, tmp_path, monkeypatch):
        """Every tensor that loading makes is seen, for it loads in this thread."""
        monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
        tiny(dtype=torch.bfloat16).save_pretrained(tmp_path)
        with FloatSizes() as seen:
            AutoModelForCausalLM.from_pretrained(tmp_path)
        smallest_linear = 48 * 96
        assert {size for size in seen.sizes if size >= smallest_linear} == {300 * 96}  # embedding and head

    @pytest.mark.slow
    @pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
    def test_peak(self, tmp_path):
        """In a process of its own: the peak stays below what the weights alone would take in bfloat16."""
        shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 8}
        scheme = prefixquant_config(rotation=False)  # made faster
        tiny(scheme=scheme, head_dim=128, num_hidden_layers=4, dtype=torch.bfloat16, **shape).save_pretrained(tmp_path)
        code = (
            "import sys, pq_ao, torch; from transformers import AutoModelForCausalLM\n"
            "from pq_ao.checkpoint import record, skeleton; from transformers import LlamaForCausalLM\n"
            "def kib(key): return int(next(l for l in open('/proc/self/status') if l.startswith(key)).split()[1])\n"
            "before = kib('VmRSS'); AutoModelForCausalLM.from_pretrained(sys.argv[1]); print(kib('VmHWM') - before)"
        )
        out = subprocess.run([sys.executable, "-c", code, tmp_path], check=True, capture_output=True, text=True).stdout
        peak = int(out.split()[-1]) * 1024
        dense = 2 * 4 * (4 * 1024 * 1024 + 3 * 1024 * 4096)
        print(f"peak {peak / dense:.2f} of the bfloat16 weights")
        assert peak < 0.75 * dense  # the file's pages and the tensors are 0.26 each


@pytest.mark.slow
def test_without_pq_ao_transformers_stops_instead_of_computing_nonsense(tmp_path):
    for scheme in ("w4a4kv4", "w8a8kv8"):
        tiny(scheme=scheme).save_pretrained(tmp_path / scheme)
    code = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        "for folder in sys.argv[1:]:\n"
        "    try: AutoModelForCausalLM.from_pretrained(folder)\n"
        "    except RuntimeError as error: print('STOPPED', error)"
    )
    folders = sorted(tmp_path.iterdir())
    run = subprocess.run([sys.executable, "-c", code, *folders], check=True, capture_output=True, text=True)
    assert len(re.findall("STOPPED.*ize", run.stdout)) == 2
    assert "Unknown quantization type, got prefixquant" in run.stderr
