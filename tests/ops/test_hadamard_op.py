"""The operator around the fast transform: same numbers, one dtype, and a schema that compilers can trust."""

import pytest
import torch

from pq_ao.hadamard import hadamard_base, hadamard_transform
from pq_ao.ops import hadamard

pytestmark = pytest.mark.usefixtures("one_thread")

# powers of two, 12, 20 and 36 times one, 9 * 2 and 7 * 2 (no Hadamard matrix: DCT), and one
WIDTHS = (1, 2, 64, 24, 48, 96, 160, 576, 14, 18)


def random_floats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", WIDTHS)
def test_equals_the_transform_in_float32(width, dtype):
    x, base = random_floats(2, 3, width).to(dtype), hadamard_base(width)
    y = hadamard(x, base)
    assert y.dtype == torch.float32 and y.shape == x.shape and y.is_contiguous()
    assert torch.equal(y, hadamard_transform(x.float(), base))
    in_float64 = hadamard_transform(x.double())
    assert (y - in_float64).abs().max() <= 1e-5 * in_float64.abs().max()


@pytest.mark.parametrize("width", WIDTHS)
def test_keeps_the_norm_of_rows(width):
    x = random_floats(5, width)
    torch.testing.assert_close(hadamard(x, hadamard_base(width)).norm(dim=-1), x.norm(dim=-1))


def test_scores_do_not_change():
    """What R3 rests on: queries and keys rotated alike have the same products."""
    query, key = random_floats(2, 4, 7, 48), random_floats(2, 4, 5, 48).flip(-1)
    base = hadamard_base(48)
    scores = hadamard(query, base) @ hadamard(key, base).mT
    torch.testing.assert_close(scores, query @ key.mT, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 24), (24,), (2, 0, 24)])
def test_empty_and_flat_inputs(shape):
    assert hadamard(random_floats(*shape), hadamard_base(24)).shape == shape


def test_strided_input():
    x = random_floats(2, 5, 4, 24).transpose(1, 2)
    y = hadamard(x, hadamard_base(24))
    assert y.is_contiguous()
    assert torch.equal(y, hadamard(x.contiguous(), hadamard_base(24)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 24), (2, 4, 16), (0, 24)])
def test_opcheck(shape, dtype):
    x = random_floats(*shape).to(dtype)
    torch.library.opcheck(torch.ops.pq_ao.hadamard.default, (x, hadamard_base(shape[-1])))


def test_opcheck_on_a_strided_input():
    x = random_floats(24, 3).t()
    torch.library.opcheck(torch.ops.pq_ao.hadamard.default, (x, hadamard_base(24)))
