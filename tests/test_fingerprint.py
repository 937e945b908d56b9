"""Fingerprints: what they tell apart, what they do not, and the bytes that they are made of."""

import hashlib

import pytest
import torch
from torch import nn

from pq_ao.fingerprint import fingerprint, plain_cpu
from pq_ao.tensors import PackedWeight

A = torch.tensor([1.0, -2.0, 3.5, 0.25])


def test_is_the_sha256_of_header_and_bytes():
    # written out, so that journals of an older pq_ao keep their meaning
    header = b'["x", "torch.bfloat16", [2, 2]]\n'
    data = bytes.fromhex("803f00c06040803e")
    assert fingerprint([("x", A.bfloat16().view(2, 2))]) == hashlib.sha256(header + data).hexdigest()


@pytest.mark.parametrize(
    "other",
    [
        [("b", A)],
        [("a", A.view(2, 2))],
        [("a", A.view(2, 2).t())],
        [("a", A.view(torch.int32))],
        [("a", A.nextafter(torch.tensor(9.0)))],
        [("a", A[:2]), ("a", A[2:])],
        [("a", A), ("a", A[:0])],
        [("a", A.view(4, 1))],
        [],
    ],
    ids=["name", "shape", "transposed", "dtype", "last bit", "split", "one more", "axis", "nothing"],
)
def test_tells_apart(other):
    assert fingerprint(other) != fingerprint([("a", A)])


def test_order_counts():
    pair = [("a", A), ("b", A)]
    assert fingerprint(pair) != fingerprint(pair[::-1])


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float8_e4m3fn,
        torch.uint8,
        torch.int8,
        torch.int64,
        torch.bool,
    ],
)
def test_strides_and_parameters_do_not_count(dtype):
    x = (torch.arange(24).view(2, 3, 4) % 5).to(dtype)
    expected = fingerprint([("x", x)])
    spread = torch.zeros(2, 3, 8, dtype=dtype)[..., ::2]
    spread.copy_(x)
    assert not spread.is_contiguous()
    assert fingerprint([("x", spread)]) == expected
    assert fingerprint(iter([("x", nn.Parameter(x, requires_grad=dtype.is_floating_point))])) == expected


def test_values_behind_a_lazy_sign_count():
    lazy = torch.tensor([1 + 2j]).conj().imag
    assert lazy.is_neg()
    assert fingerprint([("x", lazy)]) == fingerprint([("x", torch.tensor([-2.0]))])


def test_one_element_of_any_stride():
    assert fingerprint([("x", A[::4])]) == fingerprint([("x", A[:1])])


def test_scalars_and_empty_tensors():
    shapes = [(), (1,), (0,), (4, 0, 3), (4, 3, 0)]
    assert len({fingerprint([("x", torch.zeros(shape))]) for shape in shapes}) == len(shapes)


def test_weights_of_a_model(make_tiny):
    model, other = make_tiny("llama"), make_tiny("llama", seed=1)
    assert fingerprint(model.named_parameters()) == fingerprint(make_tiny("llama").named_parameters())
    assert fingerprint(model.named_parameters()) != fingerprint(other.named_parameters())


def test_copies_only_where_need_be():
    assert plain_cpu("x", A).data_ptr() == A.data_ptr()


@pytest.mark.parametrize(
    ("tensor", "error", "match"),
    [
        (PackedWeight(torch.zeros(2, 2, dtype=torch.int8), torch.ones(2), 2, torch.float32), TypeError, "PackedWeight"),
        (A.to_sparse(), TypeError, "sparse_coo"),
        (A.numpy(), TypeError, "ndarray"),
        (A.to("meta"), ValueError, "without offloading"),
    ],
    ids=["subclass", "sparse", "numpy", "meta"],
)
def test_refuses_what_has_no_plain_bytes(tensor, error, match):
    with pytest.raises(error, match=f"^the name: .*{match}"):
        fingerprint([("the name", tensor)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_device_does_not_count():
    x = torch.arange(12, dtype=torch.bfloat16).view(3, 4)
    assert fingerprint([("x", x.cuda().t())]) == fingerprint([("x", x.t())])
