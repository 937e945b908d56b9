"""Ids and masks of users: what fits passes, what does not is named."""

import pytest
import torch

from pq_ao.token_inputs import check_ids, left_padding

IDS = torch.tensor([[3, 4, 5], [6, 7, 8]])


def _check(ids) -> None:
    check_ids(ids, 2, 9, "this takes", "make another")


def test_ids_that_fit():
    _check(IDS)
    _check(IDS.to(torch.int32))
    _check(torch.tensor([[0], [8]]))


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        (IDS.float(), TypeError, "torch.float32"),
        (IDS > 4, TypeError, "torch.bool"),
        ([[3, 4]], TypeError, "list"),
        (IDS[:1], ValueError, r"shape \(1, 3\); this takes \[2, L\].*make another"),
        (IDS[0], ValueError, r"shape \(3,\)"),
        (IDS[:, :0], ValueError, "at least one token"),
        (IDS + 1, ValueError, "ids from 4 to 9, but the model's embedding has 9 rows"),
        (IDS - 4, ValueError, "ids from -1 to 4"),
    ],
)
def test_ids_that_do_not_fit(ids, error, words):
    with pytest.raises(error, match=words):
        _check(ids)


def test_padding():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert torch.equal(left_padding(mask, IDS), mask.bool())
    for wrong in ([[1, 0, 1], [1, 1, 1]], [[1, 1, 0], [1, 1, 1]], [[0, 0, 0], [1, 1, 1]]):
        with pytest.raises(ValueError, match="on the left only"):
            left_padding(torch.tensor(wrong), IDS)
    with pytest.raises(ValueError, match=r"shape \(2, 2\); it must be that of input_ids, \(2, 3\)"):
        left_padding(mask[:, 1:], IDS)
