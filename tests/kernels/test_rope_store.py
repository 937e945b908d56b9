"""The kernel of rope_store, in the interpreter (or on a GPU), against the operator's reference."""

import pytest
import torch

from pq_ao.ops import rope_store, unpack_int4
from tests.ops.test_rope_store import Case

pytest.importorskip("triton", reason="kernels need triton")

from pq_ao.ops.kernels.rope_rows import RowsTiling
from pq_ao.ops.kernels.rope_store import Tiling, choose_tiling, launch

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLIPPED = 2e-3  # of the codes may differ, by one, for sums are taken in another order; seen: none in most cases
QUERY_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
_CACHE = ("keys", "values", "key_token_scale", "value_token_scale")


def run(case: Case, tiling: Tiling | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Queries and cache from the kernel; the case's own cache stays as it is."""
    arguments = {
        name: x.detach().clone().to(DEVICE) if isinstance(x, torch.Tensor) else x
        for name, x in case.arguments().items()
    }
    shape = (case.batch, case.length, case.heads, case.head_dim)
    query = torch.full(shape, torch.nan, dtype=case.dtype, device=DEVICE)
    arguments["base"] = arguments.pop("rotation")
    del arguments["query_heads"]
    launch(**arguments, query=query, tiling=tiling)
    return query.cpu(), [arguments[name].cpu() for name in _CACHE if arguments[name] is not None]


def as_numbers(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    return (unpack_int4(tensor, head_dim) if tensor.dtype == torch.uint8 else tensor).float()


def check(case: Case, tiling: Tiling | None = None) -> None:
    for tensor in case.cache():
        tensor.fill_(5)  # so that slots left alone are seen to be
    query, cache = run(case, tiling)
    expected = rope_store(**case.arguments())
    tolerance = QUERY_TOLERANCE[case.dtype]
    torch.testing.assert_close(query, expected, rtol=tolerance, atol=tolerance)
    for found, wanted in zip(cache, case.cache(), strict=True):
        if wanted.is_floating_point():
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
            continue
        difference = (as_numbers(found, case.head_dim) - as_numbers(wanted, case.head_dim)).abs()
        assert difference.max() <= 1 and (difference > 0).sum() <= max(1, FLIPPED * difference.numel())


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"head_dim": 64},
        {"length": 1, "batch": 1, "start": 0, "norms": True},
        {"norms": True, "dtype": torch.float16, "shared_tables": False, "head_dim": 48},
        {"batch": 3, "start": 9, "head_dim": 36, "groups": 1},
    ],
)
def test_equals_the_reference(kwargs, mode, bits):
    check(Case(bits=bits, mode=mode, **kwargs))


@pytest.mark.parametrize("head_dim", [2, 14, 18, 24, 40, 80, 128])
def test_every_head_dim(head_dim):
    """Walsh, a flat base, and a DCT (14, 18), with and without padding."""
    check(Case(head_dim=head_dim, bits=8, length=2))


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_without_a_rotation_every_byte_is_equal(mode):
    case = Case(rotation=False, mode=mode, head_dim=32)
    query, cache = run(case)
    assert torch.equal(query, rope_store(**case.arguments()))
    assert all(torch.equal(found, wanted) for found, wanted in zip(cache, case.cache(), strict=True))


def test_values_are_equal_even_with_a_rotation():
    case = Case(head_dim=64)
    _, cache = run(case)
    rope_store(**case.arguments())
    assert torch.equal(cache[1], case.tensors["values"])


@pytest.mark.parametrize("start", [10, 12, 1 << 40, -2])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_tokens_without_a_slot_are_not_written(start, mode):
    check(Case(start=start, mode=mode))


@pytest.mark.parametrize("tiling", [Tiling(16, 1, 4), Tiling(1, 16, 4), Tiling(8, 4, 4), Tiling(2, 8, 4)])
def test_every_tiling(tiling):
    check(Case(heads=6, groups=3, length=5), tiling)


ROWS = RowsTiling(block_h=2, warps=4)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"head_dim": 64},
        {"head_dim": 128, "length": 9, "start": 1, "dtype": torch.float16},
        {"head_dim": 64, "norms": True, "dtype": torch.float16, "shared_tables": False},
        {"head_dim": 64, "batch": 3, "start": 9, "groups": 1},
        {"head_dim": 64, "raw": True, "dtype": torch.bfloat16},
    ],
)
def test_many_tokens(kwargs, mode, bits):
    check(Case(bits=bits, mode=mode, **kwargs), ROWS)


@pytest.mark.parametrize(
    "tiling",
    [RowsTiling(8, 4), RowsTiling(1, 8), RowsTiling(4, 2), RowsTiling(2, 4, repeat=1), RowsTiling(8, 1, repeat=1)],
)
def test_every_tiling_of_many_tokens(tiling):
    check(Case(heads=6, groups=3, length=11, start=0, head_dim=64), tiling)


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_many_tokens_without_a_rotation_every_byte_is_equal(mode):
    case = Case(rotation=False, mode=mode, head_dim=64)
    query, cache = run(case, ROWS)
    assert torch.equal(query, rope_store(**case.arguments()))
    assert all(torch.equal(found, wanted) for found, wanted in zip(cache, case.cache(), strict=True))


@pytest.mark.parametrize("bias", [True, False])
def test_accumulators(bias):
    for tiling in (None, ROWS):
        check(Case(raw=True, raw_bias=bias, dtype=torch.bfloat16, head_dim=64), tiling)
    case = Case(raw=True, raw_bias=bias, dtype=torch.bfloat16, head_dim=64, rotation=False)
    _, cache = run(case)
    rope_store(**case.arguments())
    assert all(torch.equal(found, wanted) for found, wanted in zip(cache, case.cache(), strict=True))


def test_the_choice_by_tokens_and_head_dim():
    assert isinstance(choose_tiling(1, 8, 128, 1), Tiling) and isinstance(choose_tiling(8192, 8, 128, 1), RowsTiling)
    assert isinstance(choose_tiling(16, 8, 128, 1), Tiling)
    assert choose_tiling(32, 8, 128, 1) == choose_tiling(512, 8, 128, 1) == RowsTiling(8, 4, repeat=1, early=True)
    assert choose_tiling(8192, 8, 64, 0) == RowsTiling(8, 4, 2)
    for head_dim, order in ((80, 20), (256, 1), (128, 2)):
        assert isinstance(choose_tiling(8192, 8, head_dim, order), Tiling)


def test_bfloat16_queries():
    check(Case(dtype=torch.bfloat16, head_dim=64))


def test_no_tokens():
    query, _ = run(Case(length=0))
    assert query.shape == (2, 0, 4, 24)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("norms", [False, True])
def test_models_shapes(head_dim, bits, mode, norms):
    for batch, length in ((1, 1), (5, 1), (2, 9), (3, 50)):
        check(
            Case(
                batch=batch, length=length, head_dim=head_dim, bits=bits, mode=mode, norms=norms, heads=32, groups=8,
                start=1, dtype=torch.bfloat16, raw=length == 50,
            )
        )  # fmt: skip
