"""Attention kernels at the shape of Llama-3-8B, and one head that does not fill words."""

from pq_ao.ops.kernels.decode_attention import decode_kernel
from pq_ao.ops.kernels.prefill_attention import prefill_kernel, widen_kernel
from tests.kernels.specimens import Specimen

_SCALES = {"key_scale_ptr": "*fp32", "value_scale_ptr": "*fp32"}
_SHIFTS = {"key_shift_ptr": "*fp32", "value_shift_ptr": "*fp32"}
_OUTPUT = {"out_scale_ptr": "*fp32", "out_shift_ptr": "*fp32"}
_POINTERS = (*_SCALES, *_SHIFTS, *_OUTPUT, "visible_ptr")
_COMMON = {
    "query_ptr": "*bf16", "prefix_key_ptr": "*bf16", "prefix_value_ptr": "*bf16", "start_ptr": "*i64",
    "scaling_log2e": "fp32", "slots": "i32", "prefix_len": "i32", "visible_stride": "i32", "stride_b": "i32",
    "stride_l": "i32", "stride_h": "i32",
}  # fmt: skip
_DECODE = {"scratch_ptr": "*fp32", "counters_ptr": "*i32", "parts": "i32"}
_PREFILL = {"num_queries": "i32"}


def _stored(word: str, bits: int, planes: int, words: int) -> tuple[dict, dict]:
    constants = {"BITS": bits, "PLANES": planes, "WORDS": words, "WORDS_PADDED": max(16, words)}
    return {"keys_ptr": f"*{word}", "values_ptr": f"*{word}"}, constants


def _specimen(name, kernel, types, constants, stored, *, out="i8", heads=32, repeat=4, head_dim=128, warps=4, **more):
    stored_types, stored_constants = stored
    types = _COMMON | types | stored_types | {"out_ptr": f"*{out}"}
    constants = {
        **{pointer: None for pointer in _POINTERS if pointer not in types},
        **{"HEADS": heads, "REPEAT": repeat, "HEAD_DIM": head_dim, "PER_TOKEN": False, "LOW": -8, "HIGH": 7},
        **{"STAGES": 3},
        **stored_constants,
        **constants,
    }
    aligned = tuple(key for key in types if key.endswith("_ptr") or key.startswith("stride") or key == "slots")
    return Specimen(name, kernel, types, constants, {"num_warps": warps}, aligned=aligned, **more)


def _decode(name, types, stored, *, slots_first=True, tile=32, warps=4, queries=1, **more):
    constants = {
        "QUERIES": queries, "PREFIX_TILE": 4, "PARTS_PADDED": 64, "WARPS": warps, "TILE": tile,
        "SLOTS_FIRST": slots_first, "EVEN": True,
    }  # fmt: skip
    constants |= more.pop("constants", {})
    return _specimen(f"decode_attention/{name}", decode_kernel, _DECODE | types, constants, stored, warps=warps, **more)


def _prefill(name, types, stored, *, rows=128, tile=64, warps=8, **more):
    constants = {"PREFIX_TILE": 16, "ROWS": rows, "TILE": tile} | more.pop("constants", {})
    return _specimen(
        f"prefill_attention/{name}", prefill_kernel, _PREFILL | types, constants, stored, warps=warps, **more
    )


_INT4, _INT4_BYTES = _stored("i32", 4, 8, 16), _stored("u8", 4, 2, 64)
_INT8, _BF16, _WIDENED = _stored("i32", 8, 4, 32), _stored("bf16", 16, 1, 128), _stored("fp16", 16, 1, 128)
_STATIC = _SCALES | _SHIFTS | _OUTPUT
_PER_TOKEN = _SCALES | _SHIFTS | {"visible_ptr": "*i1"}

SPECIMENS = [
    _decode("int4", _STATIC, _INT4, warps=1, tile=64),
    _decode("int4 by four warps", _STATIC, _INT4),
    _decode("int4 rows first", _STATIC, _INT4, slots_first=False),
    _decode("int4 per token", _PER_TOKEN, _INT4, out="fp32", constants={"PER_TOKEN": True}),
    _decode("int4 two queries", _STATIC, _INT4, queries=2, warps=1, tile=64, out="fp8e4nv", minimum_arch=90),
    _decode("int8", _STATIC, _INT8),
    _decode("bfloat16", {}, _BF16, slots_first=False, tile=16, out="fp32"),
    _decode("int4 of 30", _STATIC, _stored("u8", 4, 2, 15), head_dim=30, tile=16),
    _prefill("widened before", _STATIC, _WIDENED, constants={"BITS": 16}),
    _prefill("int4", _STATIC, _INT4_BYTES),
    _prefill("int4 per token", _PER_TOKEN, _INT4_BYTES, out="fp32", constants={"PER_TOKEN": True}),
    _prefill("int8", _STATIC, _stored("i8", 8, 1, 128), rows=64, warps=4),
    _prefill("bfloat16", {}, _BF16, out="fp32"),
    Specimen(
        "prefill_attention/widen",
        widen_kernel,
        {
            **{"keys_ptr": "*u8", "values_ptr": "*u8", "wide_keys_ptr": "*fp16", "wide_values_ptr": "*fp16"},
            **{"start_ptr": "*i64", "slots": "i32", "queries": "i32"},
        },
        {"BITS": 4, "PLANES": 2, "WORDS": 64, "WORDS_PADDED": 64, "HEAD_DIM": 128, "TILE": 64},
        {"num_warps": 4},
        aligned=("keys_ptr", "values_ptr", "wide_keys_ptr", "wide_values_ptr", "slots"),
    ),
]
