"""rope_store at the shapes of Llama-3-8B, of heads with norms (Qwen3), and of head dims with a base (80 = 20 * 4)."""

from pq_ao.ops.kernels.rope_rows import RowsTiling, rope_rows_kernel
from pq_ao.ops.kernels.rope_store import choose_tiling, rope_store_kernel
from tests.kernels.specimens import Specimen

_SIZES = {"tokens": "i32", "length": "i32", "slots": "i32", "table_rows": "i32", "eps": "fp32"}
_STORED = {4: "*u8", 8: "*i8", 16: "*bf16"}


def _specimen(
    name: str, tokens: int, head_dim: int = 128, order: int = 1, bits: int = 4, dynamic: bool = False,
    norms: bool = False, raw: bool = False, early: bool = False,
) -> Specimen:  # fmt: skip
    """As the launcher would choose it for that many tokens."""
    tiling = choose_tiling(tokens, 8, head_dim, order)
    low, high = (-8, 7) if bits == 4 else (-128, 127)
    constants = {
        "H": 32, "G": 8, "D": head_dim, "BITS": bits, "DYNAMIC": dynamic, "LOW": low, "HIGH": high,
        "BLOCK_H": tiling.block_h,
    }  # fmt: skip
    options = {"num_warps": tiling.warps, "enable_fp_fusion": False} | ({"launch_pdl": True} if early else {})
    if isinstance(tiling, RowsTiling):
        kernel = rope_rows_kernel
        constants |= {"ROTATION": order > 0, "WARPS": tiling.warps, "REPEAT": tiling.repeat, "EARLY": early}
    else:
        kernel = rope_store_kernel
        constants |= {
            "BASE": order, "FLAT": True, "BLOCK_T": tiling.block_t, "BLOCK_D": 128 if head_dim > 128 else 64,
            "EARLY": early,
        }  # fmt: skip
    types = {name: "*bf16" for name in ("qkv_ptr", "cos_ptr", "sin_ptr", "query_ptr")}
    types |= {"base_ptr": "*fp32", "keys_ptr": _STORED[bits], "values_ptr": _STORED[bits], "start_ptr": "*i64"}
    if raw:
        types |= {"in_scale_ptr": "*fp32", "in_bias_ptr": "*fp32"}
    if norms:
        types |= {"query_norm_ptr": "*bf16", "key_norm_ptr": "*bf16"}
    if bits < 16:
        kinds = ("token_scale", "clip", "shift") if dynamic else ("scale", "shift")
        types |= {f"{name}_{kind}_ptr": "*fp32" for name in ("key", "value") for kind in kinds}
    aligned = tuple(types)
    types |= _SIZES
    for argument in kernel.arg_names:
        if argument not in types and argument not in constants:
            constants[argument] = None
    if kernel is rope_rows_kernel:
        types.pop("base_ptr")
        aligned = tuple(name for name in aligned if name != "base_ptr")
    return Specimen(
        f"rope_store {name}", kernel, types, constants, options, minimum_arch=90 if early else 80, aligned=aligned
    )  # fmt: skip


SPECIMENS = [
    _specimen("decode", 1),
    _specimen("decode, early", 1, early=True),
    _specimen("decode, accumulators", 1, raw=True),
    _specimen("decode of 128", 128),
    _specimen("decode of 128, early", 128, early=True),
    _specimen("prefill", 8192),
    _specimen("prefill, accumulators", 8192, raw=True),
    _specimen("decode, dynamic", 1, dynamic=True),
    _specimen("prefill, dynamic", 8192, dynamic=True),
    _specimen("prefill, 8 bits, dynamic, norms", 8192, bits=8, dynamic=True, norms=True),
    _specimen("prefill, 16 bits", 8192, bits=16),
    _specimen("64 wide", 8192, head_dim=64),
    _specimen("80 wide", 8192, head_dim=80, order=20),
    _specimen("256 wide", 8192, head_dim=256),
    _specimen("no rotation", 8192, order=0),
]
