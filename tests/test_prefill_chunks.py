"""Cutting of prompts into calls of fixed lengths."""

import pytest

from pq_ao.prefill_chunks import checked_buckets, chunks


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("spare", [0, 5, 1000])
def test_chunks_cover_the_prompt_inside_the_room(batch, spare):
    buckets = (32, 128, 512)
    for length in (1, 31, 32, 33, 129, 160, 700, 1300):
        calls = chunks(length, length + spare, buckets, batch)
        assert sum(used for _, used in calls) == length
        assert all(bucket == used for bucket, used in calls[:-1])  # filled up at the end of the prompt only
        assert sum(bucket for bucket, _ in calls) <= length + spare
    assert chunks(1500, 1600, (2048,)) == [(1, 1)] * 1500
    assert chunks(1000, 4096, (32, 128, 512, 2048)) == [(512, 512), (512, 488)]
    assert chunks(1025, 4096, (32, 128, 512, 2048)) == [(512, 512), (512, 512), (1, 1)]


def test_default_buckets_fit_cache_and_memory():
    assert checked_buckets(None, 1, 4096) == (32, 128, 512, 2048)
    assert checked_buckets(None, 64, 4096) == (32, 128)
    assert checked_buckets(None, 4096, 4096) == (32,)
    assert checked_buckets(None, 1, 20) == (20,)
    assert checked_buckets([512, 16, 512], 1, 512) == (16, 512)
