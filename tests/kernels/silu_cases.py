"""Inputs of silu_hadamard's kernels, and what is expected of them; for the interpreter or a GPU."""

import torch
from torch import Tensor

from pq_ao.hadamard import hadamard_base, hadamard_transform
from pq_ao.ops import silu_hadamard
from pq_ao.ops.kernels.silu_hadamard import Tiling, launch
from pq_ao.ops.kernels.silu_halves import HalvesTiling
from pq_ao.ops.kernels.silu_rows import RowsTiling
from pq_ao.ops.quantize import code_range
from tests.kernels.code_places import place_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLIPPED = 2e-3  # of the codes may differ, by one; 4 bits: 1e-4; 8 bits: 1e-3
# dB against float64; two bf16 parts in each of two products leave 95 in the interpreter, which cuts off
ROTATED_SQNR = 90.0
# 1.3e-3 to 3.9e-3 were seen with even codes; spread ones have 21 / 15 of their range, in the same bits: up to 5.4e-3
HALVES_FLIPPED = 5e-3
HALVES_SQNR = 61.0  # for codes that fill their range; 61.4 to 63.1 were seen
SCALE = 0.17  # which is about that for what `make_input` gives

AnyTiling = Tiling | RowsTiling | HalvesTiling | None


def make_input(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Gate and up, [rows, 2 * width], normal."""
    return torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(width)).to(dtype)


def make_accumulators(rows: int, width: int, bias: bool = True) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    """The same as accumulators, with their scales and biases."""
    in_bias = torch.linspace(-1, 1, 2 * width) if bias else None
    return (1000 * make_input(rows, width, torch.float32)).bfloat16(), (torch.linspace(5e-4, 2e-3, 2 * width), in_bias)


def run(
    gate_up: Tensor, base: Tensor | None, scale: Tensor | None, clip: Tensor | None, shift: Tensor | None, bits: int,
    encoding: torch.dtype, tiling: AnyTiling = None, in_scale: Tensor | None = None, in_bias: Tensor | None = None,
    code_set: str = "even",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes and row scales of the launcher."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    codes = torch.empty(rows, width, dtype=encoding, device=DEVICE)
    row_scale = torch.empty(rows, 1, device=DEVICE)
    on_device = [t if t is None else t.to(DEVICE) for t in (gate_up, base, scale, clip, shift, in_scale, in_bias)]
    launch(*on_device[:5], bits, codes, row_scale, tiling, *on_device[5:], code_set)
    return codes.cpu(), row_scale.cpu()


def rotated(gate_up: Tensor, base: Tensor, in_scale: Tensor | None = None, in_bias: Tensor | None = None) -> Tensor:
    """What is quantized, but for the shift, in float64."""
    x = gate_up.double()
    if in_scale is not None:
        x = x * in_scale + (0 if in_bias is None else in_bias)
    gate, up = x.chunk(2, dim=-1)
    return hadamard_transform(torch.nn.functional.silu(gate) * up, base.double())


def check_floats(
    gate_up: Tensor, tiling: AnyTiling = None, base: Tensor | None = None, raw: tuple = (None, None),
    floor: float = ROTATED_SQNR, scale: float = 1.0,
) -> None:  # fmt: skip
    """What is quantized is that of float64, to `floor` dB."""
    base = hadamard_base(gate_up.shape[1] // 2) if base is None else base
    found, _ = run(gate_up, base, torch.tensor([scale]), None, None, 4, torch.float32, tiling, *raw)
    expected = rotated(gate_up, base, *raw)
    assert 10 * torch.log10(expected.square().sum() / (found - expected).square().sum()) > floor


def check_codes(
    gate_up: Tensor, dynamic: bool, bits: int, encoding: torch.dtype, tiling: AnyTiling = None,
    raw: tuple = (None, None), shifted: bool = True, flipped: float = FLIPPED, scale: float = SCALE,
    code_set: str = "even",
) -> None:  # fmt: skip
    """Codes are those of the op's reference, but for a share of `flipped`, of even ones, that may be the next one."""
    width = gate_up.shape[1] // 2
    base = hadamard_base(width)
    scale, clip = (None, torch.tensor([0.85])) if dynamic else (torch.tensor([scale]), None)
    shift = torch.linspace(-0.5, 0.5, width) if shifted else None
    codes, row_scale = run(gate_up, base, scale, clip, shift, bits, encoding, tiling, *raw, code_set)
    expected, expected_scale = silu_hadamard(gate_up, base, scale, clip, shift, bits, encoding, *raw, code_set)
    assert codes.dtype == encoding
    low, high = code_range(bits, code_set)
    flipped *= (high - low) / (2**bits - 1)
    difference = (place_of(codes, code_set) - place_of(expected, code_set)).abs()
    assert difference.max() <= 1 and (difference > 0).sum() <= max(1, flipped * codes.numel())
    if dynamic:
        torch.testing.assert_close(row_scale, expected_scale, rtol=1e-4, atol=0)
