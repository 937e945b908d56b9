"""Codes on their way from a norm to its linears: shapes may change, numbers may not, and nothing else is allowed."""

import copy

import pytest
import torch
from torch.nn import functional as F

from pq_ao.ops import int_linear, pack_int4
from pq_ao.tensors import PackedWeight, QuantizedActivation

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (2, 3, 8)


def make(per_row: bool = False, shape=SHAPE, dtype=torch.bfloat16) -> QuantizedActivation:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, shape, dtype=torch.int8, generator=generator)
    scale = torch.rand((*shape[:-1], 1) if per_row else (1,), generator=generator) + 0.1
    return QuantizedActivation(codes, scale, dtype)


@pytest.fixture(params=[False, True], ids=["static", "per-row"])
def activation(request) -> QuantizedActivation:
    return make(request.param)


def test_shows_the_dtype_of_the_model(activation):
    assert (activation.shape, activation.dtype) == (SHAPE, torch.bfloat16)
    assert (activation.qdata.dtype, activation.scale.dtype) == (torch.int8, torch.float32)
    assert "QuantizedActivation" in repr(activation)


def test_dequantize_is_float32(activation):
    restored = activation.dequantize()
    assert type(restored) is torch.Tensor and restored.dtype == torch.float32
    assert torch.equal(restored, activation.qdata.float() * activation.scale)


class TestShapes:
    @pytest.mark.parametrize(
        "change",
        [
            lambda x: x.view(6, 8),
            lambda x: x.view(-1, 8),
            lambda x: x.reshape(3, 2, 8),
            lambda x: x.reshape(1, 2, 3, 8),
            lambda x: x.flatten(0, 1),
            lambda x: x.contiguous(),
            lambda x: x.detach(),
            lambda x: x.clone(),
            lambda x: x[1:],
            lambda x: x[:, 1:],
            lambda x: x[:, -1:],
            lambda x: x[:, ::2],
            lambda x: x[:, 3:],
            lambda x: x.narrow(1, 1, 2),
            lambda x: x.narrow(-2, 1, 2),
            lambda x: x[..., 2:6],
            lambda x: x.to("cpu", copy=True),
            copy.deepcopy,
        ],
    )
    def test_numbers_stay(self, activation, change):
        changed, expected = change(activation), change(activation.dequantize())
        assert isinstance(changed, QuantizedActivation)
        assert (changed.shape, changed.dtype) == (expected.shape, torch.bfloat16)
        assert torch.equal(changed.dequantize(), expected)

    def test_reshape_of_strided_codes(self):
        x = make()
        strided = QuantizedActivation(x.qdata.transpose(0, 1), x.scale, x.hp_dtype)
        assert torch.equal(strided.reshape(6, 8).dequantize(), x.dequantize().transpose(0, 1).reshape(6, 8))

    @pytest.mark.parametrize("shape", [(6, 2, 4), (2, 24), (48,)])
    def test_static_scale_allows_another_last_axis(self, shape):
        x = make()
        assert torch.equal(x.view(shape).dequantize(), x.dequantize().view(shape))

    @pytest.mark.parametrize("shape", [(6, 2, 4), (2, 24), (48,)])
    def test_a_scale_for_each_row_does_not(self, shape):
        with pytest.raises(ValueError, match=rf"last axis \(8 to {shape[-1]}\).*one scale a row"):
            make(per_row=True).view(shape)

    def test_a_view_shares_its_codes(self, activation):
        assert activation.view(-1, 8).qdata.data_ptr() == activation.qdata.data_ptr()


class TestLinear:
    @pytest.mark.parametrize("change", [lambda x: x, lambda x: x.view(-1, 8), lambda x: x[:, 1:]])
    def test_takes_what_became_of_it(self, activation, change):
        generator = torch.Generator().manual_seed(1)
        codes = torch.randint(-8, 8, (5, 8), dtype=torch.int8, generator=generator)
        scale = torch.rand(5, generator=generator)
        x = change(activation)
        y = F.linear(x, PackedWeight.from_codes(codes, scale, 4, torch.bfloat16))
        assert y.shape == (*x.shape[:-1], 5)
        expected = int_linear(x.qdata, x.scale, pack_int4(codes), scale, None, torch.bfloat16)
        assert torch.equal(y, expected)


class TestRefused:
    @pytest.mark.parametrize(
        "operation",
        [
            lambda x: x + 1,
            lambda x: x * 2,
            lambda x: x + x,
            lambda x: torch.zeros(SHAPE) + x,
            lambda x: x @ torch.ones(8, 2),
            lambda x: x.sum(),
            lambda x: x.transpose(0, 1),
            lambda x: x.mT,
            lambda x: x.permute(1, 0, 2),
            lambda x: x.unsqueeze(0),
            lambda x: x[0],
            lambda x: torch.cat((x, x)),
            lambda x: F.silu(x),
            lambda x: F.layer_norm(x, (8,)),
            lambda x: x.zero_(),
        ],
    )
    def test_any_other_operation_raises(self, activation, operation):
        before = activation.dequantize()
        with pytest.raises(NotImplementedError, match="QuantizedActivation"):
            operation(activation)
        assert torch.equal(activation.dequantize(), before)

    def test_linear_with_a_plain_weight_raises(self, activation):
        with pytest.raises(TypeError, match="a weight of type Tensor; a PackedWeight takes a QuantizedActivation"):
            F.linear(activation, torch.ones(3, 8))

    @pytest.mark.parametrize(
        "convert, dtype",
        [
            (lambda x: x.float(), "torch.float32"),
            (lambda x: x.half(), "torch.float16"),
            (lambda x: x.to(torch.float16), "torch.float16"),
            (lambda x: x.to("cpu", torch.float64), "torch.float64"),
        ],
    )
    def test_another_dtype(self, activation, convert, dtype):
        """`x.float()` must not hand back what it was given."""
        with pytest.raises(ValueError, match=f"cannot convert codes of torch.bfloat16 to {dtype}"):
            convert(activation)


def test_serializable(tmp_path, activation):
    torch.save(activation, tmp_path / "x.pt")
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert isinstance(loaded, QuantizedActivation) and loaded.hp_dtype == torch.bfloat16
    assert torch.equal(loaded.dequantize(), activation.dequantize())


@pytest.mark.parametrize("per_row", [False, True], ids=["static", "per-row"])
def test_reshaped_inside_a_compiled_graph(per_row):
    x = make(per_row)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def reshaped(codes, scale):
        return QuantizedActivation(codes, scale, torch.bfloat16)[:, 1:].reshape(4, 8).dequantize()

    assert torch.equal(reshaped(x.qdata, x.scale), x[:, 1:].reshape(4, 8).dequantize())
