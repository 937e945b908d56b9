"""Folders that are damaged or made to harm: each gives one clear error, and no model."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import pq_ao
from pq_ao import prefixquant_config
from tests.checkpoints import assert_same_model, tiny

pytestmark = pytest.mark.usefixtures("one_thread")

NORM = "model.layers.1.input_layernorm.quantizer"
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, Path]:
    """Whole folders; tests spoil copies."""
    root = tmp_path_factory.mktemp("originals")
    tiny().save_pretrained(root / "single")
    tiny().save_pretrained(root / "sharded", max_shard_size="60KB")
    tiny(seed=1).save_pretrained(root / "other")
    pq_ao.quantize_head_(tiny()).save_pretrained(root / "head")
    tiny(scheme=prefixquant_config(mode="dynamic")).save_pretrained(root / "dynamic")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def single(originals, tmp_path) -> Path:
    return shutil.copytree(originals["single"], tmp_path / "model")


@pytest.fixture
def sharded(originals, tmp_path) -> Path:
    return shutil.copytree(originals["sharded"], tmp_path / "model")


@pytest.fixture
def sharded_copy(originals, tmp_path) -> Path:
    """Beside `single`."""
    return shutil.copytree(originals["sharded"], tmp_path / "sharded")


def change_tensors(folder: Path, change: Callable[[dict], None], file: str = "model.safetensors") -> None:
    path = folder / file
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    change(tensors)
    save_file(tensors, path, metadata)


def change_config(folder: Path, change: Callable[[dict, dict], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"], config)
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder: Path, match: str, **arguments) -> None:
    with pytest.raises(ValueError, match=match):
        AutoModelForCausalLM.from_pretrained(folder, **arguments)


def test_the_originals_load(originals):
    assert_same_model(AutoModelForCausalLM.from_pretrained(originals["single"]), tiny())
    assert_same_model(AutoModelForCausalLM.from_pretrained(originals["sharded"]), tiny())


class TestFiles:
    @pytest.mark.parametrize("length", [0, 4, 8, 100, 20_000, -1])
    def test_truncated(self, single, length):
        path = single / "model.safetensors"
        path.write_bytes(path.read_bytes()[:length])
        refused(single, r"model\.safetensors: is missing, cut short or no safetensors file.*save the model again")

    def test_truncated_shard(self, sharded):
        path = sorted(sharded.glob("*.safetensors"))[2]
        path.write_bytes(path.read_bytes()[:-100])
        refused(sharded, f"{path.name}: is missing, cut short")

    def test_missing_shard(self, sharded):
        path = sorted(sharded.glob("*.safetensors"))[1]
        path.unlink()
        refused(sharded, f"{path.name}: is missing, cut short")

    @pytest.mark.parametrize("length", [2**63, 2**40, 2**31, 200_000_000])
    def test_huge_header(self, single, length):
        path = single / "model.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
        refused(single, r"model\.safetensors: is missing, cut short or no safetensors file")

    def test_offsets_behind_the_end(self, single):
        path = single / "model.safetensors"
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        header[f"{QUERY}.weight"]["data_offsets"][1] += 10**9
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
        refused(single, r"model\.safetensors: is missing, cut short or no safetensors file")

    def test_an_index_that_points_outside(self, sharded):
        outside = sharded.parent / "outside.safetensors"
        first = sorted(sharded.glob("*.safetensors"))[0]
        first.rename(outside)
        index = sharded / "model.safetensors.index.json"
        index.write_text(index.read_text().replace(first.name, f"../{outside.name}"))
        refused(sharded, r"outside\.safetensors: the index of .* points to a file outside of it")
        index.write_text(index.read_text().replace(f"../{outside.name}", str(outside)))
        refused(sharded, "points to a file outside of it")

    def test_a_config_that_points_outside(self, single):
        (single / "model.safetensors").rename(single.parent / "outside.safetensors")
        change_config(single, lambda _, config: config.update(transformers_weights="../outside.safetensors"))
        refused(single, "must reference a file inside the model directory")

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
    def test_pickle_is_never_executed(self, single, name):
        marker = single.parent / "executed"

        class Harm:
            def __reduce__(self):
                return (Path.touch, (marker,))

        (single / "model.safetensors").unlink()
        (single / name).write_bytes(pickle.dumps(Harm()))
        refused(single, rf"{name}: is (not a safetensors file|missing, cut short or no safetensors file)")
        refused(single, "weights_only=False", weights_only=False)
        assert not marker.exists()

    def test_files_of_two_saves(self, originals, single):
        shutil.copy(originals["other"] / "model.safetensors", single)
        refused(single, r"model\.safetensors: belongs to another save than config\.json.*into an empty one")

    def test_one_shard_of_another_save(self, originals, sharded, tmp_path):
        tiny(seed=1).save_pretrained(tmp_path / "other", max_shard_size="60KB")
        name = sorted(path.name for path in sharded.glob("*.safetensors"))[1]
        shutil.copy(tmp_path / "other" / name, sharded)
        refused(sharded, f"{name}: belongs to another save")

    def test_a_stale_single_file_before_new_shards(self, originals, single):
        """transformers leaves it there and reads it first."""
        tiny(seed=1).save_pretrained(single, max_shard_size="60KB")
        assert (single / "model.safetensors").exists()
        refused(single, r"model\.safetensors: belongs to another save")

    def test_weights_of_the_unquantized_model(self, single, make_tiny, tmp_path):
        make_tiny("llama").save_pretrained(tmp_path / "plain")
        shutil.copy(tmp_path / "plain" / "model.safetensors", single)
        refused(single, "belongs to another save")


def drop(name: str):
    return lambda tensors: tensors.pop(name)


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]):
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


class TestTensors:
    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (
                drop(f"{QUERY}.weight"),
                r"model\.safetensors: tensor 'model.layers.0.self_attn.q_proj.weight' is missing",
            ),
            (drop(f"{QUERY}.bias"), "q_proj.bias' is missing"),
            (drop(f"{NORM}.scale"), "input_layernorm.quantizer.scale' is missing"),
            (drop("lm_head.weight"), "lm_head.weight' is missing"),
            (drop("model.layers.0.self_attn.prefix_k"), "prefix_k' is missing"),
            (
                lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(1)}),
                "up_proj.weight' is unknown to",
            ),
            (lambda t: t.update({f"{QUERY}.weight.qdata": torch.zeros(1)}), "q_proj.weight.qdata' is unknown"),
            (lambda t: t.update({f"{NORM}.clip": torch.ones(1)}), "quantizer.clip' is unknown"),
            (put(f"{QUERY}.weight", lambda w: w[:-2]), r"is U8 \[94, 48\]; this config.json asks for uint8 \[96, 48\]"),
            (put(f"{QUERY}.weight", lambda w: w.T), r"q_proj.weight' is U8 \[48, 96\]"),
            (put(f"{QUERY}.weight", lambda w: w.view(torch.int8)), "q_proj.weight' is I8"),
            (put(f"{QUERY}.weight", lambda w: w.float()), "q_proj.weight' is F32"),
            (put(f"{QUERY}.weight_scale", lambda s: s.double()), "q_proj.weight_scale' is F64"),
            (put(f"{QUERY}.weight_scale", lambda s: s.bfloat16()), "q_proj.weight_scale' is BF16"),
            (put("model.embed_tokens.weight", lambda w: w.half()), "embed_tokens.weight' is F16"),
            (put("model.layers.0.self_attn.prefix_k", lambda p: p[:, :1]), "the prefix does not fit the model"),
            (put("model.layers.0.self_attn.prefix_v", lambda p: p[:1]), "the prefix does not fit the model"),
        ],
    )
    def test_names_shapes_and_dtypes(self, single, change, match):
        change_tensors(single, change)
        refused(single, match)
        refused(single, match, ignore_mismatched_sizes=True)

    @pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), -0.0])
    @pytest.mark.parametrize(
        "name",
        [
            f"{QUERY}.weight_scale",
            f"{NORM}.scale",
            "model.layers.0.self_attn.o_in.scale",
            "model.layers.0.self_attn.kv.key_scale",
            "model.layers.1.self_attn.kv.value_scale",
        ],
    )
    def test_scales(self, single, name, bad):
        def spoil(scale: torch.Tensor) -> torch.Tensor:
            scale[-1] = bad
            return scale

        change_tensors(single, put(name, spoil))
        kind = "is not above zero" if abs(bad) <= 1 else "NaN or Inf"
        refused(single, rf"model\.safetensors: tensor '{name}' holds .*{kind}.*restore the file")

    @pytest.mark.parametrize("bad", [0.0, float("nan")])
    def test_clip_factors(self, originals, tmp_path, bad):
        folder = shutil.copytree(originals["dynamic"], tmp_path / "model")
        change_tensors(folder, put(f"{NORM}.clip", lambda clip: torch.full_like(clip, bad)))
        refused(folder, "quantizer.clip' holds")

    def test_scale_of_the_head(self, originals, tmp_path):
        folder = shutil.copytree(originals["head"], tmp_path / "model")
        change_tensors(folder, put("lm_head.weight_scale", torch.zeros_like))
        refused(folder, "lm_head.weight_scale' holds a value that is not above zero")

    @pytest.mark.parametrize(
        "name",
        [
            f"{QUERY}.bias",
            f"{NORM}.shift",
            "model.layers.0.self_attn.prefix_k",
            "model.layers.1.self_attn.kv.value_shift",
            "model.embed_tokens.weight",
            "model.norm.weight",
        ],
    )
    def test_other_numbers(self, single, name):
        def spoil(tensor: torch.Tensor) -> torch.Tensor:
            tensor.view(-1)[-1] = float("nan")
            return tensor

        change_tensors(single, put(name, spoil))
        refused(single, rf"tensor '{name}' holds NaN or Inf")

    @pytest.mark.parametrize(
        "name",
        [
            f"{QUERY}.weight",
            f"{QUERY}.weight_scale",
            f"{QUERY}.bias",
            f"{NORM}.shift",
            "model.layers.0.self_attn.prefix_v",
            "model.embed_tokens.weight",
        ],
    )
    def test_a_flipped_bit(self, single, sharded_copy, name):
        """The last of a mantissa, or one of a code: a number like any other."""
        for folder in (single, sharded_copy):
            path = next(path for path in folder.glob("*.safetensors") if name in load_file(path))
            content = bytearray(path.read_bytes())
            start = 8 + int.from_bytes(content[:8], "little")
            begin, end = json.loads(content[8:start])[name]["data_offsets"]
            content[start + (begin + end) // 8 * 4] ^= 1
            path.write_bytes(content)
            refused(folder, rf"{path.name}.*: the tensors are not those that were saved .*Copy the checkpoint again")

    def test_two_tensors_in_each_other_s_place(self, single):
        names = [f"model.layers.{index}.mlp.up_proj.weight" for index in range(2)]
        change_tensors(
            single, lambda tensors: tensors.update(zip(names, [tensors[name] for name in names[::-1]], strict=True))
        )
        refused(single, "are not those that were saved")

    def test_a_tensor_in_two_shards(self, sharded):
        first, second = sorted(path.name for path in sharded.glob("*.safetensors"))[:2]
        name, tensor = next(iter(load_file(sharded / first).items()))
        change_tensors(sharded, lambda tensors: tensors.update({name: tensor}), second)
        refused(sharded, f"tensor '{name}' is in .*{first} as well")

    def test_tensors_that_are_handed_in(self, single):
        """transformers would draw those that are missing at random."""
        config = AutoConfig.from_pretrained(single)
        with pytest.raises(ValueError, match="state_dict: .* is loaded from its folder only"):
            LlamaForCausalLM.from_pretrained(None, config=config, state_dict={"lm_head.weight": torch.zeros(300, 96)})


class TestConfig:
    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"format_version": 2}, "format_version=2 is newer than this pq_ao, which reads 1; update pq_ao"),
            ({"format_version": 0}, "format_version=0 is unknown"),
            ({"format_version": "1"}, "format_version='1' is unknown"),
            ({"format_version": True}, "format_version=True is unknown"),
            ({"bits": 3}, "has unknown fields bits"),
            ({"dtype": "float8_e4m3fn"}, "dtype='float8_e4m3fn': must be one of"),
            ({"dtype": "__class__"}, "dtype='__class__': must be one of"),
            ({"dtype": "bfloat16"}, "this checkpoint is in torch.bfloat16.*restore config.json"),
            ({"head_bits": 4}, "head_bits=4: must be 8 or 16"),
            ({"head_bits": 8}, "lm_head.weight' is F32"),
            ({"untied_head": False}, "untied_head=False: must be True"),
            ({"prefix_tokens": -1}, "prefix_tokens=-1: must be a whole number"),
            ({"prefix_tokens": 3}, r"prefix_k' is F32 \[2, 2, 24\]; this config.json asks for float32 \[2, 3, 24\]"),
            ({"prefix_tokens": 10**12}, "prefix_k'"),
            ({"prefix_ids": [5]}, "prefix_ids names 1 tokens and prefix_tokens says 2"),
            ({"prefix_ids": [5, 300]}, "prefix_ids: 300 does not fit the model, whose vocab_size is 300"),
            ({"prefix_ids": [5, -1]}, "must be a list of token ids"),
            ({"prefix_ids": [5, 1.5]}, "must be a list of token ids"),
            ({"prefix_ids": "BOS"}, "must be a list of token ids"),
            ({"tensors_sha256": "0" * 64}, "belongs to another save"),
            ({"tensors_sha256": None}, "tensors_sha256=None: must be 64 hexadecimal digits"),
            ({"calibration": []}, "calibration=.*: must be an object, or null"),
            ({"calibration": {"data": "x"}}, "calibration: missing or unknown fields: finetune"),
            ({"scheme": None}, "scheme=None"),
            ({"scheme": {}}, r"scheme has the fields \[\] instead of"),
        ],
    )
    def test_fields(self, single, change, match):
        change_config(single, lambda quantization, _: quantization.update(change))
        refused(single, match)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"weight_bits": 3}, "weight_bits=3 is not supported"),
            ({"weight_bits": 8, "act_bits": 8, "act_codes": "even"}, "weight' is U8"),
            ({"kv_bits": 16}, "kv.key_scale' is unknown"),
            ({"mode": "dynamic", "act_codes": "even"}, "scale' is unknown"),
            ({"mode": "dynamic"}, "act_codes='spread' with act_bits=4, mode='dynamic'"),
            ({"mode": "__import__('os')"}, "mode=.*is not supported"),
            ({"version": 2}, "version=2 is not supported"),
            ({"prefix": False}, "prefix_tokens=2 although the scheme has no prefix"),
            ({"group_size": 128}, "scheme has the fields"),
        ],
    )
    def test_scheme(self, single, change, match):
        change_config(single, lambda quantization, _: quantization["scheme"].update(change))
        refused(single, match)

    @pytest.mark.parametrize(
        "name", ["format_version", "scheme", "dtype", "prefix_tokens", "prefix_ids", "calibration"]
    )
    def test_missing(self, single, name):
        change_config(single, lambda quantization, _: quantization.pop(name))
        refused(single, f"lacks {name}|format_version=None is unknown")

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"tie_word_embeddings": True}, "tie_word_embeddings=true, but a rotated model has a head of its own"),
            ({"num_hidden_layers": 1}, "tensor 'model.layers.1.*' is unknown"),
            ({"num_hidden_layers": 3}, "tensor 'model.layers.2.*' is missing"),
            ({"num_key_value_heads": 4}, "_proj.*this config.json asks for"),
            ({"hidden_size": 48}, "this config.json asks for"),
            ({"vocab_size": 301}, "(embed_tokens|lm_head).*asks for"),
            ({"dtype": "float16"}, "dtype=torch.float16: this checkpoint is in torch.float32"),
            ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type='dynamic'"),
        ],
    )
    def test_of_the_model(self, single, change, match):
        change_config(single, lambda _, config: config.update(change))
        refused(single, match)

    def test_another_family(self, single):
        change_config(single, lambda _, config: config.update(model_type="gpt2", architectures=["GPT2LMHeadModel"]))
        refused(single, "gpt2.*(learned absolute positions|is not supported)")

    def test_calibration_of_a_wrong_type(self, single):
        prefix = {"rule_ids": None, "ratios_before": {}, "ratios_after": {}, "threshold": 64.0}
        calibration = {
            "data": "embedded",
            "num_sequences": 2,
            "sequence_length": 32,
            "rounding": "nearest",
            "search": "none",
            "finetune": None,
            "seed": 0,
            "seconds": 1.0,
            "prefix_seconds": 0.5,
            "prefix": prefix,
        }
        change_config(single, lambda quantization, _: quantization.update(calibration=calibration))
        assert AutoModelForCausalLM.from_pretrained(single).calibration_record.seconds == 1.0
        for wrong in ({"seed": "0"}, {"data": None}, {"finetune": {"epochs": 1}}, {"prefix": {}}, {"extra": 1}):
            change_config(single, lambda quantization, _, w=wrong: quantization.update(calibration=calibration | w))
            refused(single, "quantization_config: calibration")
