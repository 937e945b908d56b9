"""Prefill attention at the shape of Llama-3-8B: what it multiplies, by descriptors and by pointers."""

from pq_ao.ops.kernels.prefill_attention import prefill_kernel
from pq_ao.ops.kernels.prefill_operands import ALIGN, operands_kernel, prefix_parts_kernel
from tests.kernels.specimens import Specimen

_SCALES = {"key_scale_ptr": "*fp32", "value_scale_ptr": "*fp32"}
_OUTPUT = {"out_scale_ptr": "*fp32", "out_shift_ptr": "*fp32"}
_SHIFTS = {"value_shift_ptr": "*fp32"}
_STATIC = _SCALES | _SHIFTS | _OUTPUT
_PER_TOKEN = _SCALES | _SHIFTS | {"visible_ptr": "*i1"}


def _aligned(types: dict[str, str]) -> tuple[str, ...]:
    """Pointers, strides and sizes that are multiples of 16."""
    whole = ("slots", "total", "stride_b", "stride_l", "stride_h")
    return tuple(name for name, type_ in types.items() if type_.startswith("*") or name in whole)


def _prefill(name, types, *, kind="bf16", out="i8", rows=64, tile=64, warps=4, tma=True, **constants):
    operand = f"tensordesc<{kind}[{tile}, 128]>" if tma else f"*{kind}"
    pointers = {"query_ptr": "*bf16", "keys": operand, "values": operand, "start_ptr": "*i64", "out_ptr": f"*{out}"}
    pointers |= {"prefix_ptr": f"*{kind}"}
    sizes = ("first_owner", "owners", "together", "slots", "total", "prefix_len", "num_queries", "visible_stride")
    numbers = {"scaling_log2e": "fp32"} | dict.fromkeys((*sizes, "stride_b", "stride_l", "stride_h"), "i32")
    types = pointers | types | numbers
    optional = (*_STATIC, "visible_ptr")
    constants = {
        **{pointer: None for pointer in optional if pointer not in types},
        **{"HEADS": 32, "REPEAT": 4, "HEAD_DIM": 128, "DIM_PADDED": 128, "PER_TOKEN": False, "LOW": -8, "HIGH": 7},
        **{"PREFIX_TILE": 16, "ROWS": rows, "TILE": tile, "STAGES": 3, "TMA": tma},
        **constants,
    }
    return Specimen(
        f"prefill_attention/{name}", prefill_kernel, types, constants, {"num_warps": warps},
        minimum_arch=90 if tma else 80, aligned=_aligned(types),
    )  # fmt: skip


def _operands(name, word, kind, bits, planes, words):
    pointers = {"keys_ptr": f"*{word}", "values_ptr": f"*{word}", "start_ptr": "*i64"}
    pointers |= {"wide_keys_ptr": f"*{kind}", "wide_values_ptr": f"*{kind}"}
    types = pointers | dict.fromkeys(("first_owner", "slots", "total", "queries"), "i32")
    constants = {"BITS": bits, "PLANES": planes, "WORDS": words, "WORDS_PADDED": words, "HEAD_DIM": 128}
    constants |= {"TILE": 64, "ALIGN": ALIGN}
    return Specimen(
        f"prefill_operands/{name}", operands_kernel, types, constants, {"num_warps": 4}, aligned=_aligned(types)
    )


def _prefix_parts(name, source, kind, shifted=True):
    types = {"key_ptr": f"*{source}", "value_ptr": f"*{source}", "parts_ptr": f"*{kind}"}
    shifts = ("key_shift_ptr", "value_shift_ptr")
    constants = {"HEAD_DIM": 128, "DIM_PADDED": 128, "TILE": 16}
    if shifted:
        types |= dict.fromkeys(shifts, "*fp32")
    else:
        constants |= dict.fromkeys(shifts)
    return Specimen(
        f"prefix_parts/{name}", prefix_parts_kernel, types | dict.fromkeys(("tokens", "padded"), "i32"), constants,
        {"num_warps": 4}, aligned=tuple(types),
    )  # fmt: skip


SPECIMENS = [
    _prefill("static", _STATIC, LOW=-15, HIGH=14),
    _prefill("per token", _PER_TOKEN, out="fp32", PER_TOKEN=True),
    _prefill("floats", {}, out="fp32"),
    _prefill("by pointers", _STATIC, rows=128, warps=8, tma=False, LOW=-15, HIGH=14),
    _prefill("by pointers, per token", _PER_TOKEN, out="fp32", rows=128, warps=8, tma=False, PER_TOKEN=True),
    _prefill("float32", {}, kind="fp32", out="fp32", rows=64, tile=32, tma=False, STAGES=2),
    _operands("int4", "u8", "bf16", 4, 2, 64),
    _operands("int8", "i8", "fp16", 8, 1, 128),
    _operands("floats", "bf16", "bf16", 16, 1, 128),
    _prefix_parts("shifted", "bf16", "bf16"),
    _prefix_parts("floats", "fp16", "fp16", shifted=False),
]
