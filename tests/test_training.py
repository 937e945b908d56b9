"""The loop of fine-tuning on a problem of two numbers: order, rests, rates, and the state that is kept."""

import math

import pytest
import torch

from pq_ao.training import TrainingHistory, train

pytestmark = pytest.mark.usefixtures("one_thread")


def _train(error, validation=None, count=8, **changes):
    """Trains "x" and "a.weight", both of one zero; returns history, best state, leaves and the batches seen."""
    leaves = {name: torch.zeros(1, requires_grad=True) for name in ("x", "a.weight")}
    seen = []

    def counted(chosen):
        seen.append(chosen.tolist())
        return error(leaves)

    options = {
        "epochs": 3,
        "batch_size": 2,
        "rate": {"x": 0.1, "a.weight": 0.01}.get,
        "seed": 0,
        "title": "",
        "progress": False,
    }
    held_out = validation or (lambda leaves: error(leaves).detach())
    history, best = train(leaves, counted, lambda chosen: held_out(leaves), (count, 3), **(options | changes))
    return history, best, leaves, seen


def _distance(leaves):
    """From 1 in both."""
    return sum((leaf - 1).square().sum() for leaf in leaves.values())


def test_seed_orders_the_batches_and_each_epoch_has_its_own_order():
    first, same, other = (_train(_distance, seed=seed)[3] for seed in (0, 0, 1))
    assert first == same != other
    epochs = [first[start : start + 4] for start in (0, 4, 8)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert all(sorted(sum(epoch, [])) == list(range(8)) for epoch in epochs)


@pytest.mark.parametrize(("count", "sizes"), [(7, [2, 2, 2]), (2, [2]), (1, [1])])
def test_a_rest_waits_unless_it_is_all_there_is(count, sizes):
    seen = _train(_distance, count=count, epochs=2)[3]
    assert [len(batch) for batch in seen] == 2 * sizes
    assert all(index < count for batch in seen for index in batch)


def test_a_leaf_has_the_rate_of_its_name_and_rates_fall_to_a_tenth():
    """Adam's step is the rate where the gradient keeps its size."""

    def slope(leaves):
        return sum(leaf.sum() for leaf in leaves.values())

    history, _, leaves, seen = _train(slope, epochs=1, count=40, batch_size=1)
    steps = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 40)) / 2 for step in range(40)]
    assert leaves["x"].item() == pytest.approx(-0.1 * sum(steps), rel=1e-3)
    assert leaves["a.weight"].item() == pytest.approx(-0.01 * sum(steps), rel=1e-3)
    assert history.stopped is None and len(seen) == 40


def test_best_validation_state_is_kept():
    errors = iter([5.0, 4.0, 6.0, 4.5])  # before, then by epoch
    history, best, leaves, _ = _train(_distance, lambda leaves: next(errors) * torch.ones(()), batch_size=3, count=3)
    assert history.before == 5 and history.validation == [4, 6, 4.5] and history.kept == 1
    after_one = _train(_distance, batch_size=3, count=3, epochs=1)[2]
    # the first step of any schedule is the whole rate
    assert all(torch.equal(best[name], after_one[name]) for name in best)
    assert all(not torch.equal(best[name], leaves[name]) for name in best)


def test_validation_is_the_mean_over_sequences_not_batches():
    leaves = {"x": torch.zeros(1, requires_grad=True)}
    values = torch.tensor([1.0, 2.0, 6.0])
    history, _ = train(
        leaves, lambda chosen: leaves["x"].sum(), lambda chosen: values[chosen].mean(), (2, 3), epochs=1, batch_size=2,
        rate=lambda name: 0.0, seed=0, title="", progress=False,
    )  # fmt: skip
    assert history.before == pytest.approx(3.0)


def test_first_error_that_is_not_finite_ends_it():
    def breaks(leaves):
        return _distance(leaves) if float(leaves["x"].detach()) < 0.5 else leaves["x"].sum() * math.nan

    history, best, _, seen = _train(breaks, epochs=9)
    assert history.stopped == f"the error was not finite in epoch {len(history.training)}"
    assert len(seen) == 4 * len(history.training) < 4 * 9
    assert all(torch.isfinite(tensor).all() for tensor in best.values()) and history.kept < len(history.training)
    plain = history.to_dict()
    assert plain["training"][-1] is None and all(math.isfinite(error) for error in plain["training"][:-1])


def test_history_is_plain_for_json():
    history = TrainingHistory(1.0, [0.5, math.inf], [math.nan, 0.25], kept=2)
    expected = {"before": 1.0, "training": [0.5, None], "validation": [None, 0.25], "kept": 2, "stopped": None}
    assert history.to_dict() == expected
