"""The weight subclass: its codes stay what they are, its linear computes on them, and the rest raises."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pq_ao.ops import int_linear, quantize
from pq_ao.tensors import PackedWeight, QuantizedActivation

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = ((1, 1), (5, 8), (7, 9), (33, 65))
BITS = (4, 8)


def random_codes(*shape: int, bits: int, seed: int = 0) -> torch.Tensor:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    return torch.randint(low, high, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def random_scale(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.1 + 0.01


def make_weight(rows=7, columns=9, bits=4, dtype=torch.bfloat16, seed=0) -> PackedWeight:
    codes = random_codes(rows, columns, bits=bits, seed=seed)
    return PackedWeight.from_codes(codes, random_scale(rows, seed=seed + 1), bits, dtype)


def make_activation(*shape: int, per_row=False, bits=4, dtype=torch.bfloat16) -> QuantizedActivation:
    scale = random_scale(*shape[:-1], 1, seed=5) if per_row else random_scale(1, seed=5)
    return QuantizedActivation(random_codes(*shape, bits=bits, seed=4), scale, dtype)


def same(a: PackedWeight, b: PackedWeight) -> bool:
    attributes = all(getattr(a, name) == getattr(b, name) for name in ("shape", "in_features", "hp_dtype", "dtype"))
    return attributes and torch.equal(a.qdata, b.qdata) and torch.equal(a.scale, b.scale)


def linear_with(weight: PackedWeight, bias: torch.Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


class TestCodes:
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("rows, columns", SHAPES)
    def test_round_trip(self, rows, columns, bits):
        codes, scale = random_codes(rows, columns, bits=bits), random_scale(rows)
        weight = PackedWeight.from_codes(codes, scale, bits, torch.bfloat16)
        assert weight.shape == (rows, columns)
        assert (weight.dtype, weight.bits, weight.in_features) == (torch.bfloat16, bits, columns)
        assert weight.qdata.dtype == (torch.uint8 if bits == 4 else torch.int8)
        assert weight.qdata.shape == (rows, (columns + 1) // 2 if bits == 4 else columns)
        assert torch.equal(weight.codes(), codes)
        assert torch.equal(weight.scale, scale)

    @pytest.mark.parametrize("bits", BITS)
    def test_dequantize_is_float32(self, bits):
        codes, scale = random_codes(7, 9, bits=bits), random_scale(7)
        restored = PackedWeight.from_codes(codes, scale, bits, torch.bfloat16).dequantize()
        assert type(restored) is torch.Tensor and restored.dtype == torch.float32
        assert torch.equal(restored, codes.float() * scale[:, None])

    @pytest.mark.parametrize("bits", BITS)
    def test_storage_is_contiguous(self, bits):
        codes = random_codes(10, 6, bits=bits).t()
        weight = PackedWeight.from_codes(codes, random_scale(6), bits, torch.float32)
        assert weight.qdata.is_contiguous()
        assert torch.equal(weight.codes(), codes)

    def test_bytes(self):
        """Half a byte a weight and four a row: 0.25 of bfloat16, and the scales."""
        weight = make_weight(576, 576)
        size = weight.qdata.nbytes + weight.scale.nbytes
        assert weight.qdata.untyped_storage().nbytes() == weight.qdata.nbytes
        assert size <= 0.27 * torch.empty(576, 576, dtype=torch.bfloat16).nbytes

    def test_prints_what_it_holds(self):
        text = repr(make_weight())
        assert "PackedWeight" in text and "in_features=9" in text and "torch.bfloat16" in text


class TestLinear:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("per_row", [False, True], ids=["static", "per-row"])
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
    @pytest.mark.parametrize("leading", [(1,), (3,), (2, 17), (0,)])
    def test_equals_the_integer_reference_and_never_dequantizes(
        self, monkeypatch, leading, with_bias, bits, per_row, dtype
    ):
        def refuse(self):
            raise AssertionError("dequantized on the way to a linear")

        monkeypatch.setattr(PackedWeight, "dequantize", refuse)
        monkeypatch.setattr(QuantizedActivation, "dequantize", refuse)
        weight = make_weight(33, 65, bits, dtype)
        x = make_activation(*leading, 65, per_row=per_row, bits=bits, dtype=dtype)
        bias = random_scale(33, seed=7) if with_bias else None

        acc = (x.qdata.long().reshape(-1, 1, 65) * weight.codes().long()).sum(dim=-1).view(*leading, 33)
        expected = acc.float() * (x.scale * weight.scale)
        expected = (expected if bias is None else expected + bias).to(dtype)
        for y in (F.linear(x, weight, bias), linear_with(weight, bias)(x), F.linear(x, weight, bias=bias)):
            assert type(y) is torch.Tensor and y.dtype == dtype
            assert torch.equal(y, expected)
        assert torch.equal(int_linear(x.qdata, x.scale, weight.qdata, weight.scale, bias, dtype), expected)

    def test_result_has_the_dtype_of_the_activation(self):
        y = F.linear(make_activation(2, 9, dtype=torch.float32), make_weight(dtype=torch.bfloat16))
        assert y.dtype == torch.float32

    def test_a_plain_activation_is_refused(self):
        with pytest.raises(TypeError, match="a PackedWeight takes a QuantizedActivation") as error:
            F.linear(torch.randn(2, 9, dtype=torch.bfloat16), make_weight())
        assert "activation of type Tensor and a weight of type PackedWeight" in str(error.value)
        assert "pq_ao.calibrate" in str(error.value)
        with pytest.raises(TypeError, match="a PackedWeight takes a QuantizedActivation"):
            linear_with(make_weight())(torch.randn(2, 9, dtype=torch.bfloat16))

    def test_a_plain_weight_is_refused(self):
        weight = torch.randn(7, 9, dtype=torch.bfloat16)
        with pytest.raises(TypeError, match="activation of type QuantizedActivation and a weight of type Tensor"):
            F.linear(make_activation(2, 9), weight)
        with pytest.raises(TypeError, match="weight of type Parameter"):
            F.linear(make_activation(2, 9), nn.Parameter(weight))


class TestCopies:
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize(
        "change",
        [
            copy.deepcopy,
            torch.Tensor.detach,
            torch.Tensor.clone,
            torch.Tensor.contiguous,
            lambda w: w.to("cpu"),
            lambda w: w.to(device="cpu"),
            lambda w: w.to(device="cpu", copy=True),
            lambda w: w.to(torch.bfloat16),
            lambda w: w.to("cpu", torch.bfloat16),
            lambda w: w.bfloat16(),
            lambda w: w.cpu(),
            lambda w: nn.Parameter(w, requires_grad=False).data,
        ],
    )
    def test_keep_every_code(self, change, bits):
        weight = make_weight(bits=bits)
        changed = change(weight)
        assert isinstance(changed, PackedWeight)
        assert same(changed, weight)

    @pytest.mark.parametrize("change", [copy.deepcopy, torch.Tensor.clone, lambda w: w.to("cpu", copy=True)])
    def test_share_nothing(self, change):
        weight = make_weight()
        changed, before = change(weight), weight.codes()
        changed.qdata.zero_(), changed.scale.zero_()
        assert torch.equal(weight.codes(), before) and weight.scale.min() > 0

    def test_to_meta_and_empty_like(self):
        weight = make_weight()
        for changed in (weight.to("meta"), torch.empty_like(weight, device="meta")):
            assert isinstance(changed, PackedWeight)
            assert changed.device.type == changed.qdata.device.type == changed.scale.device.type == "meta"
            assert (changed.shape, changed.hp_dtype, changed.in_features) == (weight.shape, torch.bfloat16, 9)
        assert torch.empty_like(weight).qdata.shape == weight.qdata.shape

    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("rows", [slice(0, 3), slice(2, None), slice(-3, None), slice(1, 6, 2), slice(0, 0)])
    def test_slice_of_rows(self, rows, bits):
        weight = make_weight(bits=bits)
        part = weight[rows]
        assert isinstance(part, PackedWeight) and part.shape == (len(range(7)[rows]), 9)
        assert torch.equal(part.codes(), weight.codes()[rows])
        assert torch.equal(part.scale, weight.scale[rows])
        x = make_activation(2, 9, bits=bits)
        assert torch.equal(F.linear(x, part), F.linear(x, weight)[:, rows])

    def test_narrow_takes_rows_as_well(self):
        assert torch.equal(make_weight().narrow(0, 2, 3).codes(), make_weight().codes()[2:5])

    @pytest.mark.parametrize("dim", [1, -1])
    def test_slice_of_columns_is_refused(self, dim):
        with pytest.raises(ValueError, match="rows only"):
            make_weight().narrow(dim, 0, 4)


class TestRefused:
    @pytest.mark.parametrize(
        "change, dtype",
        [
            (lambda w: w.to(torch.float16), "torch.float16"),
            (lambda w: w.to(dtype=torch.float32), "torch.float32"),
            (lambda w: w.to("cpu", torch.float64), "torch.float64"),
            (lambda w: w.half(), "torch.float16"),
            (lambda w: w.float(), "torch.float32"),
            (lambda w: w.double(), "torch.float64"),
            (lambda w: w.type(torch.float16), "torch.float16"),
        ],
    )
    def test_another_dtype(self, change, dtype):
        with pytest.raises(ValueError, match=f"cannot convert a quantized weight from torch.bfloat16 to {dtype}"):
            change(make_weight())

    @pytest.mark.parametrize(
        "operation",
        [
            lambda w: w + 1,
            lambda w: w * 2,
            lambda w: w.t(),
            lambda w: w @ torch.ones(9, 2),
            lambda w: torch.ones(2, 7) @ w,
            lambda w: w.sum(),
            lambda w: w.abs(),
            lambda w: w.view(-1),
            lambda w: w[0, 0],
            lambda w: torch.cat((w, w)),
            lambda w: F.embedding(torch.tensor([1]), w),
            lambda w: w.zero_(),
        ],
    )
    def test_what_is_not_supported_raises_and_changes_nothing(self, operation):
        weight = make_weight()
        with pytest.raises(NotImplementedError, match="PackedWeight"):
            operation(weight)
        assert same(weight, make_weight())

    def test_plain_tensors_are_not_copied_in_or_out(self):
        weight, plain = make_weight(), torch.zeros(7, 9)
        for attempt in (lambda: weight.copy_(plain), lambda: plain.copy_(weight)):
            with pytest.raises(TypeError, match="copy_: a Tensor and a PackedWeight"):
                attempt()
        assert same(weight, make_weight()) and not plain.any()


class TestStateDict:
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("assign", [False, True])
    def test_into_another_linear(self, assign, bits):
        source, target = linear_with(make_weight(bits=bits)), linear_with(make_weight(bits=bits, seed=9))
        assert not same(source.weight, target.weight)
        target.load_state_dict(source.state_dict(), assign=assign)
        assert isinstance(target.weight, nn.Parameter) and isinstance(target.weight, PackedWeight)
        assert same(target.weight, source.weight)

    def test_copying_leaves_the_source_alone(self):
        source, target = linear_with(make_weight()), linear_with(make_weight(seed=9))
        target.load_state_dict(source.state_dict())
        target.weight.qdata.zero_()
        assert same(source.weight, make_weight())

    @pytest.mark.parametrize(
        "other", [{"rows": 8}, {"columns": 10}, {"bits": 8}, {"dtype": torch.float32}], ids=lambda o: next(iter(o))
    )
    def test_of_another_kind_is_refused(self, other):
        target = linear_with(make_weight(**other))
        with pytest.raises(RuntimeError, match="weight"):
            target.load_state_dict(linear_with(make_weight()).state_dict())
        assert same(target.weight, make_weight(**other))

    @pytest.mark.parametrize("mmap", [False, True])
    def test_through_a_file(self, tmp_path, mmap):
        source = linear_with(make_weight(), random_scale(7))
        torch.save(source.state_dict(), tmp_path / "weights.pt")
        loaded = torch.load(tmp_path / "weights.pt", weights_only=True, mmap=mmap)
        assert same(loaded["weight"], source.weight)
        target = linear_with(make_weight(seed=9), random_scale(7, seed=9))
        target.load_state_dict(loaded)
        x = make_activation(3, 9)
        assert torch.equal(target(x), source(x))

    def test_file_is_as_small_as_the_codes(self):
        buffer = io.BytesIO()
        torch.save(linear_with(make_weight(576, 576)).state_dict(), buffer)
        assert buffer.tell() <= 0.27 * 576 * 576 * 2 + 4096

    def test_onto_a_meta_model(self):
        source = linear_with(make_weight())
        target = linear_with(make_weight(seed=9).to("meta"))
        target.load_state_dict(source.state_dict(), assign=True)
        assert same(target.weight, source.weight)


class TwoConsumers(nn.Module):
    """A producer of one quantized activation, which two linears take, as q, k, v or gate, up do."""

    def __init__(self, per_row: bool):
        super().__init__()
        self.first = linear_with(make_weight(8, 16), random_scale(8))
        self.second = linear_with(make_weight(6, 16, bits=8, seed=3))
        self.register_buffer("scale", torch.tensor([0.3]))
        self.per_row = per_row

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.float()
        scale = x.abs().amax(dim=-1, keepdim=True) / 7.5 if self.per_row else self.scale
        codes = QuantizedActivation(quantize(x, scale, 4), scale, torch.bfloat16)
        return self.first(codes), self.second(codes.view(-1, 16))


class TestCompile:
    @pytest.mark.parametrize("per_row", [False, True], ids=["static", "per-row"])
    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_one_graph_with_equal_results(self, backend, per_row):
        module = TwoConsumers(per_row)
        options = {"emulate_precision_casts": True} if backend == "inductor" else None
        compiled = torch.compile(module, fullgraph=True, backend=backend, options=options)
        for rows in (3, 5):  # the second with a dynamic shape
            x = torch.randn(2, rows, 16, generator=torch.Generator().manual_seed(rows)).bfloat16()
            for got, expected in zip(compiled(x), module(x), strict=True):
                assert type(got) is torch.Tensor and torch.equal(got, expected)
