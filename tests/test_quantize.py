"""torchao's `quantize_` packs what calibration decided, and nothing else; a calibrated model keeps its dtype."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torchao.quantization import FqnToConfig, quantize_
from torchao.utils import get_model_size_in_bytes

import pq_ao
from pq_ao import PrefixQuantConfig, prefixquant_config
from pq_ao.linears import CalibratedLinear
from pq_ao.modules import path_switches
from pq_ao.quantizers import Path
from pq_ao.tensors import PackedWeight

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::pq_ao.attention.UnpackedCacheWarning"),
]

IDS = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(0))
MISSING_LINE = r"pq_ao\.calibrate\(model, tokenizer, config\)"


@pytest.fixture(scope="module")
def calibrated(make_tiny, tiny_tokenizer, english):
    """`calibrated(config, family="llama", **make_tiny_arguments)`: a fresh copy of a calibrated model."""
    made = {}

    def make(config: PrefixQuantConfig | None = None, family: str = "llama", **arguments):
        config = config or prefixquant_config()
        key = repr((config, family, sorted(arguments.items())))
        if key not in made:
            model = make_tiny(family, **arguments)
            pq_ao.calibrate(
                model,
                tiny_tokenizer,
                config,
                data=english,
                num_sequences=2,
                sequence_length=32,
                search="none",
                prefix_ids=(5, 0) if config.prefix else None,
                progress=False,
            )
            made[key] = model
        return copy.deepcopy(made[key])

    return make


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def linears(model) -> dict[str, CalibratedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, CalibratedLinear)}


def tensors(model) -> dict[str, torch.Tensor]:
    """Parameters and buffers, those that are not saved as well."""
    return dict([*model.named_parameters(), *model.named_buffers()])


def plain(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensor itself, or what a packed one holds."""
    return [tensor.qdata, tensor.scale] if isinstance(tensor, PackedWeight) else [tensor]


def snapshot(model) -> dict[str, tuple]:
    return {
        name: (type(tensor), tensor.dtype, [(part.dtype, part.clone()) for part in plain(tensor)])
        for name, tensor in tensors(model).items()
    }


def assert_same(model, before: dict[str, tuple]) -> None:
    """Every parameter and buffer has its type, dtype, inner dtypes and numbers."""
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, (kind, dtype, parts) in before.items():
        assert after[name][:2] == (kind, dtype), name
        for (old_dtype, old), (new_dtype, new) in zip(parts, after[name][2], strict=True):
            assert new_dtype == old_dtype, name
            assert torch.equal(old, new), name


SCHEMES = [
    prefixquant_config("w4a4kv4"),
    prefixquant_config("w4a8kv4", mode="dynamic"),
    prefixquant_config("w8a8kv8", prefix=False),
    prefixquant_config("w4a4kv16", rotation=False),
]


class TestPacking:
    @pytest.mark.parametrize("config", SCHEMES, ids=lambda config: f"{config.scheme}-{config.mode}")
    @pytest.mark.parametrize("family", ["llama", "qwen2"])
    def test_codes_and_bias_are_those_of_calibration(self, calibrated, config, family):
        model = calibrated(config, family)
        before = {
            name: (linear.packed.codes().clone(), linear.packed.scale.clone(), copy.deepcopy(linear.packed_bias))
            for name, linear in linears(model).items()
        }
        assert len(before) == 2 * 4
        assert quantize_(model, config) is None
        for name, linear in linears(model).items():
            codes, scale, bias = before[name]
            assert isinstance(linear.weight, nn.Parameter) and isinstance(linear.weight, PackedWeight)
            assert linear.weight.bits == config.weight_bits
            assert torch.equal(linear.weight.codes(), codes)
            assert torch.equal(linear.weight.scale, scale)
            assert linear.weight.shape == (linear.out_features, linear.in_features) == codes.shape
            assert (linear.bias is None) == (bias is None)
            assert bias is None or (torch.equal(linear.bias, bias) and linear.bias.dtype == torch.float32)
            assert linear.packed is None and linear.packed_bias is None
            assert not linear.weight.requires_grad

    def test_everything_goes_over_to_integers(self, calibrated):
        model = calibrated()
        assert {module.path for module in path_switches(model)} == {Path.FLOAT}
        quantize_(model, prefixquant_config())
        assert {module.path for module in path_switches(model)} == {Path.INTEGER}

    @pytest.mark.parametrize("family, tied", [("llama", False), ("qwen3", True)])
    def test_embedding_and_head_are_untouched(self, calibrated, family, tied):
        model = calibrated(family=family, tied=tied)
        kept = model.model.embed_tokens, model.lm_head
        weights = [module.weight.clone() for module in kept]
        quantize_(model, prefixquant_config())
        assert (model.model.embed_tokens, model.lm_head) == kept
        for module, weight in zip(kept, weights, strict=True):
            assert not isinstance(module.weight, PackedWeight)
            assert torch.equal(module.weight, weight)

    @pytest.mark.parametrize("config", SCHEMES, ids=lambda config: f"{config.scheme}-{config.mode}")
    def test_computes_what_the_reference_path_says(self, calibrated, config):
        """The reference path is the same in float32: measured 130 dB, but each 4-bit code that flips costs much."""
        model = calibrated(config)
        with pq_ao.reference_path(model):
            expected = logits(model)
        quantize_(model, config)
        got = logits(model)
        sqnr = 20 * torch.log10(expected.norm() / (expected - got).norm())
        assert sqnr >= 30
        assert not torch.equal(logits(calibrated(config)), got)

    def test_bfloat16_model(self, calibrated):
        model = calibrated(dtype=torch.bfloat16)
        quantize_(model, prefixquant_config())
        assert {linear.weight.dtype for linear in linears(model).values()} == {torch.bfloat16}
        assert logits(model).dtype == torch.bfloat16
        assert torch.isfinite(logits(model)).all()

    def test_no_float_copy_survives(self, calibrated):
        model = calibrated()
        floats = [weakref.ref(linear.weight) for linear in linears(model).values()]
        quantize_(model, prefixquant_config())
        gc.collect()
        assert all(reference() is None for reference in floats)
        smallest = min(linear.weight.numel() for linear in linears(model).values())
        large = {
            name: tensor
            for module_name, module in model.named_modules()
            for name, tensor in ((f"{module_name}.{key}", value) for key, value in vars(module).items())
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= smallest
        } | {name: tensor for name, tensor in tensors(model).items() if tensor.numel() >= smallest}
        unpacked = {name for name, tensor in large.items() if not isinstance(tensor, PackedWeight)}
        assert unpacked == {"model.embed_tokens.weight", "lm_head.weight"}

    def test_size(self, calibrated):
        model = calibrated(dtype=torch.bfloat16)
        weights = sum(linear.weight.numel() for linear in linears(model).values())
        rows = sum(linear.out_features for linear in linears(model).values())
        before = get_model_size_in_bytes(model)
        codes = sum(linear.packed.qdata.nbytes for linear in linears(model).values())
        quantize_(model, prefixquant_config())
        assert codes == weights // 2
        # bfloat16 weights go; codes, their scales and the corrected bias were there already
        assert before - get_model_size_in_bytes(model) == 2 * weights
        assert sum(linear.weight.scale.nbytes for linear in linears(model).values()) == 4 * rows


class TestRefused:
    def test_a_model_that_was_never_calibrated(self, make_tiny):
        model = make_tiny("llama")
        before = snapshot(model)
        with pytest.raises(ValueError, match=f"not calibrated(.|\n)*{MISSING_LINE}"):
            quantize_(model, prefixquant_config())
        assert_same(model, before)

    def test_a_model_that_was_only_rotated(self, make_tiny):
        model = pq_ao.rotate_(make_tiny("llama"), prefixquant_config())
        before = snapshot(model)
        with pytest.raises(ValueError, match=f"not calibrated(.|\n)*{MISSING_LINE}"):
            quantize_(model, prefixquant_config())
        assert_same(model, before)

    def test_a_lone_linear(self):
        with pytest.raises(ValueError, match=MISSING_LINE):
            quantize_(nn.Sequential(nn.Linear(8, 8)), prefixquant_config())

    @pytest.mark.parametrize(
        "other",
        [
            prefixquant_config("w4a8kv4"),
            prefixquant_config("w8a8kv8"),
            prefixquant_config("w4a4kv16"),
            prefixquant_config(mode="dynamic"),
            prefixquant_config(prefix=False),
            prefixquant_config(rotation=False),
        ],
        ids=str,
    )
    def test_another_config_packs_nothing(self, calibrated, other):
        model = calibrated()
        before = snapshot(model)
        with pytest.raises(ValueError, match="differs from the calibrated one") as error:
            quantize_(model, other)
        assert repr(other) in str(error.value) and repr(prefixquant_config()) in str(error.value)
        assert_same(model, before)
        assert not any(isinstance(linear.weight, PackedWeight) for linear in linears(model).values())
        assert {module.path for module in path_switches(model)} == {Path.FLOAT}
        quantize_(model, prefixquant_config())  # and the right one still works

    def test_twice(self, calibrated):
        model = calibrated()
        quantize_(model, prefixquant_config())
        before = snapshot(model)
        with pytest.raises(ValueError, match="quantized already; quantize_ runs once"):
            quantize_(model, prefixquant_config())
        assert_same(model, before)

    def test_calibrating_a_quantized_model(self, calibrated, tiny_tokenizer, english):
        model = calibrated()
        quantize_(model, prefixquant_config())
        before = snapshot(model)
        with pytest.raises(ValueError, match="calibrated already; load the original model"):
            pq_ao.calibrate(model, tiny_tokenizer, data=english)
        assert_same(model, before)

    def test_a_parameter_that_is_not_the_weight(self, calibrated):
        model = calibrated(family="qwen2")
        by_name = FqnToConfig({"model.layers.0.self_attn.qkv_proj.bias": prefixquant_config()})
        with pytest.raises(ValueError, match="parameter_name='bias': only 'weight' can be packed"):
            quantize_(model, by_name, filter_fn=None)


CONVERSIONS = {
    "half": lambda model: model.half(),
    "to float16": lambda model: model.to(torch.float16),
    "to dtype=float16": lambda model: model.to(dtype=torch.float16),
    "to cpu float16": lambda model: model.to("cpu", torch.float16),
    "bfloat16": lambda model: model.bfloat16(),
    "to bfloat16": lambda model: model.to(torch.bfloat16),
    "double": lambda model: model.double(),
    "type": lambda model: model.type(torch.float16),
    "inner model": lambda model: model.model.half(),
    "a block": lambda model: model.model.layers[1].half(),
    "attention": lambda model: model.model.layers[0].self_attn.bfloat16(),
    "a norm": lambda model: model.model.layers[0].input_layernorm.half(),
    "quantizer of keys and values": lambda model: model.model.layers[0].self_attn.kv.bfloat16(),
    "a linear": lambda model: model.model.layers[0].mlp.down_proj.half(),
    "head": lambda model: model.lm_head.half(),
    "embedding": lambda model: model.model.embed_tokens.half(),
}


class TestConversion:
    @pytest.mark.parametrize("stage", ["calibrated", "quantized"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("conversion", CONVERSIONS)
    def test_raises_and_changes_no_dtype(self, calibrated, conversion, dtype, stage):
        """Also to the dtype that the model has: its scales are float32 and would go along."""
        model = calibrated(dtype=dtype)
        if stage == "quantized":
            quantize_(model, prefixquant_config())
        before = snapshot(model)
        with pytest.raises(ValueError, match="calibrated model cannot be converted to torch") as error:
            CONVERSIONS[conversion](model)
        same = f"converted to {dtype}:" in str(error.value)
        assert ("Leave the conversion out" if same else "calibrate that") in str(error.value)
        assert_same(model, before)

    @pytest.mark.parametrize("stage", ["calibrated", "quantized"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_to_float32_as_well(self, calibrated, dtype, stage):
        model = calibrated(dtype=dtype)
        if stage == "quantized":
            quantize_(model, prefixquant_config())
        before = snapshot(model)
        for convert in (model.float, lambda: model.to(torch.float32)):
            with pytest.raises(ValueError, match=f"torch.float32.*belong to {dtype}"):
                convert()
            assert_same(model, before)

    @pytest.mark.parametrize("stage", ["calibrated", "quantized"])
    @pytest.mark.parametrize(
        "change",
        [
            lambda model: model.to("cpu"),
            lambda model: model.to(device="cpu"),
            lambda model: model.cpu(),
            lambda model: model.eval(),
            lambda model: model.requires_grad_(False),
            lambda model: model.float(),  # the dtype that everything has
            lambda model: model.to(torch.float32),
            copy.deepcopy,
        ],
    )
    def test_what_changes_no_dtype_works(self, calibrated, change, stage):
        model = calibrated()
        if stage == "quantized":
            quantize_(model, prefixquant_config())
        before, expected = snapshot(model), logits(model)
        changed = change(model)
        assert_same(changed, before)
        assert torch.equal(logits(changed), expected)


class TestStateDict:
    def quantized(self, calibrated, **arguments):
        model = calibrated(**arguments)
        quantize_(model, prefixquant_config())
        return model

    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
    def test_into_another_quantized_model(self, calibrated, family, assign):
        source = self.quantized(calibrated, family=family)
        target = self.quantized(calibrated, family=family, seed=1)
        expected = logits(source)
        assert not torch.equal(logits(target), expected)
        target.load_state_dict(source.state_dict(), assign=assign)
        assert torch.equal(logits(target), expected)
        assert_same(target, snapshot(source))

    def test_through_a_file(self, calibrated, tmp_path):
        source, target = self.quantized(calibrated), self.quantized(calibrated, seed=1)
        torch.save(source.state_dict(), tmp_path / "model.pt")
        target.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
        assert torch.equal(logits(target), logits(source))

    def test_holds_prefix_and_scales(self, calibrated):
        names = self.quantized(calibrated).state_dict().keys()
        for end in ("prefix_k", "prefix_v", "kv.key_scale", "kv.value_scale", "o_in.scale", "o_in.shift"):
            assert sum(name.endswith(f"self_attn.{end}") for name in names) == 2, end
        assert not any("packed" in name or "_base" in name for name in names)

    @pytest.mark.parametrize("assign", [False, True])
    def test_into_a_calibrated_model_that_is_not_quantized(self, calibrated, assign):
        source, target = self.quantized(calibrated), calibrated(seed=1)
        with pytest.raises(RuntimeError, match=r"qkv_proj.weight is quantized.*quantize_\(model, config\)"):
            target.load_state_dict(source.state_dict(), assign=assign)
        assert not any(isinstance(linear.weight, PackedWeight) for linear in linears(target).values())

    @pytest.mark.parametrize("assign", [False, True])
    def test_of_a_calibrated_model_into_a_quantized_one(self, calibrated, assign):
        source, target = calibrated(), self.quantized(calibrated, seed=1)
        with pytest.raises(RuntimeError, match="qkv_proj.weight is floating point.*quantized"):
            target.load_state_dict(source.state_dict(), assign=assign)
        assert all(isinstance(linear.weight, PackedWeight) for linear in linears(target).values())

    def test_into_a_model_of_transformers(self, calibrated, make_tiny):
        with pytest.raises(RuntimeError, match="Missing key.*q_proj(.|\n)*Unexpected key.*qkv_proj"):
            make_tiny("llama", seed=1).load_state_dict(self.quantized(calibrated).state_dict())

    def test_of_another_scheme(self, calibrated):
        config = prefixquant_config("w8a8kv8")
        target = calibrated(config)
        quantize_(target, config)
        with pytest.raises(RuntimeError, match="weight"):
            target.load_state_dict(self.quantized(calibrated).state_dict())
        assert all(linear.weight.bits == 8 for linear in linears(target).values())
