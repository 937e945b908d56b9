"""The INT8 head of Llama-3: two rows of digits on dp4a, and many on tensor cores; int32 sums are stored."""

from pq_ao.ops.kernels.gemv import gemv_kernel
from pq_ao.ops.kernels.tile_linear import tile_kernel
from tests.kernels.specimens import Specimen

_NONE = {"x_scale_ptr": None, "w_scale_ptr": None, "bias_ptr": None, "PACKED": False, "PER_ROW": False}
_NONE |= {"HAS_BIAS": False, "RAW": True}
_SIZES = {"rows": "i32", "outs": "i32", "inner": "i32", "row_bytes": "i32", "token_tiles": "i32"}

SPECIMENS = [
    Specimen(
        "int8 head gemv",
        gemv_kernel,
        {"x_ptr": "*i32", "w_ptr": "*i32", "y_ptr": "*i32", "outs": "i32"},
        _NONE | {"ROWS": 2, "ROW_WORDS": 1024, "OUTPUTS": 8, "WORDS": 512, "AHEAD": 4, "EARLY": False},
        {"num_warps": 4, "enable_fp_fusion": False},
        aligned=("x_ptr", "w_ptr", "y_ptr", "outs"),
    ),
    Specimen(
        "int8 head tile",
        tile_kernel,
        {"x_ptr": "*i8", "w_ptr": "*i8", "y_ptr": "*i32"} | _SIZES,
        _NONE
        | {"partial_ptr": None, "counter_ptr": None, "EVEN": True}
        | {"OUTPUTS": 128, "TOKENS": 64, "DEPTH": 128, "SPLIT": 1},
        {"num_warps": 4, "num_stages": 4, "enable_fp_fusion": False},
        aligned=("x_ptr", "w_ptr", "y_ptr", "outs", "inner", "row_bytes"),
    ),
]
