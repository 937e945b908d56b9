"""One block in calibration: what is kept of it, and that it is restored as it was or not at all."""

import pytest
import torch

from pq_ao import prefixquant_config
from pq_ao.block_calibration import block_tensors, calibrate_block, restore_block
from tests.blocks import first_block

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.randint(3, 300, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["w4a4kv4", "w8a8kv8"])
def block(request, make_tiny):
    """A function that makes the same block anew, not yet calibrated, and what calibration decides of it."""
    config = prefixquant_config(request.param)

    def make():
        return first_block(make_tiny("qwen2"), config, IDS)[0]

    sites = make()
    with torch.no_grad():
        calibrate_block(sites, config, "nearest", "tensor")
    return make, {name: tensor.clone() for name, tensor in block_tensors(sites.layer).items()}


@torch.no_grad()
def test_restored_block_is_the_kept_one(block):
    make, kept = block
    layer = make().layer
    restore_block(layer, kept)
    restored = block_tensors(layer)
    assert restored.keys() == kept.keys()
    assert all(torch.equal(restored[name], kept[name]) for name in kept)


@torch.no_grad()
def test_what_does_not_fit_is_named_and_changes_nothing(block):
    make, kept = block
    layer = make().layer
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items() if tensor is not None}
    name = "mlp.down_proj.codes"
    missing = {other: tensor for other, tensor in kept.items() if other != name}
    for wrong, words in (
        (missing, f"{name} is absent instead of"),
        (kept | {"mlp.extra": torch.ones(2)}, r"mlp.extra is \(2,\) instead of absent"),
        (kept | {name: kept[name][:5]}, rf"{name} is \(5, \d+\) instead of \(96, \d+\)"),
        (kept | {"mlp.down_in.shift": torch.ones(1)}, r"mlp.down_in.shift is \(1,\) instead of \(160,\)"),
    ):
        with pytest.raises(ValueError, match=f"does not fit this model: {words}.*another resume folder"):
            restore_block(layer, wrong)
    after = layer.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@torch.no_grad()
def test_sites_keep_no_activations_behind_a_calibration(make_tiny):
    config = prefixquant_config()
    sites = first_block(make_tiny("llama"), config, IDS)[0]
    held = sum(tensor.numel() for tensor in _tensors_of(sites))
    calibrate_block(sites, config, "nearest", "tensor")
    assert sum(tensor.numel() for tensor in _tensors_of(sites)) == held


def _tensors_of(sites):
    """Those that the sites hold by themselves: inputs of linears, heads."""
    own = (value for name, value in vars(sites).items() if name not in ("layer", "body", "attention", "norm"))
    waiting, found = list(own), []
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            waiting += value
    return found


@torch.no_grad()
def test_sequences_beyond_enough_tokens_are_not_looked_at(make_tiny, monkeypatch):
    config, found = prefixquant_config(), []
    for most, ids in ((64, IDS), (2**17, IDS[:2]), (2**17, IDS)):
        monkeypatch.setattr("pq_ao.block_sites.MOST_TOKENS", most)
        sites = first_block(make_tiny("llama"), config, ids)[0]
        monkeypatch.setattr("pq_ao.block_sites._SEARCH_SEQUENCES", 2)
        calibrate_block(sites, config, "gptq", "tensor")
        found.append(block_tensors(sites.layer))
    few, two, all_of_them = found
    assert all(torch.equal(few[name], two[name]) for name in few)
    assert any(not torch.equal(few[name], all_of_them[name]) for name in few)
