"""What a calibrated or quantized model consists of, as text: arithmetic, kernels, bytes, and what was decided how."""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pq_ao.byte_counts import (
    BF16_BYTES,
    MemoryReport,
    bytes_of,
    bytes_of_linear,
    bytes_of_model,
    bytes_of_prefix,
    calibrated_linears,
    kept_modules,
    live_bytes,
    memory,
)
from pq_ao.linears import CalibratedLinear, KeptLinear
from pq_ao.modules import PrefixAttention, attention_modules
from pq_ao.ops.linear_paths import LinearPath, capability_of, linear_path
from pq_ao.quantizers import ActivationQuantizer, Path
from pq_ao.tensors import PackedWeight

__all__ = ["MemoryReport", "explain", "live_bytes", "memory", "totals"]

_PATH_MEANS = {
    Path.FLOAT: "rotated floating point: calibrated, but quantize_(model, config) has not run yet",
    Path.REFERENCE: "quantize and dequantize in float32: inside pq_ao.reference_path",
    Path.INTEGER: "integer codes times integer codes, summed exactly, scaled once in float32",
}

_KERNEL_MEANS = {
    LinearPath.DP4A: "packed words times int8 words on the integer units",
    LinearPath.TILE: "int8 tensor cores, INT4 unpacked in registers",
    LinearPath.E4M3: "INT4 unpacked to float8 in one pass, then torch._scaled_mm, whose float32 sums are exact here",
    LinearPath.INT_MM: "unpacked to int8, then torch._int_mm",
}

Spans = list[tuple[int, LinearPath]]  # a kernel, and the number of tokens from which on it is taken

# tokens up to which the choice of kernels is asked for: no bound lies higher
_MOST_TOKENS = 1 << 14

# in high precision: arithmetic that has no tensors of its own
_IN_PASSING = (
    ("queries", "used once and never stored"),
    ("RMSNorm, RoPE, R3, R4, softmax, SiLU, residual", "cheap, and errors there spread to everything behind"),
)


def explain(model: PreTrainedModel) -> str:
    """Describes a calibrated or quantized model.

    Tables of the linears of each decoder block (scheme, path, kernels, bytes, scales), of keys and values, of what was
    left in high precision and why, and of all bytes; then how it was calibrated.

    Raises:
        ValueError: the model is not calibrated.

    Example::

        print(pq_ao.explain(model))
    """
    attentions = attention_modules(model)
    linears = calibrated_linears(model)
    shapes = _spans_by_shape(linears)
    sections = [_linear_table(linears, shapes), _paths(linears), _kernels(shapes)]
    sections += [_kv_table(model, attentions), _kv_text(attentions, linears[0][1]), _kept_text(model), totals(model)]
    record = getattr(model, "calibration_record", None)
    sections.append("calibration: no record is kept with this model" if record is None else _record_text(record))
    return "\n\n".join(sections)


def totals(model: PreTrainedModel) -> str:
    """The bytes of a calibrated or quantized model, as the table that `explain` has at its end.

    Raises:
        ValueError: the model is not calibrated.
    """
    attentions = attention_modules(model)
    report, whole = memory(model), bytes_of_model(model)
    prefix = sum(map(bytes_of_prefix, attentions))
    rest = whole - report.linear_bytes - report.kept_bytes - prefix
    first = attentions[0]
    vectors = 2 * first.kv_heads * len(attentions)  # of keys and values, for each token
    dense = vectors * first.head_dim * BF16_BYTES
    token = vectors * (first.head_dim * first.kv.bits // 8 + 4 * (first.kv.dynamic and first.kv.bits < 16))
    rows = [
        ("held", "bytes", "of bfloat16"),
        (
            "linears of the blocks",
            f"{report.linear_bytes:,}",
            f"{report.linear_ratio:.3f} of {report.linear_bf16_bytes:,}",
        ),
        ("embedding, head", f"{report.kept_bytes:,}", ""),
        ("prefix; scales and shifts of keys and values", f"{prefix:,}", ""),
        ("gains of norms, factors of rotations and RoPE", f"{rest:,}", ""),
        ("model", f"{whole:,}", ""),
        ("cache, for each token", f"{token:,}", f"{token / dense:.3f} of {dense:,}"),
    ]
    return _columns(rows, right=(1,))


def _scale_text(site: ActivationQuantizer) -> str:
    if site.dynamic:
        return f"per token, clip {site.clip.item():.3g}"
    return f"{site.scale.item():.5g}" + f" {site.code_set}" * (site.code_set != "even")


def _range_text(scales: Tensor | None) -> str:
    """Smallest and largest of some scales or factors."""
    if scales is None:
        return "-"
    low, high = scales.aminmax()
    return f"{low.item():.3g} to {high.item():.3g}"


def _linear_table(linears: list[tuple[str, CalibratedLinear]], shapes: dict[tuple[int, int], Spans]) -> str:
    rows = [("linear", "shape", "scheme", "path", "kernels", "bytes", "weight scales", "activation scale")]
    for name, linear in linears:
        config, shape = linear.config, (linear.out_features, linear.in_features)
        used = shapes.get(shape, ()) if linear.path is Path.INTEGER else ()
        packed = linear.weight if isinstance(linear.weight, PackedWeight) else linear.packed
        rows.append(
            (
                name,
                f"{shape[0]} x {shape[1]}",
                f"w{config.weight_bits}a{config.act_bits} {config.mode}",
                linear.path.value,
                ", ".join(path.value for _, path in used) or "-",
                f"{bytes_of_linear(linear):,}",
                _range_text(None if packed is None else packed.scale),
                _scale_text(linear.quantizers[0]),
            )
        )
    held = sum(bytes_of_linear(linear) for _, linear in linears)
    dense = sum(linear.weight.numel() * BF16_BYTES for _, linear in linears)
    return f"{_columns(rows, right=(1, 5, 7))}\n{held:,} bytes in all, {held / dense:.3f} of bfloat16 ({dense:,})"


def _columns(rows: Sequence[tuple[str, ...]], right: tuple[int, ...]) -> str:
    """Lines of aligned columns, two spaces between; those in `right` end together."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _paths(linears: list[tuple[str, CalibratedLinear]]) -> str:
    paths = Counter(linear.path for _, linear in linears)
    return "\n".join(f"path {path.value} ({count} linears): {_PATH_MEANS[path]}" for path, count in paths.items())


def _spans_by_shape(linears: list[tuple[str, CalibratedLinear]]) -> dict[tuple[int, int], Spans]:
    """The kernels that linears take on their device, each with the number of tokens from which on; none in floats."""
    found: dict[tuple[int, int], Spans] = {}
    for _, linear in linears:
        shape = linear.out_features, linear.in_features
        if linear.path is Path.INTEGER and shape not in found:
            bits = linear.config.weight_bits, linear.config.act_bits
            capability = capability_of(linear.weight.device)
            spans = found[shape] = []
            for tokens in range(1, _MOST_TOKENS + 1):
                path = linear_path(tokens, *shape, *bits, capability)
                if not spans or spans[-1][1] is not path:
                    spans.append((tokens, path))
    return found


def _kernels(shapes: dict[tuple[int, int], Spans]) -> str:
    """Which kernel the linears take for how many tokens."""
    if not shapes:
        return "kernels: none yet"
    chosen: dict[str, list[str]] = {}
    for (outs, inner), spans in shapes.items():
        ends = [f"to {begin - 1}" for begin, _ in spans[1:]] + ["and more"]
        text = ", ".join(f"{begin} {end} {path.value}" for (begin, path), end in zip(spans, ends, strict=True))
        chosen.setdefault(text, []).append(f"{outs} x {inner}")
    used = {path for spans in shapes.values() for _, path in spans}
    lines = [f"kernels by tokens, {', '.join(names)}: {text}" for text, names in chosen.items()]
    return "\n".join(lines + [f"  {path.value}: {_KERNEL_MEANS[path]}" for path in LinearPath if path in used])


def _kv_table(model: nn.Module, attentions: list[PrefixAttention]) -> str:
    names = {id(module): name for name, module in model.named_modules()}
    kind = "clips" if attentions[0].kv.dynamic else "scales"
    rows = [("attention", "keys, values", "path", f"key {kind}", f"value {kind}", "prefix", "bytes")]
    for attention in attentions:
        kv = attention.kv
        kept = kv.bits == 16
        rows.append(
            (
                names[id(attention)],
                _name(attention.fixed_dtype) if kept else f"{kv.bits} bits {'dynamic' if kv.dynamic else 'static'}",
                (Path.FLOAT if kept else kv.path).value,
                _range_text(kv.key_clip if kv.dynamic else kv.key_scale),
                _range_text(kv.value_clip if kv.dynamic else kv.value_scale),
                f"{attention.prefix_k.shape[1]} tokens",
                f"{bytes_of_prefix(attention):,}",
            )
        )
    return _columns(rows, right=(5, 6))


def _kv_text(attentions: list[PrefixAttention], linear: CalibratedLinear) -> str:
    first = attentions[0]
    if first.kv.bits == 16:
        scheme = f"kept in {_name(first.fixed_dtype)}"
    else:
        scales = "one scale a token and head" if first.kv.dynamic else "one static scale a head"
        scheme = f"{first.kv.bits} bits, {scales}, one shift a channel, path {first.kv.path.value}"
    rotation = "R1 and R2 in the weights, R3 and R4 online" if linear.config.rotation else "none"
    prefix = sum(bytes_of(attention.prefix_k) + bytes_of(attention.prefix_v) for attention in attentions)
    return "\n".join(
        (
            f"keys and values: {scheme}; {first.kv_heads} heads of {first.head_dim} in {len(attentions)} layers",
            f"prefix: {first.prefix_k.shape[1]} tokens, {prefix:,} bytes in {_name(first.prefix_k.dtype)}",
            f"rotation: {rotation}",
        )
    )


def _kept_text(model: PreTrainedModel) -> str:
    attentions = attention_modules(model)
    rows = [("kept in high precision", "in", "bytes", "why")]
    for name, module in kept_modules(model).items():
        shape = " x ".join(map(str, module.weight.shape))
        why = "few bits there cost more accuracy than memory they save"
        if isinstance(module, KeptLinear):
            why = "every logit hangs on it; pq_ao.quantize_head_ takes it to int8"
        if isinstance(module.weight, PackedWeight):
            rows.append(
                (
                    f"{name}: {shape}",
                    "int8, one scale a row",
                    _total(module.parameters()),
                    "each logit's own row and scale: half the bytes",
                )
            )
        else:
            rows.append((f"{name}: {shape}", _name(module.weight.dtype), _total(module.parameters()), why))
    prefix = [tensor for attention in attentions for tensor in (attention.prefix_k, attention.prefix_v)]
    why = "their range is far from that of other tokens: one static scale cannot serve both"
    rows.append(("prefix keys, values", _name(prefix[0].dtype), _total(prefix), why))
    linears = [linear for _, linear in calibrated_linears(model)]
    sites = [tensor for linear in linears for tensor in linear.quantizers[0].buffers()]
    heads = [tensor for attention in attentions for tensor in attention.kv.buffers()]
    why = "the epilogue of a linear rounds once"
    biases = [linear.bias if isinstance(linear.weight, PackedWeight) else linear.packed_bias for linear in linears]
    weights = [linear.weight if isinstance(linear.weight, PackedWeight) else linear.packed for linear in linears]
    scales = [None if weight is None else weight.scale for weight in weights]
    rows.append(("scales, shifts, biases", "float32", _total((*sites, *heads, *biases, *scales)), why))
    gains = [
        module.weight for module in model.modules() if "RMSNorm" in type(module).__name__ and hasattr(module, "weight")
    ]
    if gains:
        rows.append(("gains of norms that stand alone", _name(gains[0].dtype), _total(gains), "a few numbers"))
    rows += [(what, "in passing", "-", why) for what, why in _IN_PASSING]
    return _columns(rows, right=(2,))


def _total(tensors: Iterable[Tensor | None]) -> str:
    return f"{sum(map(bytes_of, tensors)):,}"


def _record_text(record) -> str:
    lines = ["calibration:", f"  scheme: {record.config.scheme} {record.config.mode}"]
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, float):
            lines.append(f"  {field.name}: {value:.1f}")
        elif isinstance(value, str | int):
            lines.append(f"  {field.name}: {value}")
    if record.finetune is not None:
        settings = dataclasses.asdict(record.finetune).items()
        lines.append(f"  finetune: {', '.join(f'{name} {value}' for name, value in settings)}")
    if record.end_to_end:
        lines.append(f"  error of the model, fine-tuned end to end over before: {_kept_ratio(record.end_to_end):.3f}")
    if record.finetuning:
        lines.append(f"  error of the blocks, fine-tuned over rounded: {_ratio_text(record.finetuning)}")
    prefix = record.prefix
    lines.append(f"  prefix_ids: {list(prefix.prefix_ids) or 'none'}")
    if prefix.rule_ids is not None and prefix.rule_ids != prefix.prefix_ids:
        lines.append(f"  prefix by the rule alone: {list(prefix.rule_ids)}; changed because it did not hold")
    for kind, before in prefix.ratios_before.items():
        after = prefix.ratios_after[kind]
        lines.append(f"  largest token ratio, {kind}: {before:.1f} without the prefix, {after:.1f} with it")
    if prefix.ratios_after:
        lines.append(f"  threshold of that ratio: {prefix.threshold:.0f}")
    return "\n".join(lines)


def _ratio_text(histories: list[dict]) -> str:
    ratios = [_kept_ratio(history) for history in histories]
    return f"{statistics.median(ratios):.3f} in the median, {min(ratios):.3f} to {max(ratios):.3f}"


def _kept_ratio(history: dict) -> float:
    """Validation error of the state that a training kept, over that of before."""
    return (history["before"], *history["validation"])[history["kept"]] / history["before"]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
