"""The decode kernel at the shape of Llama-3-8B, and heads that do not fill the tensor core's tiles."""

from pq_ao.ops import code_range
from pq_ao.ops.kernels.decode_attention import Tiles, decode_kernel
from tests.kernels.specimens import Specimen

_SCALES = {"key_scale_ptr": "*fp32", "value_scale_ptr": "*fp32"}
_SHIFTS = {"key_shift_ptr": "*fp32", "value_shift_ptr": "*fp32"}
_OUTPUT = {"out_scale_ptr": "*fp32", "out_shift_ptr": "*fp32"}
_POINTERS = (*_SCALES, *_SHIFTS, *_OUTPUT, "visible_ptr")
_COMMON = {
    **{"query_ptr": "*bf16", "prefix_key_ptr": "*bf16", "prefix_value_ptr": "*bf16", "start_ptr": "*i64"},
    **{"scratch_ptr": "*fp32", "counters_ptr": "*i32", "scaling_log2e": "fp32", "slots": "i32", "prefix_len": "i32"},
    **{"parts": "i32", "visible_stride": "i32", "stride_b": "i32", "stride_l": "i32", "stride_h": "i32"},
}
_INT4, _INT8, _BF16 = ("i32", 4, 8), ("i32", 8, 4), ("bf16", 16, 1)
_STATIC = _SCALES | _SHIFTS | _OUTPUT
_PADDED = {"visible_ptr": "*i1"}

_CODES = Tiles(warps=1, slots=32, stages=3, splits=2)
_MANY = _CODES._replace(registers=144, prefix_apart=False)  # many KV heads
_WALK = Tiles(warps=1, slots=64, stages=3, splits=2)


def _specimen(
    name, types, stored, tiles, *, out="i8", queries=1, repeat=4, head_dim=128, codes=False, per_token=False,
    prefix=True, even=True, early=False, codes_of="even", minimum_arch=80,
):  # fmt: skip
    word, bits, planes = stored
    words, (low, high) = head_dim // planes, code_range(4, codes_of)
    types = _COMMON | types | {"keys_ptr": f"*{word}", "values_ptr": f"*{word}", "out_ptr": f"*{out}"}
    constants = {
        **{pointer: None for pointer in _POINTERS if pointer not in types},
        **{"QUERIES": queries, "HEADS": 8 * repeat, "REPEAT": repeat, "HEAD_DIM": head_dim, "BITS": bits},
        **{"PLANES": planes, "WORDS": words, "WORDS_PADDED": max(16, words), "PER_TOKEN": per_token},
        **{"CODES": codes, "PREFIX": prefix, "PREFIX_APART": prefix and (tiles.prefix_apart or not codes)},
        **{"LOW": low, "HIGH": high, "ONE_PART": tiles.splits == 1 and not tiles.prefix_apart, "WARPS": tiles.warps},
        **{"TILE": tiles.slots, "STAGES": tiles.stages, "SLOTS_FIRST": tiles.slots_first, "EVEN": even, "EARLY": early},
    }
    options = {"num_warps": tiles.warps} | ({} if tiles.registers is None else {"maxnreg": tiles.registers})
    aligned = tuple(key for key in types if key.endswith("_ptr") or key.startswith("stride"))
    return Specimen(
        f"decode_attention/{name}", decode_kernel, types, constants, options, minimum_arch,
        (*aligned, "slots") if even else aligned,
    )  # fmt: skip


SPECIMENS = [
    _specimen("int4", _STATIC, _INT4, _CODES, codes=True, early=True, codes_of="wide", minimum_arch=90),
    _specimen("int4, many heads", _STATIC, _INT4, _MANY, codes=True, codes_of="wide"),
    _specimen("int4, one part", _STATIC, _INT4, _MANY._replace(splits=1), codes=True),
    _specimen("int4, no prefix", _STATIC, _INT4, _CODES, codes=True, prefix=False),
    _specimen(
        "int4 per token, padded", _SCALES | _SHIFTS | _PADDED, _INT4, _CODES, codes=True, per_token=True, out="fp32"
    ),
    _specimen(
        "int4, padded, two queries, slots uneven",
        _STATIC | _PADDED,
        _INT4,
        _MANY,
        codes=True,
        queries=2,
        even=False,
        out="fp8e4nv",
        minimum_arch=90,
    ),
    _specimen("int8", _STATIC, _INT8, _CODES, codes=True),
    _specimen("int8 per token, many heads", _SCALES, _INT8, _MANY._replace(registers=168), codes=True, per_token=True),
    _specimen("int4 of 64", _STATIC, _INT4, _WALK, head_dim=64),
    _specimen("int4 of 30, no prefix", _STATIC, ("u8", 4, 2), _WALK, head_dim=30, prefix=False),
    _specimen("int4, 16 rows", _STATIC, _INT4, Tiles(4, 32, 3, 2, slots_first=False), queries=4),
    _specimen("bfloat16", {}, _BF16, Tiles(2, 32, 3, 2, slots_first=False), out="fp32"),
]
