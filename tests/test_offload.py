"""Calibration on a device that the model does not lie on. The meta device is a second one that every machine has."""

import pytest
import torch
from torchao.quantization import quantize_

import pq_ao
from pq_ao import FinetuneConfig, prefixquant_config
from pq_ao.block_calibration import block_tensors
from pq_ao.families import family_of
from pq_ao.modules import attention_modules
from pq_ao.offload import computing_device, surroundings_on, visiting, visits_on_call

pytestmark = pytest.mark.usefixtures("one_thread")

CPU, META = torch.device("cpu"), torch.device("meta")
SMALL = {"num_sequences": 4, "sequence_length": 64, "progress": False}


def _tensors(module):
    return [*module.parameters(), *module.buffers()]


def _devices(module):
    return {tensor.device.type for tensor in _tensors(module)}


def _run(layer, device):
    hidden, angles = torch.zeros(1, 5, 96, device=device), torch.zeros(2, 1, 5, 24, device=device).unbind()
    return layer(hidden, attention_mask=None, position_embeddings=angles)


class TestVisitsOnCall:
    def test_a_block_is_there_while_it_computes_and_no_longer(self, make_tiny):
        layers = make_tiny("qwen2").model.layers
        before = [(tensor, tensor.data_ptr(), tensor.clone()) for tensor in _tensors(layers)]
        seen = []
        for layer in layers:
            layer.mlp.down_proj.register_forward_pre_hook(lambda *args: seen.append([_devices(one) for one in layers]))
        with visits_on_call(layers, META):
            for layer in layers:
                assert _run(layer, META).device == META
                assert _devices(layers) == {"cpu"}
        assert seen == [[{"meta"}, {"cpu"}], [{"cpu"}, {"meta"}]]
        after = _tensors(layers)
        for now, (tensor, address, values) in zip(after, before, strict=True):
            assert now is tensor and now.data_ptr() == address and torch.equal(now, values)  # nothing was copied back
        assert _run(layers[0], CPU).device == CPU  # no hooks are left

    def test_inside_inference_mode(self, make_tiny):
        layers = make_tiny("llama").model.layers
        with visits_on_call(layers, META), torch.inference_mode():
            _run(layers[0], META)
        assert _devices(layers) == {"cpu"} and not any(tensor.is_inference() for tensor in _tensors(layers))

    def test_an_error_inside_a_block(self, make_tiny):
        layers = make_tiny("llama").model.layers
        with pytest.raises(RuntimeError), visits_on_call(layers, META):
            _run(layers[0], CPU)
        assert _devices(layers) == {"cpu"}

    def test_blocks_that_are_there_are_left_alone(self, make_tiny):
        layers = make_tiny("llama").model.layers
        addresses = [tensor.data_ptr() for tensor in _tensors(layers)]
        with visits_on_call(layers, CPU):
            _run(layers[0], CPU)
        assert [tensor.data_ptr() for tensor in _tensors(layers)] == addresses


def test_all_that_calibration_gives_a_block_goes_home_with_it(make_tiny, tiny_tokenizer, english):
    model = make_tiny("llama")
    pq_ao.calibrate(model, tiny_tokenizer, data=english, **SMALL)
    layer = model.model.layers[0]
    with pytest.raises(NotImplementedError, match="out of meta tensor"), visiting(layer, META):  # none comes back
        assert _devices(layer) == {"meta"}
        assert {tensor.device.type for tensor in block_tensors(layer).values()} == {"meta"}
        assert attention_modules(model)[0].prefix_k.device == META


def test_the_surroundings_are_all_but_the_blocks(make_tiny):
    model = make_tiny("llama", tied=True)
    with pytest.raises(NotImplementedError, match="out of meta tensor"), surroundings_on(model, META):
        assert model.device == META and model.lm_head.weight is model.model.embed_tokens.weight
        layers = {id(tensor) for tensor in _tensors(model.get_submodule(family_of(model).layers))}
        assert all((tensor.device == CPU) == (id(tensor) in layers) for tensor in _tensors(model))


class TestComputingDevice:
    def test_the_models_own(self, make_tiny):
        assert computing_device(None, make_tiny("llama")) == CPU

    @pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99", 3.5])
    def test_refused(self, make_tiny, tiny_tokenizer, english, device):
        model = make_tiny("llama")
        with pytest.raises(ValueError, match=r"^device=.*(pass|runs on)"):
            pq_ao.calibrate(model, tiny_tokenizer, data=english, device=device, **SMALL)
        assert not hasattr(model, "calibration_record")

    def test_training_all_blocks_together_needs_all_of_them_there(self, make_tiny, tiny_tokenizer, english):
        model = make_tiny("llama").to(META)
        with pytest.raises(
            ValueError, match="^device='cpu': end_to_end_epochs=1 trains all blocks together, and the m"
        ):
            pq_ao.calibrate(
                model,
                tiny_tokenizer,
                data=english,
                device="cpu",
                finetune=FinetuneConfig(epochs=1, end_to_end_epochs=1),
                **SMALL,
            )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("finetune", [None, FinetuneConfig(epochs=1, validation_sequences=2, compile=False)])
def test_on_a_gpu_from_the_cpu(make_tiny, tiny_tokenizer, english, finetune):
    """The codes, scales and prefix of a model that lies on the GPU, and a block there at a time."""
    there, here = make_tiny("qwen3").cuda(), make_tiny("qwen3")
    for model in (there, here):
        record = pq_ao.calibrate(model, tiny_tokenizer, data=english, device="cuda", finetune=finetune, **SMALL)
    assert _devices(here) == {"cpu"} and record.prefix == there.calibration_record.prefix
    for ours, theirs in zip(here.model.layers, there.model.layers, strict=True):
        ours, theirs = block_tensors(ours), block_tensors(theirs)
        assert all(torch.equal(ours[name], theirs[name].cpu()) for name in theirs)
    for model in (there, here):
        quantize_(model, prefixquant_config())
    ids = torch.randint(3, 300, (2, 17), device="cuda")
    assert torch.equal(here.cuda()(ids).logits, there(ids).logits)
