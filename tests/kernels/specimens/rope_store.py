"""rope_store at the shapes of Llama-3-8B, of heads with norms (Qwen3), and of head dims with a base (80 = 20 * 4)."""

from pq_ao.ops.kernels.rope_store import Tiling, choose_tiling, rope_store_kernel
from tests.kernels.specimens import Specimen

_SIZES = {"tokens": "i32", "length": "i32", "slots": "i32", "table_stride": "i32", "eps": "fp32"}
_STORED = {4: "*u8", 8: "*i8", 16: "*bf16"}


def _specimen(
    name: str, tiling: Tiling, head_dim: int = 128, order: int = 1, bits: int = 4, dynamic: bool = False,
    norms: bool = False,
) -> Specimen:  # fmt: skip
    low, high = (-8, 7) if bits == 4 else (-128, 127)
    constants = {
        "H": 32, "G": 8, "D": head_dim, "BASE": order, "FLAT": True, "BITS": bits, "DYNAMIC": dynamic, "LOW": low,
        "HIGH": high, "BLOCK_T": tiling.block_t, "BLOCK_H": tiling.block_h, "BLOCK_D": 128 if head_dim > 128 else 64,
        "PDL": tiling.pdl,
    }  # fmt: skip
    types = {name: "*bf16" for name in ("qkv_ptr", "cos_ptr", "sin_ptr", "query_ptr")}
    types |= {"base_ptr": "*fp32", "keys_ptr": _STORED[bits], "values_ptr": _STORED[bits], "start_ptr": "*i64"}
    if norms:
        types |= {"query_norm_ptr": "*bf16", "key_norm_ptr": "*bf16"}
    if dynamic:
        types |= {"key_token_scale_ptr": "*fp32", "value_token_scale_ptr": "*fp32"}
    elif bits < 16:
        kinds = ("key_scale", "value_scale", "key_shift", "value_shift")
        types |= {f"{kind}_ptr": "*fp32" for kind in kinds}
    aligned = tuple(types)
    types |= _SIZES
    for argument in rope_store_kernel.arg_names:
        if argument not in types and argument not in constants:
            constants[argument] = None
    options = {"num_warps": tiling.warps, "enable_fp_fusion": False}
    if tiling.pdl:
        options["launch_pdl"] = True
    return Specimen(
        f"rope_store {name}", rope_store_kernel, types, constants, options,
        minimum_arch=90 if tiling.pdl else 80, aligned=aligned,
    )  # fmt: skip


SPECIMENS = [
    _specimen("decode", choose_tiling(1, 8, 128)),
    _specimen("decode, dependent launch", Tiling(2, 8, 4, pdl=True)),
    _specimen("prefill", choose_tiling(8192, 8, 128)),
    _specimen("prefill, 8 bits, dynamic, norms", choose_tiling(8192, 8, 128), bits=8, dynamic=True, norms=True),
    _specimen("prefill, 16 bits", choose_tiling(8192, 8, 128), bits=16),
    _specimen("80 wide", choose_tiling(8192, 8, 80), head_dim=80, order=20),
    _specimen("256 wide", choose_tiling(8192, 8, 256), head_dim=256),
    _specimen("no rotation", choose_tiling(8192, 8, 128), order=0),
]
