"""`pq_ao::cache_attention` against float64, for every form of the cache."""

import pytest
import torch

from pq_ao.ops import prefix_attention, quantize
from pq_ao.ops.cache_attention import cache_attention
from tests.ops.cache_attention_case import CacheCase, sqnr

pytestmark = pytest.mark.usefixtures("one_thread")

# float32 sums against float64 ones
SQNR_FLOOR_DB = 100.0

FORMS = [("packed", "static"), ("packed", "per-token"), ("int8", "static"), ("int8", "per-token"), ("bfloat16", None)]


@pytest.mark.parametrize("queries, start, prefix", [(1, 0, 0), (1, 11, 2), (5, 0, 1), (5, 7, 0)])
@pytest.mark.parametrize("stored, scales", FORMS)
def test_equals_float64(stored, scales, queries, start, prefix):
    case = CacheCase(stored, scales=scales, queries=queries, start=start, prefix=prefix)
    out = cache_attention(*case.args())
    assert out.dtype == torch.float32 and out.is_contiguous()
    assert sqnr(case.expected(), out) >= SQNR_FLOOR_DB


@pytest.mark.parametrize("heads, groups, head_dim", [(6, 2, 30), (4, 4, 24), (3, 1, 6)])
def test_shapes(heads, groups, head_dim):
    case = CacheCase(heads=heads, groups=groups, head_dim=head_dim)
    assert sqnr(case.expected(), cache_attention(*case.args())) >= SQNR_FLOOR_DB


@pytest.mark.parametrize("queries", [1, 4])
def test_padding_hides_slots(queries):
    case = CacheCase(queries=queries, hidden=[0, 9])
    assert sqnr(case.expected(), cache_attention(*case.args())) >= SQNR_FLOOR_DB


@pytest.mark.parametrize("scales", ["static", "per-token"])
def test_nothing_seen_gives_the_shift(scales):
    case = CacheCase(scales=scales, prefix=0, hidden=[12, 0])
    out = cache_attention(*case.args())
    assert torch.equal(out[0].view(4, 16), case.value_shift.squeeze(1).repeat_interleave(2, dim=0))


@pytest.mark.parametrize("stored", ["packed", "float32"])
def test_slots_past_the_text_may_hold_anything(stored):
    case = CacheCase(stored)
    before = cache_attention(*case.args())
    case.keys[:, :, 12:], case.values[:, :, 12:] = 77, 77
    assert torch.equal(cache_attention(*case.args()), before)


@pytest.mark.parametrize("queries, start, slots", [(1, 3, 700), (1, 600, 1500), (40, 700, 1100), (9, 505, 517)])
@pytest.mark.parametrize(("stored", "scales"), [("packed", "static"), ("int8", "per-token")])
def test_slots_past_the_text_change_no_bit(stored, scales, queries, start, slots):
    """As programs have it that attend over all slots, masked, whatever is held."""
    case = CacheCase(stored, scales=scales, heads=6, queries=queries, start=start, slots=slots)
    out = cache_attention(*case.args())
    mask = torch.arange(slots) <= start + torch.arange(queries)[:, None]
    prefix = case.prefix_key - case.key_shift, case.prefix_value - case.value_shift
    scales = case.key_scale, case.value_scale
    query = case.query.transpose(1, 2)
    whole = prefix_attention(query, case.keys, case.values, *scales, *prefix, mask[None, None], case.scaling)
    whole = whole + case.value_shift.squeeze(1).repeat_interleave(3, dim=0)
    assert torch.equal(out, whole.flatten(-2))


@pytest.mark.parametrize(
    "bits, encoding, code_set",
    [(4, torch.int8, "even"), (8, torch.int8, "even"), (4, torch.float8_e4m3fn, "even"), (4, torch.int8, "wide"),
     (4, torch.float8_e4m3fn, "wide")],
)  # fmt: skip
def test_quantized_output(bits, encoding, code_set):
    case = CacheCase(queries=2)
    codes = cache_attention(*case.args(bits, encoding), codes=code_set)
    assert codes.dtype == encoding
    expected = quantize(cache_attention(*case.args()) - case.out_shift, case.out_scale, bits, codes=code_set)
    assert torch.equal(codes.to(torch.int8), expected)


@pytest.mark.parametrize("stored", ["packed", "int8"])
@pytest.mark.parametrize("scales", ["static", "per-token"])
def test_shifts_are_optional(stored, scales):
    case = CacheCase(stored, scales=scales)
    case.key_shift = case.value_shift = None
    assert sqnr(case.expected(), cache_attention(*case.args())) >= SQNR_FLOOR_DB


def test_errors_name_the_argument():
    case = CacheCase()
    args = list(case.args())
    args[1] = args[1].to(torch.int16)
    with pytest.raises(TypeError, match="keys, values: torch.int16"):
        cache_attention(*args)
    args = list(case.args())
    args[7] = args[7][:, :, 1:]
    with pytest.raises(ValueError, match="prefix_key: shape"):
        cache_attention(*args)
    args = list(case.args())
    args[11] = -1.0
    with pytest.raises(ValueError, match="scaling=-1.0"):
        cache_attention(*args)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("stored, scales", FORMS)
def test_opcheck(stored, scales, bits):
    case = CacheCase(stored, scales=scales, hidden=[0, 3])
    torch.library.opcheck(torch.ops.pq_ao.cache_attention.default, case.args(bits))
