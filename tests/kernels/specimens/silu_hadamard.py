"""silu_hadamard at the widths of Llama-3-8B (28 * 512), Llama-2-7B (172 * 64) and of a power of two."""

from dataclasses import replace

from pq_ao.ops import code_range
from pq_ao.ops.kernels.silu_hadamard import choose_tiling, silu_hadamard_kernel, silu_quantize_kernel
from pq_ao.ops.kernels.silu_halves import HalvesTiling, silu_halves_kernel, silu_tables_kernel
from pq_ao.ops.kernels.silu_rows import RowsTiling, silu_rows_kernel
from tests.kernels.specimens import Specimen

_NO_ACCUMULATORS = {"in_scale_ptr": None, "in_bias_ptr": None}
_ACCUMULATORS = {"in_scale_ptr": "*fp32", "in_bias_ptr": "*fp32"}
_TYPES = {"gate_up_ptr": "*bf16", "shift_ptr": "*fp32", "row_scale_ptr": "*fp32"}
_MODES = {False: ("scale_ptr", "clip_ptr"), True: ("clip_ptr", "scale_ptr")}  # by dynamic: used, unused


def _specimen(
    name: str, features: int, order: int, rows: int, codes: str = "i8", dynamic: bool = False, flat: bool = True,
    raw: bool = False, early: bool = False, bits: int = 4, even: bool = False,
) -> Specimen:  # fmt: skip
    """As the launcher would choose it for that many rows."""
    tiling = choose_tiling(features, order, rows, dynamic, raw, halves=bits == 4 and not dynamic)
    used, unused = _MODES[dynamic]
    types = _TYPES | {used: "*fp32", "codes_ptr": f"*{codes}", "base_ptr": "*fp32"}
    low, high = code_range(4, "even" if even or dynamic or bits == 8 else "spread")
    constants = {
        "F": features, "BASE": order, "FOLD": tiling.fold, "FLAT": flat, "DYNAMIC": dynamic, "LOW": low,
        "HIGH": high, unused: None,
    }  # fmt: skip
    if isinstance(tiling, HalvesTiling):
        tiling = replace(tiling, registers=None) if rows <= 132 else tiling
        return _halves(name, features, order, tiling, codes, raw, low, high, raw or rows > 264, early)
    if raw:
        types |= _ACCUMULATORS
    elif not isinstance(tiling, RowsTiling):
        constants |= _NO_ACCUMULATORS
    aligned = tuple(types)
    if isinstance(tiling, RowsTiling):
        options = tiling.options()
        constants |= {name: options.pop(name) for name in tuple(options) if name.isupper()}
        kernel = silu_rows_kernel
        types["rows"] = "i32"
    else:
        constants |= {
            "T": tiling.t, "L2": tiling.l2, "SPLIT": tiling.split, "GROUP": tiling.group, "BLOCK_OUT": tiling.block_out,
            "BLOCK_K": tiling.block_k, "BLOCK_L2": max(16, tiling.l2), "EARLY": early,
        }  # fmt: skip
        kernel, options = silu_hadamard_kernel, tiling.options() | ({"launch_pdl": True} if early else {})
    return Specimen(
        f"silu_hadamard {name}", kernel, types, constants, options,
        minimum_arch=90 if codes.startswith("fp8") or early else 80, aligned=aligned,
        everywhere=kernel is silu_hadamard_kernel and rows > 96,  # these take the most shared memory
    )  # fmt: skip


def _halves(
    name: str,
    features: int,
    order: int,
    tiling: HalvesTiling,
    codes: str,
    raw: bool,
    low: int,
    high: int,
    several: bool,
    early: bool,
) -> Specimen:
    options = tiling.options() | ({"launch_pdl": True} if early else {})
    constants = {"F": features, "BASE": order, "LOW": low, "HIGH": high, "SEVERAL": several, "WAITS": early}
    constants |= {key: options.pop(key) for key in tuple(options) if key.isupper()}
    types = {
        "gate_up_ptr": "*bf16", "base_ptr": "*fp32", "scale_ptr": "*fp32",
        "offsets_ptr": "*i32" if several else "*fp32", "codes_ptr": f"*{codes}",
    }  # fmt: skip
    if raw:
        types["factors_ptr"] = "*i32"
    else:
        constants["factors_ptr"] = None
    return Specimen(
        f"silu_hadamard {name}", silu_halves_kernel, types | {"rows": "i32"}, constants, options,
        minimum_arch=90 if codes.startswith("fp8") or early else 80, aligned=tuple(types),
    )  # fmt: skip


def _tables(name: str, raw: bool, shifted: bool) -> Specimen:
    types = {"scale_ptr": "*fp32", "offsets_ptr": "*i32"} | ({"shift_ptr": "*fp32"} if shifted else {})
    constants = {"F": 14336, "W": 8, "BLOCK": 256, "LOW": -11, "HIGH": 10} | ({} if shifted else {"shift_ptr": None})
    if raw:
        types |= _ACCUMULATORS | {"factors_ptr": "*i32"}
    else:
        constants |= _NO_ACCUMULATORS | {"factors_ptr": None}
    return Specimen(f"silu_tables {name}", silu_tables_kernel, types, constants, aligned=tuple(types))


def _unrotated(name: str, dynamic: bool) -> Specimen:
    used, unused = _MODES[dynamic]
    constants = {
        "F": 14336, "BLOCK": 16384 if dynamic else 2048, "DYNAMIC": dynamic, "EARLY": False, unused: None,
        "LOW": -8 if dynamic else -11, "HIGH": 7 if dynamic else 10,
    }  # fmt: skip
    return Specimen(
        name, silu_quantize_kernel, _TYPES | {used: "*fp32", "codes_ptr": "*i8"}, constants | _NO_ACCUMULATORS,
        {"num_warps": 16 if dynamic else 4}, aligned=("gate_up_ptr", "codes_ptr"),
    )  # fmt: skip


SPECIMENS = [
    _specimen("14336 decode", 14336, 28, 1),
    _specimen("14336 decode, early", 14336, 28, 1, early=True),
    _specimen("14336 decode, accumulators", 14336, 28, 1, raw=True),
    _specimen("14336 prefill", 14336, 28, 8192),
    _specimen("14336 decode of 128", 14336, 28, 128),
    _specimen("14336 decode of 128, early", 14336, 28, 128, early=True),
    _specimen("14336 prefill, even codes, float8", 14336, 28, 8192, codes="fp8e4nv", even=True),
    _specimen("14336 prefill, float8", 14336, 28, 8192, codes="fp8e4nv"),
    _specimen("14336 prefill, accumulators, float8", 14336, 28, 8192, codes="fp8e4nv", raw=True),
    _specimen("28672 prefill", 28672, 28, 8192),
    _specimen("8192 prefill", 8192, 1, 8192),
    _specimen("12288 prefill", 12288, 12, 8192),
    _tables("with a shift", raw=False, shifted=True),
    _tables("of accumulators", raw=True, shifted=False),
    _specimen("14336 prefill, 8 bits", 14336, 28, 8192, bits=8),
    _specimen("14336 prefill, dynamic", 14336, 28, 8192, dynamic=True),
    _specimen("14336 decode, dynamic", 14336, 28, 1, dynamic=True),
    _specimen("11008 prefill", 11008, 172, 8192),
    _specimen("18944, 300 rows", 18944, 148, 300),
    _specimen("18944, 300 rows, accumulators", 18944, 148, 300, raw=True),
    _specimen("18944, 1 row, accumulators", 18944, 148, 1, raw=True),
    _specimen("8192 decode", 8192, 1, 1),
    _specimen("18 with a DCT", 18, 9, 1, flat=False),
    _unrotated("silu_quantize", dynamic=False),
    _unrotated("silu_quantize, dynamic", dynamic=True),
]
