"""Random quantized decoders: they behave as calibrated and quantized models do."""

import pytest
import torch

import pq_ao
from pq_ao.linears import CalibratedLinear
from pq_ao.modules import attention_modules
from pq_ao.quantizers import ActivationQuantizer, KVQuantizer
from pq_ao.tensors import PackedWeight
from tests.decoders import FAMILIES, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEMES = {
    "w4a4kv4": "w4a4kv4",
    "w4a8kv4": "w4a8kv4",
    "w8a8kv8": "w8a8kv8",
    "w4a4kv16": "w4a4kv16",
    "dynamic": pq_ao.prefixquant_config(mode="dynamic"),
    "unrotated": pq_ao.prefixquant_config(rotation=False),
}


def _make(family="llama", scheme="w4a4kv4", dtype=torch.float32, config=None, **options):
    return pq_ao.random_quantized_decoder(config or tiny_config(family), scheme, device="cpu", dtype=dtype, **options)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "scheme"), [*((family, "w4a4kv4") for family in FAMILIES), *(("llama", scheme) for scheme in SCHEMES)]
)
def test_integers_follow_the_reference_path_and_the_cache(ids, family, scheme):
    model = _make(family, SCHEMES[scheme])
    packed = model(ids, past_key_values=pq_ao.PrefixStaticCache(model, 2, 32)).logits
    with pq_ao.reference_path(model):
        reference = model(ids, use_cache=False).logits
    # where a value sits between two codes, the two paths may choose differently: few logits move, and little
    assert (packed - reference).square().mean() < 1e-3 * reference.square().mean()
    assert 0.5 < packed.std() < 2


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_scales_use_the_range_of_the_codes(ids, scheme):
    model = _make(scheme=SCHEMES[scheme])
    model(ids, past_key_values=pq_ao.PrefixStaticCache(model, 2, 32))
    for module in model.modules():
        if isinstance(module, CalibratedLinear):
            codes = module.weight.codes()
            assert isinstance(module.weight, PackedWeight) and codes.unique().numel() > 0.7 * 2**module.weight.bits
        if isinstance(module, ActivationQuantizer):
            assert 0 < (module.clip if module.dynamic else module.scale) < 1 and module.shift.abs().max() > 0
        if isinstance(module, KVQuantizer) and module.bits < 16:
            factors = (module.key_clip, module.value_clip) if module.dynamic else (module.key_scale, module.value_scale)
            assert all(((0 < factor) & (factor < 1)).all() for factor in factors)
            assert module.key_shift.abs().max() > 0 and module.value_shift.abs().max() > 0


def test_reports_work_and_embeddings_are_apart():
    model = _make(config=tiny_config(tie_word_embeddings=True), dtype=torch.bfloat16, prefix_tokens=3)
    assert "w4a4 static" in pq_ao.explain(model) and "prefix: 3 tokens" in pq_ao.explain(model)
    report = pq_ao.memory(model, pq_ao.PrefixStaticCache(model, 1, 64))
    assert report.linear_ratio < 0.35 and report.kept_bytes == 2 * 300 * 96 * 2
    assert model.lm_head.weight is not model.model.embed_tokens.weight and not model.config.tie_word_embeddings
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert all(buffer.isfinite().all() for buffer in model.buffers())  # none was left uninitialised


def test_equal_arguments_give_equal_models_and_the_config_is_left_alone(ids):
    config = tiny_config(tie_word_embeddings=True)
    before = config.to_dict()
    first, same, other = (_make(config=config, seed=seed)(ids, use_cache=False).logits for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert config.to_dict() == before


def test_prefix_length_is_as_asked():
    assert all(m.prefix_k.shape == (2, 2, 24) for m in attention_modules(_make(prefix_tokens=2)))
    none = _make(scheme=pq_ao.prefixquant_config(prefix=False), prefix_tokens=0)
    assert all(m.prefix_k.shape[1] == 0 for m in attention_modules(none))


def test_wrong_arguments_are_refused():
    for scheme, options, error, message in (
        ("w3a3", {}, ValueError, "w3a3"),
        ("w4a4kv4", {"prefix_tokens": -1}, ValueError, "prefix_tokens=-1"),
        (pq_ao.prefixquant_config(prefix=False), {}, ValueError, "prefix_tokens=0"),
        ("w4a4kv4", {"dtype": torch.int8}, TypeError, "torch.bfloat16"),
        ("w4a4kv4", {"config": {"hidden_size": 96}}, TypeError, "LlamaConfig"),
        ("w4a4kv4", {"config": tiny_config("mistral", sliding_window=16)}, ValueError, "sliding"),
    ):
        with pytest.raises(error, match=message):
            _make(scheme=scheme, **options)
