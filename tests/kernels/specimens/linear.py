"""Kernels of the linear, as launched for the layers of Llama-3-8B."""

from pq_ao.ops.kernels.gemv import gemv_config, gemv_kernel
from pq_ao.ops.kernels.tile_linear import TileConfig, tile_config, tile_kernel
from pq_ao.ops.kernels.unpack import unpack_kernel
from tests.kernels.specimens import Specimen

_COMMON = {"x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32", "bias_ptr": "*fp32", "y_ptr": "*bf16", "outs": "i32"}
_ALIGNED = ("x_ptr", "x_scale_ptr", "w_ptr", "w_scale_ptr", "bias_ptr", "y_ptr", "outs")


# outputs and inputs of Llama-3-8B
_LAYERS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}


def _gemv(name: str, rows: int, outs: int, inner: int, packed: bool = True, early: bool = False) -> Specimen:
    row_words = inner // (8 if packed else 4)
    config = gemv_config(rows, outs, row_words, packed)
    constants = {"ROWS": rows, "ROW_WORDS": row_words, "PACKED": packed, "PER_ROW": False, "HAS_BIAS": True}
    constants |= {"RAW": False, "OUTPUTS": config.outputs, "WORDS": 128 * config.warps, "AHEAD": config.ahead}
    options = {"num_warps": config.warps, "enable_fp_fusion": False} | ({"launch_pdl": True} if early else {})
    return Specimen(
        name=f"linear gemv {name}",
        kernel=gemv_kernel,
        types=_COMMON | {"x_ptr": "*i32", "w_ptr": "*i32"},
        constants=constants | {"EARLY": early},
        options=options,
        minimum_arch=90 if early else 80,
        aligned=_ALIGNED,
    )


def _tile(name: str, config: TileConfig, packed: bool = True, even: bool = True, early: bool = False) -> Specimen:
    constants = {"PACKED": packed, "PER_ROW": True, "HAS_BIAS": True, "RAW": False, "EVEN": even, "EARLY": early}
    constants["TMA"] = config.tma
    constants |= {"OUTPUTS": config.outputs, "TOKENS": config.tokens, "DEPTH": config.depth, "SPLIT": config.split}
    sizes = ("rows", "inner", "row_bytes", "token_tiles")
    pointers = {"x_ptr": "*i8", "w_ptr": "*u8" if packed else "*i8", "partial_ptr": "*i32", "counter_ptr": "*i32"}
    if config.split == 1:
        constants |= {"partial_ptr": None, "counter_ptr": None}
        pointers = {name: pointers[name] for name in ("x_ptr", "w_ptr")}
    aligned = (*_ALIGNED, "inner", "row_bytes") if even else ()
    if config.tma:
        pointers["x_ptr"] = f"tensordesc<i8[{config.tokens}, {config.depth}]>"
        pointers["w_ptr"] = f"tensordesc<u8[{config.outputs}, {config.depth}]>"
        aligned = tuple(name for name in aligned if name not in pointers)
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": False}
    return Specimen(
        name=f"linear tile {name}",
        kernel=tile_kernel,
        types=_COMMON | pointers | dict.fromkeys(sizes, "i32"),
        constants=constants,
        options=options | ({"launch_pdl": True} if early else {}),
        minimum_arch=90 if early or config.tma else 80,
        aligned=aligned,
        everywhere=config.tma,
    )


def _chosen_tiles() -> list[Specimen]:
    """Whatever `tile_config` chooses, over numbers of tokens, layers and kinds of weights."""
    found = {}
    for rows in (8, 32, 64, 128, 256, 1024):
        for packed in (True, False):
            for outs, inner in _LAYERS.values():
                found[tile_config(rows, outs, inner // 2 if packed else inner, packed), packed] = None
    kinds = {True: "packed", False: "int8"}
    return [_tile(f"{kinds[packed]} {config}", config, packed) for config, packed in found]


SPECIMENS = [
    *(_gemv(f"{name} of {rows} rows", rows, *layer) for name, layer in _LAYERS.items() for rows in (1, 2, 4, 8)),
    *(_gemv(f"int8 head of {rows} rows", rows, 128256, 4096, packed=False) for rows in (2, 8)),
    _gemv("launched early", 1, 4096, 4096, early=True),
    *_chosen_tiles(),
    _tile("launched early", TileConfig(64, 32, 256, 2, 4, 3), early=True),
    _tile("by descriptor", tile_config(128, 28672, 2048, tma=True)),
    _tile("odd", TileConfig(64, 16, 128, 2, 4, 4), even=False),
    *(
        Specimen(
            name=f"linear unpack {'float8' if float8 else 'int8'}",
            kernel=unpack_kernel,
            types={"w_ptr": "*i32", "out_ptr": "*i32", "outs": "i32"},
            constants={"ROW_WORDS": 512, "FLOAT8": float8, "ROWS": 4, "WORDS": 512},
            options={"num_warps": 8},
            aligned=("w_ptr", "out_ptr", "outs"),
        )
        for float8 in (False, True)
    ),
]
