"""Hadamard matrices and the fast transform: exact where the numbers are integers, orthonormal everywhere."""

import pytest
import torch

from pq_ao.hadamard import (
    factor_order,
    hadamard_base,
    hadamard_matrix,
    hadamard_transform,
    hadamard_transform_transpose,
    has_hadamard_matrix,
    random_signs,
    randomized_hadamard,
    randomized_hadamard_transpose,
)

# Orders by construction: doubling; Paley I over GF(p), GF(27) and GF(343); Paley II over GF(p), GF(25) and GF(49);
# Williamson.
ORDERS = (
    *(1, 2, 4, 8, 16, 40, 64, 88, 184, 312, 688),
    *(12, 20, 24, 28, 44, 60, 68, 84, 108, 140, 180, 284, 344, 684),
    *(36, 52, 76, 100, 148, 924),
    *(92, 116, 156, 172),
)

# Widths of real models and their factors. 13696 = 107 * 128 (Qwen-14B, GLM-4) would need order 428: it takes the DCT.
MODEL_WIDTHS = {
    576: (36, 4),
    896: (28, 5),
    960: (60, 4),
    1536: (12, 7),
    2560: (20, 7),
    4096: (1, 12),
    4864: (76, 6),
    9728: (76, 7),
    11008: (172, 6),
    13696: (107, 7),
    14336: (28, 9),
    18944: (148, 7),
    29568: (924, 5),
}

# Small widths: each kind of base with several butterfly stages, with one, with none; no base; the DCT fallback; odd.
SMALL_WIDTHS = (1, 2, 64, 44, 48, 80, 96, 12, 24, 3, 6, 56, 107, 214)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _kronecker(n: int, base: torch.Tensor | None = None) -> torch.Tensor:
    """H of order n, float64, from its definition: the full matrix that the fast transform must never build."""
    k, m = factor_order(n)
    base = hadamard_base(n).double() if base is None else base
    if not has_hadamard_matrix(k):  # the DCT again, since the float32 base is rounded
        index = torch.arange(k, dtype=torch.float64)
        base = 2**0.5 * torch.cos(torch.outer(index, index + 0.5) * torch.pi / k)
        base[0] = 1
    walsh = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(m):
        walsh = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), walsh)
    return torch.kron(base, walsh) / n**0.5


@pytest.mark.parametrize("order", ORDERS)
def test_hadamard_matrix_has_orthogonal_sign_rows(order):
    h = hadamard_matrix(order)
    assert h.dtype == torch.float64 and h.shape == (order, order)
    assert bool((h.abs() == 1).all())
    # float64 products of signs are exact integers, and much faster than an int64 matmul; the comparison is in int64.
    assert torch.equal((h @ h.T).to(torch.int64), order * torch.eye(order, dtype=torch.int64))


def test_every_multiple_of_four_below_188_is_generated():
    assert [n for n in range(1, 189) if not has_hadamard_matrix(n) and n % 4 == 0] == [188]
    assert not any(has_hadamard_matrix(n) for n in (0, -4, 3, 6, 10, 18, 428))


@pytest.mark.parametrize("order", (0, -4, 3, 6, 188, 428))
def test_hadamard_matrix_refuses_an_order_it_cannot_make(order):
    with pytest.raises(ValueError, match=f"order={order}"):
        hadamard_matrix(order)


def test_powers_of_two_are_the_symmetric_sylvester_matrix():
    h = hadamard_matrix(64)
    assert torch.equal(h, h.T)
    assert torch.equal(h, 8 * _kronecker(64))


def test_changing_a_returned_matrix_leaves_the_cache_intact():
    hadamard_matrix(12).zero_()
    hadamard_base(48).zero_()
    assert bool((hadamard_matrix(12).abs() == 1).all())
    assert bool((hadamard_base(48).abs() == 1).all())


@pytest.mark.parametrize(("n", "expected"), MODEL_WIDTHS.items())
def test_model_widths_factor_as_documented(n, expected):
    assert factor_order(n) == expected
    assert has_hadamard_matrix(expected[0]) == (n != 13696)


def test_factor_order_never_fails_and_multiplies_back():
    for n in range(1, 3000):
        k, m = factor_order(n)
        assert k * 2**m == n and (k == 1 or k <= 1024 or k % 2 == 1)


def test_factor_order_takes_a_larger_multiple_where_four_times_odd_has_none():
    assert not has_hadamard_matrix(4 * 47) and not has_hadamard_matrix(8 * 47)
    assert factor_order(32 * 47) == (16 * 47, 1)  # Paley I: 751 is prime
    assert factor_order(8 * 47) == (47, 3)
    assert factor_order(64 * 67) == (67, 6)  # 4, 8 * 67 have none here, 16 * 67 is past the largest base


@pytest.mark.parametrize("n", (0, -8))
def test_widths_below_one_are_refused(n):
    for call in (factor_order, hadamard_base, lambda n: random_signs(n, torch.Generator())):
        with pytest.raises(ValueError, match=f"n={n}"):
            call(n)


@pytest.mark.parametrize("n", (64, 48, 11008, 13696, 29568, 7))
def test_base_is_orthogonal_of_squared_norm_k(n):
    base = hadamard_base(n)
    k = factor_order(n)[0]
    assert base.dtype == torch.float32 and base.shape == (k, k)
    torch.testing.assert_close(base @ base.T / k, torch.eye(k), rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", (48, 11008, 14336))
def test_hadamard_base_survives_a_cast_to_half_precision(n):
    base = hadamard_base(n)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(base.to(dtype).float(), base)
        x = torch.randn(2, n)
        assert torch.equal(hadamard_transform(x, base.to(dtype)), hadamard_transform(x, base))


@pytest.mark.parametrize("n", SMALL_WIDTHS)
def test_transform_equals_the_explicit_kronecker_matrix(n):
    h = _kronecker(n)
    x = torch.randn(2, 3, n, dtype=torch.float64)
    torch.testing.assert_close(h @ h.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard_transform(x), x @ h.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard_transform_transpose(x), x @ h, rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard_transform(x.float()).double(), x @ h.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", MODEL_WIDTHS)
@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float32, 1e-5), (torch.float64, 1e-12)))
def test_model_width_transform_is_orthonormal(n, dtype, tolerance):
    x = torch.randn(3, n, dtype=dtype)
    y = hadamard_transform(x)
    assert y.dtype == dtype
    torch.testing.assert_close(hadamard_transform_transpose(y), x, rtol=0, atol=tolerance)
    torch.testing.assert_close(hadamard_transform(hadamard_transform_transpose(x)), x, rtol=0, atol=tolerance)
    torch.testing.assert_close(y @ y.T / n, x @ x.T / n, rtol=0, atol=tolerance)  # norms and inner products


@pytest.mark.parametrize("n", MODEL_WIDTHS)
def test_down_projection_is_unchanged_when_weight_and_data_are_transformed(n):
    x, weight = torch.randn(2, n, dtype=torch.float64), torch.randn(5, n, dtype=torch.float64)
    rotated = hadamard_transform(x) @ hadamard_transform(weight).T
    torch.testing.assert_close(rotated, x @ weight.T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("n", [n for n in MODEL_WIDTHS if n != 13696])
def test_one_hot_spreads_flat_over_a_hadamard_width(n):
    x = torch.zeros(3, n)
    x[torch.arange(3), torch.tensor([0, n // 3, n - 1])] = 1
    for transform in (hadamard_transform, hadamard_transform_transpose):
        torch.testing.assert_close(transform(x).abs(), torch.full((3, n), n**-0.5), rtol=1e-6, atol=0)


def test_one_hot_spreads_over_the_fallback_within_a_factor_of_sqrt_two():
    n = 13696
    x = torch.zeros(n)
    x[n // 3] = 1
    assert hadamard_transform(x).abs().max() <= (2 / n) ** 0.5 * (1 + 1e-6)


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("n", (128, 576, 1536, 11008, 13696, 29568, 172, 107))
def test_a_row_does_not_depend_on_its_batch(n, threads):
    x = torch.randn(17, n)
    base = hadamard_base(n)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for transform in (hadamard_transform, hadamard_transform_transpose):
            whole = transform(x, base)
            assert torch.equal(torch.stack([transform(row, base) for row in x]), whole)
            assert torch.equal(torch.cat([transform(part, base) for part in x.split(5)]), whole)
            assert torch.equal(transform(x[None, :, None], base)[0, :, 0], whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_input_is_transformed_in_float32(dtype):
    x = torch.randn(4, 1536).to(dtype)
    y = hadamard_transform(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, hadamard_transform(x.float()))


def test_autocast_does_not_lower_the_precision_of_the_base_product():
    x = torch.randn(4, 1536)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = hadamard_transform(x)
    assert torch.equal(y, hadamard_transform(x))


def test_a_given_base_equals_the_one_looked_up():
    for n in (64, 1536, 11008):
        x = torch.randn(2, n)
        assert torch.equal(hadamard_transform(x, hadamard_base(n)), hadamard_transform(x))
        double = x.double()
        assert torch.equal(hadamard_transform(double, hadamard_base(n)), hadamard_transform(double))


def test_a_given_base_may_be_of_another_order_than_the_default():
    x = torch.randn(2, 80, dtype=torch.float64)
    base = hadamard_matrix(40)
    h = torch.kron(base, hadamard_matrix(2)) / 80**0.5
    torch.testing.assert_close(hadamard_transform(x, base), x @ h.T, rtol=0, atol=1e-12)


def test_non_contiguous_and_empty_inputs_work():
    x = torch.randn(48, 5)
    assert torch.equal(hadamard_transform(x.T), hadamard_transform(x.T.contiguous()))
    assert hadamard_transform(torch.zeros(0, 4, 48)).shape == (0, 4, 48)
    assert hadamard_transform(torch.zeros(3, 48, device="meta"), hadamard_base(48, "meta")).shape == (3, 48)


@pytest.mark.parametrize("shape", ((12,), (12, 24), (24, 24), (9, 9), (16, 16), (96, 96), (0, 0), (1, 12, 12)))
def test_a_base_of_the_wrong_shape_is_refused(shape):
    # 24 * 2 = 48 is right for 48 but not for 36; 9 * 4 = 36 is right for 36 but not for 48.
    n = 36 if shape == (24, 24) else 48
    with pytest.raises(ValueError, match=r"base has shape .* hadamard_base"):
        hadamard_transform(torch.zeros(2, n), torch.zeros(shape))


@pytest.mark.parametrize("dtype", (torch.int8, torch.int64, torch.bool, torch.complex64))
def test_an_input_that_is_not_floating_is_refused(dtype):
    x = torch.zeros(2, 8, dtype=dtype)
    for call in (hadamard_transform, hadamard_transform_transpose, lambda x: randomized_hadamard(x, torch.ones(8))):
        with pytest.raises(ValueError, match="floating"):
            call(x)


def test_an_input_without_channels_is_refused():
    for x in (torch.tensor(1.0), torch.zeros(3, 0)):
        with pytest.raises(ValueError, match="last axis"):
            hadamard_transform(x)


def test_signs_are_fair_and_set_by_the_generator():
    signs = random_signs(4096, torch.Generator().manual_seed(1))
    assert signs.dtype == torch.float64 and bool((signs.abs() == 1).all())
    assert abs(signs.sum()) < 4 * 64  # four standard deviations
    assert torch.equal(signs, random_signs(4096, torch.Generator().manual_seed(1)))
    assert not torch.equal(signs, random_signs(4096, torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("n", SMALL_WIDTHS)
def test_randomized_hadamard_equals_its_explicit_matrix(n):
    signs = random_signs(n, torch.Generator().manual_seed(0))
    r = torch.diag(signs) @ _kronecker(n)
    x = torch.randn(3, n, dtype=torch.float64)
    torch.testing.assert_close(randomized_hadamard(x, signs), x @ r, rtol=0, atol=1e-12)
    torch.testing.assert_close(randomized_hadamard_transpose(x, signs), x @ r.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(randomized_hadamard(x.T[:, :3].T, signs), x @ r, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", (896, 2048, 3072, 5120))
def test_randomized_hadamard_is_undone_by_its_transpose(n):
    signs = random_signs(n, torch.Generator().manual_seed(0))
    x = torch.randn(3, n, dtype=torch.float64)
    y = randomized_hadamard(x, signs)
    assert y.dtype == torch.float64
    torch.testing.assert_close(randomized_hadamard_transpose(y, signs), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(y @ y.T / n, x @ x.T / n, rtol=0, atol=1e-12)


def test_float64_signs_do_not_promote_float32_data():
    signs = random_signs(48, torch.Generator().manual_seed(0))
    for transform in (randomized_hadamard, randomized_hadamard_transpose):
        assert transform(torch.randn(2, 48), signs).dtype == torch.float32
        assert transform(torch.randn(2, 48).bfloat16(), signs).dtype == torch.float32


def test_signs_of_the_wrong_length_are_refused():
    for transform in (randomized_hadamard, randomized_hadamard_transpose):
        with pytest.raises(ValueError, match=r"signs has shape \[1\].*\[48\]"):
            transform(torch.zeros(2, 48), torch.ones(1))


def test_gradients_flow_through_the_transform():
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(hadamard_transform, (x,))


@pytest.mark.parametrize("n", (64, 48, 13696))
def test_compiled_transform_equals_eager_bit_for_bit(n):
    torch._dynamo.reset()
    # aot_eager shows what matters here, one functionalised graph, without the C++ of the full compiler.
    compiled = torch.compile(hadamard_transform, fullgraph=True, backend="aot_eager")
    x, base = torch.randn(3, n), hadamard_base(n)
    assert torch.equal(compiled(x, base), hadamard_transform(x, base))
    assert torch.equal(compiled(x[:2], base), hadamard_transform(x[:2], base))


@pytest.mark.parametrize("strict", (True, False))
def test_export_takes_the_base_as_a_buffer_and_refuses_to_look_it_up(strict):
    class Transform(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.register_buffer("base", base)

        def forward(self, x):
            return hadamard_transform(x, self.base)

    module, x = Transform(hadamard_base(48)), torch.randn(3, 48)
    program = torch.export.export(module, (x,), strict=strict)
    assert torch.equal(program.module()(x), module(x))
    with pytest.raises(Exception, match="base=None under compile or export|Observed exception"):
        torch.export.export(Transform(None), (x,), strict=strict)


def test_the_cache_is_not_spoiled_by_the_mode_of_its_first_caller():
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Orders that no other test asks for, so that each is generated here.
    with FakeTensorMode(), pytest.raises(RuntimeError, match="fake tensors"):
        hadamard_base(4 * 11 * 19)
    assert type(hadamard_base(4 * 11 * 19)) is torch.Tensor
    with torch.device("meta"):
        assert hadamard_base(4 * 3 * 11).device.type == "cpu"
    x = torch.randn(2, 4 * 5 * 11, requires_grad=True)
    with torch.inference_mode():
        hadamard_transform(x)
    hadamard_transform(x).sum().backward()  # fails if the cached base is an inference tensor
