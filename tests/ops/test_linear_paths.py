"""One function chooses the path, for the linear and for what feeds it."""

import itertools

import pytest
import torch

from pq_ao.ops import pack_int4
from pq_ao.ops.int_linear import int_accumulate, int_linear
from pq_ao.ops.linear_paths import LinearPath, capability_of, encoding, forced_path, linear_path

HOPPER, AMPERE, TURING = (9, 0), (8, 0), (7, 5)
DP4A, TILE, E4M3, INT_MM = LinearPath


@pytest.mark.parametrize(
    "tokens, out_features, in_features, bits, capability, expected",
    [
        (1, 4096, 4096, (4, 4), HOPPER, DP4A),
        (1, 4096, 4096, (4, 8), HOPPER, DP4A),
        (1, 4096, 4096, (8, 8), AMPERE, DP4A),
        (8, 4096, 4096, (4, 4), HOPPER, TILE),
        (8, 4096, 4096, (8, 8), HOPPER, DP4A),
        (1, 5, 20, (4, 4), HOPPER, TILE),
        (1, 5, 20, (8, 8), HOPPER, DP4A),
        (1, 5, 22, (8, 8), HOPPER, TILE),
        (32, 4096, 4096, (4, 4), HOPPER, TILE),
        (32, 7, 33, (4, 4), AMPERE, TILE),
        (4096, 4096, 4096, (4, 4), HOPPER, E4M3),
        (4096, 4096, 4096, (4, 8), HOPPER, TILE),
        (4096, 4096, 4096, (8, 8), HOPPER, TILE),
        (4096, 4096, 4104, (4, 4), HOPPER, TILE),
        (4096, 4104, 4096, (4, 4), HOPPER, TILE),
        (4096, 4096, 4096, (4, 4), AMPERE, TILE),
        (4096, 4096, 4096, (4, 4), TURING, INT_MM),
        (1, 4096, 4096, (4, 4), TURING, INT_MM),
        (1, 4096, 4096, (4, 4), None, INT_MM),
        (0, 4096, 4096, (4, 4), HOPPER, TILE),
    ],
)
def test_choice(tokens, out_features, in_features, bits, capability, expected):
    assert linear_path(tokens, out_features, in_features, *bits, capability) is expected


@pytest.mark.parametrize("tokens", [1, 4, 5, 128, 2048, 2049, 8192])
@pytest.mark.parametrize("capability", [None, TURING, AMPERE, (8, 9), HOPPER, (10, 0)])
@pytest.mark.parametrize("act_bits, weight_bits", [(4, 4), (8, 4), (8, 8)])
def test_producer_and_consumer_agree(tokens, capability, act_bits, weight_bits):
    path = linear_path(tokens, 4096, 14336, weight_bits, act_bits, capability)
    dtype = encoding(tokens, act_bits, weight_bits, capability)
    assert dtype == (torch.float8_e4m3fn if path is E4M3 else torch.int8)


def test_forced_path():
    with forced_path(TILE):
        assert linear_path(1, 64, 64, 4, 4, HOPPER) is TILE
        with forced_path(E4M3):
            assert linear_path(1, 64, 64, 4, 4, HOPPER) is E4M3
            assert encoding(1, 4, 4, HOPPER) == torch.float8_e4m3fn
        assert linear_path(1, 64, 64, 4, 4, HOPPER) is TILE
    assert linear_path(1, 64, 64, 4, 4, HOPPER) is DP4A


@pytest.mark.parametrize(
    "path, arguments, reason",
    [
        (DP4A, (9, 64, 64, 4, 4, HOPPER), "1 to 8 tokens, not 9"),
        (DP4A, (1, 64, 60, 4, 4, HOPPER), "multiple of 8, not 60"),
        (DP4A, (1, 64, 64, 4, 4, None), "on the CPU"),
        (TILE, (1, 64, 64, 4, 4, TURING), r"\(8, 0\) or later"),
        (E4M3, (64, 64, 64, 4, 8, HOPPER), "not W4A8"),
        (E4M3, (64, 64, 64, 8, 8, HOPPER), "not W8A8"),
        (E4M3, (64, 64, 64, 4, 4, AMPERE), r"\(8, 9\) or later"),
        (E4M3, (64, 40, 64, 4, 4, HOPPER), "multiples of 16, not 64 in and 40 out"),
    ],
)
def test_forced_path_that_cannot(path, arguments, reason):
    with forced_path(path), pytest.raises(ValueError, match=reason):
        linear_path(*arguments)


def test_forced_path_reaches_the_linear():
    x, w = torch.ones(2, 8, dtype=torch.int8), torch.ones(3, 8, dtype=torch.int8)
    with forced_path(TILE), pytest.raises(ValueError, match="'tile' cannot run this linear"):
        int_linear(x, torch.ones(1), w, torch.ones(3), None, torch.float32)


@pytest.mark.parametrize("capability", [(8, 9), HOPPER])
def test_every_linear_has_a_path(capability):
    for tokens, features in itertools.product((0, 1, 3, 8, 9, 500, 5000), (1, 15, 16, 4096)):
        for weight_bits, act_bits in ((4, 4), (4, 8), (8, 8)):
            linear_path(tokens, features, features, weight_bits, act_bits, capability)


def test_float8_codes_are_read_exactly():
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 2)
    w = torch.randint(-8, 8, (5, 32), dtype=torch.int8)
    expected = int_accumulate(codes, pack_int4(w))
    assert torch.equal(int_accumulate(codes.to(torch.float8_e4m3fn), pack_int4(w)), expected)


def test_the_cpu_has_no_capability():
    assert capability_of(torch.device("cpu")) is None
