"""The rule, the choice and the check of the prefix, on decoders without an outlier token and with one."""

import sys
from contextlib import nullcontext

import pytest
import torch

import pq_ao
from pq_ao.outliers import OUTLIER_THRESHOLD, OutlierStatistics, ratios_and_loss
from pq_ao.prefix import (
    PrefixWarning,
    _check_inputs,
    bos_role,
    candidates,
    find_prefix,
    prefix_by_rule,
    worst_ratios,
)
from tests.outliers import OUTLIER, plant_outlier


@pytest.fixture
def planted(make_tiny):
    return plant_outlier(make_tiny("llama"))


def _replace_ratios(monkeypatch, found):
    for name in ("pq_ao.outliers", "pq_ao.prefix"):
        monkeypatch.setattr(sys.modules[name], "ratios_and_loss", found)


def _statistics(counts, frequencies, sequences=10):
    return OutlierStatistics(tuple(counts), tuple(frequencies), sequences, 100.0)


def test_rule_takes_as_many_as_the_worst_layer_counts_and_bos_last():
    assert prefix_by_rule(_statistics([0.5, 2.1], [(5, 30), (9, 20), (4, 10), (8, 2)]), 1) == (5, 9, 4, 1)


def test_rule_takes_at_most_the_distinct_tokens():
    assert prefix_by_rule(_statistics([3.2], [(5, 30), (9, 20)]), 1) == (5, 9, 1)


def test_rule_drops_a_lone_rare_candidate_and_keeps_a_lone_frequent_one():
    assert prefix_by_rule(_statistics([1.0], [(5, 9)], sequences=100), 1) == (1,)
    assert prefix_by_rule(_statistics([1.0], [(5, 10)], sequences=100), 1) == (5, 1)
    # only a lone one: two rare candidates stay
    assert prefix_by_rule(_statistics([2.0], [(5, 1), (6, 1)], sequences=100), 1) == (5, 6, 1)


def test_candidates_are_shortest_first_then_without_ordinary_tokens_then_by_frequency():
    assert candidates((5, 9, 1), [7]) == [
        *((1,), (5, 1), (9, 1), (7, 1), (1, 7)),
        *((5, 9, 1), (5, 7, 1), (5, 1, 7), (9, 7, 1), (9, 1, 7)),
        *((5, 9, 7, 1), (5, 9, 1, 7)),
    ]
    assert candidates((1,), []) == [(1,)]
    assert candidates((7, 1), [7]) == [(1,), (7, 1), (1, 7), (7, 7, 1), (7, 1, 7)]


@pytest.mark.parametrize(
    ("enough", "holds_on_windows", "chosen"),
    [
        ([(OUTLIER, 0)], True, (OUTLIER, 0)),
        ([(0,), (OUTLIER, 0)], True, (0,)),
        ([(OUTLIER, 0)], False, (OUTLIER, 71, 0)),  # the few checked inputs alone do not show what is superfluous
        ([], True, (OUTLIER, 71, 0)),
    ],
)
def test_superfluous_tokens_are_left_out(planted, tiny_tokenizer, monkeypatch, enough, holds_on_windows, chosen):
    rule = (OUTLIER, 71, 0)

    def found(model, ids, prefix, compared) -> tuple[torch.Tensor, float]:
        is_window = compared > 0
        holds = prefix == rule or (prefix in enough and (holds_on_windows or not is_window))
        return torch.full((1, len(ids)), 1.0 if holds else 1000.0), 0.0

    _replace_ratios(monkeypatch, found)
    monkeypatch.setattr(sys.modules["pq_ao.prefix"], "prefix_by_rule", lambda statistics, bos_id: rule)
    windows = torch.randint(80, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    report = find_prefix(planted, tiny_tokenizer, windows)
    assert report.prefix_ids == chosen and report.rule_ids == rule


def test_of_several_prefixes_the_one_behind_which_text_is_likeliest_is_taken(make_tiny, tiny_tokenizer, monkeypatch):
    model, windows = make_tiny("llama"), torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.lm_head.weight *= 20  # logits that the prefix moves
    pairs = [(9, 0), (0, 9), (12, 0)]

    def only_pairs_hold(model, ids, prefix, compared) -> tuple[torch.Tensor, float]:
        ratios, loss = ratios_and_loss(model, ids, prefix, compared)
        return torch.full_like(ratios, 1.0 if prefix in (*pairs, ()) else 1000.0), loss

    _replace_ratios(monkeypatch, only_pairs_hold)
    monkeypatch.setattr(sys.modules["pq_ao.prefix"], "_ordinary_tokens", lambda tokenizer, windows: [9, 12])

    def loss(prefix) -> float:
        labels = windows.clone()
        labels[:, 0] = -100
        full = torch.cat((torch.tensor(prefix).expand(3, -1), windows), dim=1)
        with torch.no_grad():
            return float(model(full, labels=torch.nn.functional.pad(labels, (len(prefix), 0), value=-100)).loss)

    losses = {pair: loss(pair) for pair in pairs}
    assert len(set(losses.values())) == 3
    assert find_prefix(model, tiny_tokenizer, windows).prefix_ids == min(losses, key=losses.get)


def test_a_sequence_that_refused_a_prefix_is_asked_first(make_tiny, tiny_tokenizer, monkeypatch):
    windows = torch.randint(80, 300, (12, 40), generator=torch.Generator().manual_seed(0))
    asked = []

    def the_tenth_refuses_all_but_two(model, ids, prefix, compared) -> tuple[torch.Tensor, float]:
        asked.append((prefix, torch.equal(ids, windows[9])))
        refused = asked[-1][1] and prefix not in ((), (9, 0))
        return torch.full((1, len(ids)), 1000.0 if refused else 1.0), 0.0

    _replace_ratios(monkeypatch, the_tenth_refuses_all_but_two)
    monkeypatch.setattr(sys.modules["pq_ao.prefix"], "_ordinary_tokens", lambda tokenizer, windows: [8, 9, 12])
    assert find_prefix(make_tiny("llama"), tiny_tokenizer, windows).prefix_ids == (9, 0)
    tried = {prefix: [is_tenth for other, is_tenth in asked if other == prefix] for prefix, _ in asked if prefix}
    assert tried.pop((0,)) == [False] * (len(tried[9, 0]) - 3) + [True]  # in its turn: two windows are behind it
    assert sorted(tried.pop((9, 0))) == [False] * (len(windows) + 6) + [True]
    assert set(tried) == {(8, 0), (0, 8), (0, 9), (12, 0), (0, 12)} and set(map(tuple, tried.values())) == {(True,)}


@pytest.mark.parametrize("holds", [True, False])
def test_report_has_the_ratios_that_a_forward_of_each_input_gives(make_tiny, planted, tiny_tokenizer, holds):
    model = make_tiny("llama") if holds else planted  # whose outlier is a letter of the conversation
    windows = torch.randint(80, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    with nullcontext() if holds else pytest.warns(PrefixWarning):
        report = find_prefix(model, tiny_tokenizer, windows)
    inputs = _check_inputs(tiny_tokenizer, windows, bos_role(tiny_tokenizer))
    assert (max(report.ratios_after.values()) <= OUTLIER_THRESHOLD) == holds
    assert report.ratios_before == worst_ratios(model, inputs)
    assert report.ratios_after == worst_ratios(model, inputs, report.prefix_ids)
    assert list(report.ratios_after) == list(inputs)


def test_model_without_outliers_gets_bos_alone():
    assert prefix_by_rule(_statistics([0.0, 0.0], []), 1) == (1,)


def test_prefix_that_does_not_hold_is_reported_and_never_changed(planted, tiny_tokenizer):
    windows = torch.randint(80, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    windows[0, 5] = OUTLIER  # a token that is an outlier whatever stands before it
    with pytest.warns(pq_ao.PrefixWarning, match="plain text"):
        report = find_prefix(planted, tiny_tokenizer, windows, prefix_ids=(9, 0))
    assert report.prefix_ids == (9, 0) and report.rule_ids is None
    assert set(report.ratios_after) == {"plain text", "chat", "BOS + text", "BOS BOS text"}
    with pytest.warns(pq_ao.PrefixWarning):
        report = find_prefix(planted, tiny_tokenizer, windows)
    assert report.prefix_ids == report.rule_ids == (OUTLIER, tiny_tokenizer.bos_token_id)


@pytest.mark.parametrize(("wrong", "words"), [((), "at least one"), ((300,), "from 0 to 299"), (("a",), "not a token")])
def test_wrong_prefix_ids_are_refused(make_tiny, tiny_tokenizer, wrong, words):
    with pytest.raises(ValueError, match=words):
        find_prefix(make_tiny("llama"), tiny_tokenizer, torch.ones(1, 8, dtype=torch.int64), prefix_ids=wrong)


def test_bos_role_falls_back_to_eos_then_pad():
    class Named:
        def __init__(self, bos, eos, pad):
            self.bos_token_id, self.eos_token_id, self.pad_token_id = bos, eos, pad

    assert bos_role(Named(0, 5, 6)) == 0  # id 0 is an id
    assert bos_role(Named(None, 5, 6)) == 5
    assert bos_role(Named(None, None, 6)) == 6
    with pytest.raises(ValueError, match="prefix_ids="):
        bos_role(Named(None, None, None))
