"""The INT8 head in a model."""

import pytest
import torch
from torchao.quantization import quantize_
from transformers import LlamaConfig

import pq_ao
from pq_ao.head import Int8Head
from pq_ao.tensors import PackedWeight

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model():
    config = LlamaConfig(
        vocab_size=301,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
    )
    return pq_ao.random_quantized_decoder(config, device="cpu")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_logits_stay_close_and_bytes_halve(model, ids):
    before, kept = model(ids, use_cache=False).logits, pq_ao.memory(model).kept_bytes
    assert pq_ao.quantize_head_(model) is model
    after = model(ids, use_cache=False).logits
    assert after.dtype == before.dtype and after.shape == before.shape
    error = (after.float() - before.float()).square().mean() / before.float().square().mean()
    assert error < 10**-3.8  # 8 bits of weight alone: 43 dB at 96 inputs, less the rounding to bfloat16
    assert pq_ao.memory(model).kept_bytes == kept - 301 * 96 * 2 + 301 * (96 + 4)
    assert isinstance(model.lm_head.weight, PackedWeight) and "lm_head" in pq_ao.explain(model)


@torch.no_grad()
def test_a_bias_is_kept(model, ids):
    model.lm_head.bias = torch.nn.Parameter(torch.full((301,), 100.0, dtype=torch.bfloat16), requires_grad=False)
    pq_ao.quantize_head_(model)
    assert (model(ids, use_cache=False).logits > 80).all()


@torch.no_grad()
def test_it_compiles_whole_and_survives_a_round_trip(model, ids):
    pq_ao.quantize_head_(model)
    hidden = torch.randn(2, 1, 96, dtype=torch.bfloat16)
    expected = model.lm_head(hidden)
    with torch._inductor.config.patch(emulate_precision_casts=True):
        assert torch.equal(torch.compile(model.lm_head, fullgraph=True)(hidden), expected)
    other = Int8Head(torch.empty_like(model.lm_head.weight), None)
    other.load_state_dict(model.lm_head.state_dict())
    assert torch.equal(other(hidden), expected)


def test_order_with_quantize_does_not_matter(make_tiny, tiny_tokenizer, english, ids):
    def make(*steps):
        model, config = make_tiny("llama"), pq_ao.prefixquant_config()
        pq_ao.calibrate(
            model, tiny_tokenizer, config, data=english, num_sequences=2, sequence_length=64, progress=False
        )
        for step in steps:
            step(model, config)
        return model(ids, use_cache=False).logits

    def head(model, _):
        pq_ao.quantize_head_(model)

    assert torch.equal(make(quantize_, head), make(head, quantize_))


def test_wrong_models_are_refused(model, make_tiny):
    pq_ao.quantize_head_(model)
    with pytest.raises(ValueError, match="INT8 already"):
        pq_ao.quantize_head_(model)
    with pytest.raises(ValueError, match="pq_ao.calibrate"):
        pq_ao.quantize_head_(make_tiny("llama"))
