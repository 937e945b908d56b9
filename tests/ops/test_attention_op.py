"""Attention over [prefix | body] against dequantize-then-softmax in float64, for every form that keys and values take.

Shape suffixes: B batch, L queries, S body slots, P prefix tokens, H query heads, G KV heads, D head dim.
"""

import pytest
import torch

from pq_ao.ops import code_range, pack_int4, prefix_attention
from pq_ao.ops.attention import attend_causally

pytestmark = pytest.mark.usefixtures("one_thread")

# float32 sums against float64 ones: measured 137 dB and more; a wrong slot, head or scale falls below 30
SQNR_FLOOR_DB = 100.0

STORED_AS = ("packed", "int8", "float32", "bfloat16")


def sqnr(expected: torch.Tensor, got: torch.Tensor) -> float:
    expected, got = expected.double(), got.double()
    return float(20 * torch.log10(expected.norm() / (expected - got).norm().clamp_min(1e-300)))


class Case:
    """Random inputs of the op, in the form it takes them and in float64 [B, G, S, D]."""

    def __init__(
        self, stored="packed", *, scales="static", batch=2, heads=4, groups=2, queries=3, slots=7, prefix=2, head_dim=16
    ):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        self.query = normal(batch, heads, queries, head_dim)
        self.prefix_key, self.prefix_value = normal(groups, prefix, head_dim), normal(groups, prefix, head_dim)
        self.scaling = head_dim**-0.5
        self.body = (batch, groups, slots, head_dim)
        # causal, the last query at the last slot
        self.mask = torch.ones(1, 1, queries, slots, dtype=torch.bool).tril(diagonal=slots - queries)
        if stored in ("packed", "int8"):
            low, high = code_range(4 if stored == "packed" else 8)
            codes = [torch.randint(low, high + 1, self.body, dtype=torch.int8, generator=generator) for _ in range(2)]
            shape = (groups,) if scales == "static" else (batch, groups, slots)
            spread = [(0.5 + torch.rand(shape, generator=generator)) * 2 / high for _ in range(2)]
            self.key, self.value = (pack_int4(c) for c in codes) if stored == "packed" else codes
            self.key_scale, self.value_scale = spread
            view = (1, groups, 1, 1) if scales == "static" else (*shape, 1)
            self.key64, self.value64 = (c.double() * s.double().view(view) for c, s in zip(codes, spread, strict=True))
        else:
            floats = [normal(*self.body).to(getattr(torch, stored)) for _ in range(2)]
            (self.key, self.value), (self.key64, self.value64) = floats, (x.double() for x in floats)
            self.key_scale = self.value_scale = None

    def args(self) -> tuple:
        return (
            self.query,
            self.key,
            self.value,
            self.key_scale,
            self.value_scale,
            self.prefix_key,
            self.prefix_value,
            self.mask,
            self.scaling,
        )

    def expected(self) -> torch.Tensor:
        """Head by head and in float64; [B, L, H, D]."""
        batch, heads, queries, head_dim = self.query.shape
        groups, prefix = self.prefix_key.shape[:2]
        out = self.query.new_empty(batch, queries, heads, head_dim, dtype=torch.float64)
        visible = self.mask.expand(batch, -1, -1, -1)
        for b in range(batch):
            for h in range(heads):
                g = h // (heads // groups)
                key = torch.cat((self.prefix_key[g].double(), self.key64[b, g]))
                value = torch.cat((self.prefix_value[g].double(), self.value64[b, g]))
                scores = self.query[b, h].double() @ key.T * self.scaling
                scores[:, prefix:] = scores[:, prefix:].masked_fill(~visible[b, 0], -torch.inf)
                out[b, :, h] = torch.softmax(scores, dim=-1) @ value
        return out

    def check(self) -> torch.Tensor:
        out = prefix_attention(*self.args())
        expected = self.expected()
        assert out.dtype == torch.float32 and out.is_contiguous() and out.shape == expected.shape
        assert sqnr(expected, out) >= SQNR_FLOOR_DB
        return out


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize(
    "stored, scales", [*((stored, "static") for stored in STORED_AS), ("packed", "per-token"), ("int8", "per-token")]
)
def test_equals_float64(stored, scales, prefix):
    Case(stored, scales=scales, prefix=prefix).check()


@pytest.mark.parametrize("heads, groups", [(1, 1), (4, 4), (4, 1), (6, 2), (9, 3)])
def test_heads_share_keys(heads, groups):
    Case(heads=heads, groups=groups).check()


@pytest.mark.parametrize("head_dim", [2, 15, 24, 96])
@pytest.mark.parametrize("stored", ["packed", "int8"])
def test_head_dims(stored, head_dim):
    Case(stored, head_dim=head_dim).check()


@pytest.mark.parametrize("queries, slots", [(1, 1), (1, 9), (9, 9), (5, 33)])
def test_prefill_decode_and_chunks(queries, slots):
    Case(queries=queries, slots=slots).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_query_and_prefix(dtype):
    case = Case()
    case.query, case.prefix_key, case.prefix_value = (
        x.to(dtype) for x in (case.query, case.prefix_key, case.prefix_value)
    )
    case.check()


@pytest.mark.parametrize("stored", ["packed", "float32"])
def test_each_row_of_a_batch_has_its_own_mask(stored):
    case = Case(stored, batch=3, queries=7, slots=7)
    case.mask = case.mask.expand(3, -1, -1, -1).clone()
    case.mask[1, :, :, :2] = False  # left padding of two tokens, of which the first two queries are part
    case.mask[2, :, :, 4:] = False
    out = case.check()
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("stored", STORED_AS)
def test_what_the_mask_hides_does_not_matter(stored):
    """Empty slots of a static cache may hold anything."""
    case = Case(stored, queries=1, slots=6)
    case.mask = torch.tensor([True, True, True, False, False, False]).view(1, 1, 1, 6)
    before = prefix_attention(*case.args())
    case.key, case.value = case.key.clone(), case.value.clone()
    case.key[:, :, 3:], case.value[:, :, 3:] = 100, 100
    assert torch.equal(prefix_attention(*case.args()), before)


def test_rows_that_see_no_body_still_see_the_prefix():
    case = Case(batch=2, queries=3, slots=3, prefix=3)
    case.mask = torch.zeros(2, 1, 3, 3, dtype=torch.bool)
    case.mask[1] = True
    out = case.check()
    scores = torch.einsum("hld,hpd->hlp", case.query[0], case.prefix_key.repeat_interleave(2, dim=0)) * case.scaling
    alone = torch.softmax(scores, dim=-1) @ case.prefix_value.repeat_interleave(2, dim=0)
    torch.testing.assert_close(out[0], alone.transpose(0, 1))


def test_rows_that_see_nothing_at_all_are_finite():
    """Padded rows of a model without a prefix: their result is not used, but NaN would spread."""
    case = Case(prefix=0)
    case.mask = case.mask.expand(2, -1, -1, -1).clone()
    case.mask[0, :, 0] = False
    out = prefix_attention(*case.args())
    assert torch.isfinite(out).all()
    assert sqnr(case.expected()[1], out[1]) >= SQNR_FLOOR_DB


def test_prefix_is_exact():
    """Beside INT4 codes with a scale of 100, a full-precision prefix keeps its digits."""
    case = Case(queries=1, slots=2)
    case.mask = torch.zeros(1, 1, 1, 2, dtype=torch.bool)
    case.key_scale, case.value_scale = torch.full((2,), 100.0), torch.full((2,), 100.0)
    case.key64, case.value64 = case.key64 * 0, case.value64 * 0
    case.check()


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("stored, scales", [("packed", "static"), ("int8", "per-token"), ("bfloat16", "static")])
def test_opcheck(stored, scales, prefix, queries):
    case = Case(stored, scales=scales, prefix=prefix, queries=queries)
    torch.library.opcheck(torch.ops.pq_ao.prefix_attention.default, case.args())


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2), (3, 1)])
def test_whole_sequences_without_a_mask(heads, groups, prefix):
    """Results and gradients are those of the masked form."""
    case = Case("float32", heads=heads, groups=groups, queries=9, slots=9, prefix=prefix)
    case.key64, case.value64 = case.key.double(), case.value.double()
    inputs = (case.query, case.key, case.value)
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = attend_causally(*leaves, case.prefix_key, case.prefix_value, case.scaling)
    case.query, case.key64, case.value64 = wide = [x.double().requires_grad_() for x in inputs]
    expected = case.expected()
    assert out.dtype == torch.float32 and out.is_contiguous() and out.shape == expected.shape
    assert sqnr(expected, out) >= SQNR_FLOOR_DB
    weights = torch.linspace(-1, 1, expected.numel()).view(expected.shape)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for ours, theirs in zip(leaves, wide, strict=True):
        assert sqnr(theirs.grad, ours.grad) >= SQNR_FLOOR_DB
