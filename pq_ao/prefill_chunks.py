"""How a prompt is cut into calls of a few fixed lengths."""

from collections.abc import Sequence
from itertools import pairwise

DEFAULT_BUCKETS = (32, 128, 512, 2048)

# tokens that run through the model at once by default: bounds the memory of activations
_TOKENS_AT_ONCE = 8192

# a call with fewer tokens takes no less time: it reads all weights
_CHEAP_TOKENS = 256


def chunks(length: int, room: int, buckets: Sequence[int], batch_size: int = 1) -> list[tuple[int, int]]:
    """Cuts a prompt into calls of fixed lengths, so that the work is least.

    Args:
        length: tokens of the prompt, at most `room`.
        room: free slots of the cache; a call writes as many as its bucket has.
        buckets: lengths to choose from, ascending; 1 is always allowed.
        batch_size: rows.

    Returns:
        (bucket, tokens used) for each call.
    """
    calls = []
    while length > buckets[-1]:
        if buckets[-1] > room:
            break
        calls.append((buckets[-1], buckets[-1]))
        length, room = length - buckets[-1], room - buckets[-1]
    return calls + _cheapest(length, room, (1, *buckets), batch_size)[1]


def _cheapest(length: int, room: int, buckets: Sequence[int], batch_size: int) -> tuple[int, list[tuple[int, int]]]:
    fitting = [bucket for bucket in buckets if bucket <= room]
    if fitting == [1]:  # the cache is about full
        return length * _CHEAP_TOKENS, [(1, 1)] * length
    options = []
    for bucket, larger in (*pairwise(fitting), (fitting[-1], None)):
        cost, used = max(bucket * batch_size, _CHEAP_TOKENS), min(bucket, length)
        if bucket >= length:
            options.append((cost, [(bucket, used)]))
            break
        if larger is None or larger > length:  # the largest that is filled whole
            rest_cost, rest = _cheapest(length - used, room - used, buckets, batch_size)
            options.append((cost + rest_cost, [(bucket, used), *rest]))
    return min(options)


def checked_buckets(buckets: Sequence[int] | None, batch_size: int, max_cache_len: int) -> tuple[int, ...]:
    """Lengths of the calls, ascending: those given, or the default ones as far as cache and memory allow.

    Raises:
        ValueError: none, one below 2, or one longer than the cache.
    """
    if buckets is None:
        limit = min(max_cache_len, max(DEFAULT_BUCKETS[0], _TOKENS_AT_ONCE // batch_size))
        return tuple(bucket for bucket in DEFAULT_BUCKETS if bucket <= limit) or (max_cache_len,)
    wrong = [b for b in buckets if not isinstance(b, int) or isinstance(b, bool) or not 2 <= b <= max_cache_len]
    if wrong or not buckets:
        raise ValueError(
            f"prefill_buckets={tuple(buckets)}: must be integers from 2 to max_cache_len={max_cache_len}, at least one."
        )
    return tuple(sorted(set(buckets)))
