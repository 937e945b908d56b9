"""silu_hadamard at the widths of Llama-3-8B (28 * 512), Llama-2-7B (172 * 64) and of a power of two."""

from dataclasses import replace

from pq_ao.ops.kernels.silu_hadamard import Tiling, choose_tiling, silu_hadamard_kernel, silu_quantize_kernel
from tests.kernels.specimens import Specimen

_TYPES = {"gate_up_ptr": "*bf16", "scale_ptr": "*fp32", "shift_ptr": "*fp32", "row_scale_ptr": "*fp32"}


def _specimen(
    name: str, features: int, order: int, tiling: Tiling, codes: str = "i8", dynamic: bool = False, flat: bool = True
) -> Specimen:
    types = _TYPES | {"codes_ptr": f"*{codes}", "base_ptr": "*fp32", "rows": "i32"}
    constants = {
        "F": features, "BASE": order, "FOLD": tiling.fold, "T": tiling.t, "L2": tiling.l2, "SPLIT": tiling.split,
        "GROUP": tiling.group, "BLOCK_OUT": tiling.block_out, "BLOCK_K": tiling.block_k,
        "BLOCK_L2": max(16, tiling.l2), "FLAT": flat, "DYNAMIC": dynamic, "LOW": -8, "HIGH": 7,
        "STAGES": tiling.stages, "PDL": tiling.pdl,
    }  # fmt: skip
    if dynamic:
        del types["shift_ptr"]
        constants["shift_ptr"] = None
    return Specimen(
        f"silu_hadamard {name}", silu_hadamard_kernel, types, constants, tiling.options(),
        minimum_arch=90 if codes.startswith("fp8") or tiling.pdl else 80,
        aligned=tuple(pointer for pointer in types if pointer.endswith("_ptr")),
    )  # fmt: skip


def _chosen(features: int, order: int, rows: int, dynamic: bool = False) -> Tiling:
    return choose_tiling(features, order, rows, dynamic)


SPECIMENS = [
    _specimen("14336 decode", 14336, 28, _chosen(14336, 28, 1)),
    _specimen("14336 decode, dependent launch", 14336, 28, replace(_chosen(14336, 28, 1), pdl=True)),
    _specimen("14336 prefill, float8", 14336, 28, _chosen(14336, 28, 8192), codes="fp8e4nv"),
    _specimen("14336 prefill, pipelined", 14336, 28, replace(_chosen(14336, 28, 8192), stages=2)),
    _specimen("14336 dynamic", 14336, 28, _chosen(14336, 28, 8192, True), dynamic=True),
    _specimen("11008 prefill", 11008, 172, _chosen(11008, 172, 8192)),
    _specimen("8192 decode", 8192, 1, _chosen(8192, 1, 1)),
    _specimen("18 with a DCT", 18, 9, _chosen(18, 9, 1), flat=False),
    Specimen(
        "silu_quantize", silu_quantize_kernel, _TYPES | {"codes_ptr": "*i8"},
        {"F": 14336, "BLOCK": 2048, "DYNAMIC": False, "LOW": -8, "HIGH": 7, "PDL": False}, {"num_warps": 4},
        aligned=("gate_up_ptr", "codes_ptr"),
    ),
]  # fmt: skip
