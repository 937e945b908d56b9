"""The reference of rope_store: what attention and cache did with separate operators, byte for byte."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from pq_ao.hadamard import hadamard_base, hadamard_transform
from pq_ao.ops import pack_int4, quantize, quantize_per_row, rope_store

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS, GROUPS, SLOTS, EPS = 4, 2, 12, 1e-6
STORED = {4: torch.uint8, 8: torch.int8}


@dataclass
class Case:
    """Arguments of rope_store, and what they give by separate operators."""

    batch: int = 2
    length: int = 3
    head_dim: int = 24
    start: int = 5
    bits: int = 4
    mode: str = "static"
    norms: bool = False
    rotation: bool = True
    shared_tables: bool = True
    heads: int = HEADS
    groups: int = GROUPS
    dtype: torch.dtype = torch.float32
    raw: bool = False
    raw_bias: bool = True
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        static, dynamic = (self.bits < 16 and self.mode == mode for mode in ("static", "dynamic"))
        cache = (self.batch, self.groups, SLOTS)
        width = self.head_dim // 2 if self.bits == 4 else self.head_dim
        stored = STORED.get(self.bits, self.dtype)
        angles = random(1 if self.shared_tables else self.batch, self.length, self.head_dim // 2).repeat(1, 1, 2)
        self.tensors = {
            "qkv": random(self.batch, self.length, (self.heads + 2 * self.groups) * self.head_dim).to(self.dtype),
            "cos": angles.cos().to(self.dtype),
            "sin": angles.sin().to(self.dtype),
            "rotation": hadamard_base(self.head_dim) if self.rotation else None,
            "query_norm": (1 + 0.3 * random(self.head_dim)).to(self.dtype) if self.norms else None,
            "key_norm": (1 + 0.3 * random(self.head_dim)).to(self.dtype) if self.norms else None,
            "keys": torch.zeros(*cache, width, dtype=stored),
            "values": torch.zeros(*cache, width, dtype=stored),
            "key_token_scale": torch.zeros(cache) if dynamic else None,
            "value_token_scale": torch.zeros(cache) if dynamic else None,
            "key_scale": 0.2 + 0.1 * random(self.groups).abs() if static else None,
            "value_scale": 0.2 + 0.1 * random(self.groups).abs() if static else None,
            "key_clip": 1 - 0.1 * random(self.groups).abs() if dynamic else None,
            "value_clip": 1 - 0.1 * random(self.groups).abs() if dynamic else None,
            "key_shift": random(self.groups, 1, self.head_dim) if self.bits < 16 else None,
            "value_shift": random(self.groups, 1, self.head_dim) if self.bits < 16 else None,
            "start": torch.tensor(self.start),
        }
        if self.raw:
            width = self.tensors["qkv"].shape[-1]
            self.tensors["qkv"] = (random(self.batch, self.length, width) * 1000).to(self.dtype)
            self.tensors["in_scale"] = 1e-3 + 1e-4 * random(width)
            if self.raw_bias:
                self.tensors["in_bias"] = 0.1 * random(width)

    def arguments(self) -> dict:
        given = {"norm_eps": EPS, "query_heads": self.heads, "bits": self.bits}
        return self.tensors | given

    def cache(self) -> list[Tensor]:
        names = ("keys", "values", "key_token_scale", "value_token_scale")
        return [self.tensors[name] for name in names if self.tensors[name] is not None]

    def separate_operators(self) -> tuple[Tensor, list[Tensor]]:
        """Queries [B, L, H, D] and the cache's tensors, from transformers' pieces and the plain quantizers."""
        t = self.tensors
        qkv = t["qkv"].view(self.batch, self.length, -1, self.head_dim)
        query, key, value = qkv.split((self.heads, self.groups, self.groups), dim=2)
        if self.norms:
            query, key = (self._norm(name)(x) for name, x in (("query_norm", query), ("key_norm", key)))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        query, key = apply_rotary_pos_emb(query.float(), key.float(), t["cos"].float(), t["sin"].float())
        if self.rotation:
            query, key = (hadamard_transform(x, t["rotation"]) for x in (query, key))
        written = [torch.zeros_like(tensor) for tensor in self.cache()]
        for i, (name, x) in enumerate((("key", key), ("value", value))):
            if self.bits == 16:
                codes = x.to(self.dtype)
            elif t["key_scale"] is not None:
                codes = quantize(x.float() - t[f"{name}_shift"], t[f"{name}_scale"].view(-1, 1, 1), self.bits)
            else:
                clip = t[f"{name}_clip"].view(-1, 1, 1)
                codes, scale = quantize_per_row(x.float() - t[f"{name}_shift"], clip, self.bits)
                written[2 + i][:, :, self.start : self.start + self.length] = scale.squeeze(-1)
            codes = pack_int4(codes) if self.bits == 4 else codes
            written[i][:, :, self.start : self.start + self.length] = codes
        return query.to(self.dtype).transpose(1, 2), written

    def _norm(self, name: str) -> Qwen3RMSNorm:
        norm = Qwen3RMSNorm(self.head_dim, eps=EPS)
        norm.weight.data = self.tensors[name]
        return norm


@pytest.mark.parametrize("bias", [True, False])
def test_accumulators_are_scaled_in_float32(bias):
    """Nothing between accumulators and codes is rounded to bfloat16."""
    case = Case(raw=True, raw_bias=bias, dtype=torch.bfloat16, bits=8)
    query = rope_store(**case.arguments())
    found = [tensor.clone() for tensor in case.cache()]
    case.tensors["qkv"] = case.tensors["qkv"] * case.tensors.pop("in_scale")
    if bias:
        case.tensors["qkv"] = case.tensors["qkv"] + case.tensors.pop("in_bias")
    expected, expected_cache = case.separate_operators()
    assert query.dtype == torch.bfloat16 and torch.equal(query, expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected_cache, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"length": 1, "batch": 1, "start": 0, "norms": True},
        {"norms": True, "dtype": torch.bfloat16, "shared_tables": False},
        {"rotation": False, "dtype": torch.float16, "head_dim": 32},
        {"batch": 3, "start": 9, "head_dim": 64, "groups": 1},
    ],
)
def test_equals_separate_operators(kwargs, mode, bits):
    case = Case(bits=bits, mode=mode, **kwargs)
    query = rope_store(**case.arguments())
    expected, expected_cache = case.separate_operators()
    assert query.dtype == case.dtype and query.is_contiguous() and torch.equal(query, expected)
    assert all(torch.equal(found, wanted) for found, wanted in zip(case.cache(), expected_cache, strict=True))


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_against_float64(mode):
    case = Case(mode=mode, bits=8, norms=False)
    query = rope_store(**case.arguments())
    t = {name: x.double() for name, x in case.tensors.items() if x is not None}
    qkv = t["qkv"].view(2, 3, -1, 24)
    swapped = torch.cat((-qkv[..., 12:], qkv[..., :12]), dim=-1)
    turned = hadamard_transform(qkv * t["cos"][:, :, None] + swapped * t["sin"][:, :, None])
    torch.testing.assert_close(query.double(), turned[:, :, :HEADS], rtol=1e-5, atol=1e-5)
    key = turned[:, :, HEADS : HEADS + GROUPS].transpose(1, 2)
    if mode == "static":
        scale = t["key_scale"].view(1, -1, 1, 1)
    else:
        absmax = (key - t["key_shift"]).abs().amax(dim=-1, keepdim=True)
        scale = t["key_clip"].view(-1, 1, 1) * absmax * (1 - 2**-12) / 127.5
        torch.testing.assert_close(t["key_token_scale"][:, :, 5:8, None], scale, rtol=1e-5, atol=0)
    written = (case.tensors["keys"][:, :, 5:8] - ((key - t["key_shift"]) / scale).clamp(-128, 127)).abs()
    assert written.max() <= 0.5 + 1e-3


@pytest.mark.parametrize("start", [10, 12, 40, -2])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_tokens_without_a_slot_are_not_written(start, mode):
    case, inside = Case(start=start, mode=mode), Case(start=4, mode=mode)
    query = rope_store(**case.arguments())
    assert torch.equal(query, rope_store(**inside.arguments()))
    slots = [slot for slot in range(start, start + 3) if 0 <= slot < SLOTS]
    for found, shifted in zip(case.cache(), inside.cache(), strict=True):
        expected = torch.zeros_like(found)
        for slot in slots:
            expected[:, :, slot] = shifted[:, :, 4 + slot - start]
        assert torch.equal(found, expected)


def test_other_slots_keep_what_they_hold():
    case = Case(start=2)
    for tensor in case.cache():
        tensor.fill_(77)
    rope_store(**case.arguments())
    for tensor in case.cache():
        assert (tensor[:, :, :2] == 77).all() and (tensor[:, :, 5:] == 77).all() and (tensor[:, :, 2:5] != 77).any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bits": 3}, ValueError, "bits=3"),
        ({"bits": 8}, TypeError, "keys are"),
        ({"qkv": torch.ones(2, 3, 190)}, ValueError, "qkv has shape"),
        ({"cos": torch.ones(3, 3, 24)}, ValueError, "cos has shape"),
        ({"rotation": torch.ones(3, 2)}, ValueError, "rotation has shape"),
        ({"query_norm": torch.ones(24)}, ValueError, "go together"),
        ({"key_scale": None}, ValueError, "token scales are missing"),
        ({"key_shift": None}, ValueError, "shifts are missing"),
        ({"value_scale": torch.ones(3)}, ValueError, "scales of shape"),
        ({"key_clip": torch.ones(2)}, ValueError, "clips do not belong here"),
        ({"start": torch.tensor(0.0)}, TypeError, "start is"),
        ({"in_bias": torch.ones(192)}, ValueError, "goes with in_scale"),
        ({"in_scale": torch.ones(192)}, TypeError, "accumulators in torch.bfloat16"),
        ({"qkv": torch.ones(2, 3, 192).bfloat16(), "in_scale": torch.ones(8)}, ValueError, "in_scale is"),
        ({"keys": torch.zeros(2, 2, 12, 24, dtype=torch.uint8)[..., ::2]}, ValueError, "contiguous"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        rope_store(**(Case().arguments() | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value_clip": None}, "clips are missing"),
        ({"key_shift": None}, "shifts are missing"),
        ({"value_token_scale": None}, "token scales are missing"),
        ({"key_scale": torch.ones(2)}, "token scales do not belong here"),
        ({"value_scale": torch.ones(2)}, "scales do not belong here"),
        ({"key_clip": torch.ones(3)}, r"clips of shape \[3\]; \[2\]"),
        ({"key_clip": torch.ones(2).double()}, "key_clip is torch.float64"),
        ({"value_clip": torch.ones(1).expand(2)}, "value_clip is .* contiguous"),
        ({"value_clip": torch.tensor([0.9, -0.1])}, "value_clip is .* factors above 0"),
        ({"value_shift": torch.zeros(2, 24)}, "shifts of shape"),
    ],
)
def test_errors_of_dynamic_mode_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        rope_store(**(Case(mode="dynamic").arguments() | change))


def test_16_bits_take_neither_clips_nor_shifts():
    for name, tensor in (("key_clip", torch.ones(2)), ("value_shift", torch.zeros(2, 1, 24))):
        with pytest.raises(ValueError, match="do not belong here"):
            rope_store(**(Case(bits=16).arguments() | {name: tensor}))


@pytest.mark.parametrize(("mode", "bits"), [("static", 4), ("dynamic", 4), ("static", 16)])
def test_opcheck(mode, bits):
    arguments = Case(mode=mode, bits=bits, norms=True, raw=bits == 16, dtype=torch.bfloat16).arguments()
    torch.library.opcheck(torch.ops.pq_ao.rope_store.default, (), arguments)
