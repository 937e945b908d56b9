"""How large tokens are at the inputs of down_proj, on decoders without an outlier and with one."""

import pytest
import torch

from pq_ao.outliers import OUTLIER_THRESHOLD, outlier_statistics, token_ratios
from tests.outliers import OUTLIER, plant_outlier


@pytest.fixture
def planted(make_tiny):
    return plant_outlier(make_tiny("llama"))


def test_ratio_is_the_token_maximum_over_the_lower_median(make_tiny):
    model = make_tiny("llama")
    ids = torch.randint(3, 300, (10,), generator=torch.Generator().manual_seed(0))
    seen = []
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids[None])
    for hook in hooks:
        hook.remove()
    for row, x in zip(token_ratios(model, ids), seen, strict=True):
        maxima = x.abs().amax(dim=-1)
        assert torch.equal(row, maxima / maxima.sort().values[4])  # the lower middle of ten


def test_statistics_count_position_zero_and_the_content_leaves_it_out(planted):
    windows = torch.randint(80, 300, (4, 40), generator=torch.Generator().manual_seed(0))
    windows[0, 0] = windows[0, 7] = windows[1, 3] = OUTLIER
    statistics = outlier_statistics(planted, windows)
    assert statistics.counts[0] == pytest.approx(3 / 4)  # three outliers in four sequences, position 0 among them
    assert statistics.frequencies == ((OUTLIER, 2),)  # once for each later place
    assert statistics.max_ratio > OUTLIER_THRESHOLD and statistics.sequences == 4


def test_prefix_positions_have_no_ratio_of_their_own(planted):
    ids = torch.arange(100, 120)
    assert float(token_ratios(planted, ids, (OUTLIER, OUTLIER)).max()) < OUTLIER_THRESHOLD
    assert token_ratios(planted, ids, (OUTLIER, 5)).shape == (2, 20)


def test_activation_that_is_not_finite_names_the_layer(make_tiny):
    model = make_tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(1e38)
    with pytest.raises(ValueError, match="layer 1 is NaN or Inf"):
        token_ratios(model, torch.arange(10))
