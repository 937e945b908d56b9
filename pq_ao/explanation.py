"""What a calibrated or quantized model consists of: arithmetic of each linear, bytes, and what was decided how.

Bytes are counted on the tensors that hold the data: a `PackedWeight` shows the shape and dtype of the weight that it
stands for, so its own `nbytes` is that of a dense tensor.
"""

import dataclasses
import gc
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from pq_ao.cache import PrefixStaticCache
from pq_ao.linears import CalibratedLinear, KeptEmbedding, KeptLinear
from pq_ao.modules import PrefixAttention, attention_modules
from pq_ao.ops.linear_paths import LinearPath, capability_of, linear_path
from pq_ao.quantizers import ActivationQuantizer, Path
from pq_ao.tensors import PackedWeight

_BF16_BYTES = 2

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

# tokens up to which the choice of kernels is asked for: no bound lies higher
_MOST_TOKENS = 1 << 14

_KEPT = (
    (
        "embedding, head",
        "few bits there cost more accuracy than memory they save; quantize_head_ takes the head to int8",
    ),
    ("prefix keys, values", "their range is far from that of other tokens: one static scale cannot serve both"),
    ("queries", "used once and never stored"),
    ("RMSNorm, RoPE, R3, R4, softmax, SiLU, residual", "cheap, and errors there spread to everything behind"),
    ("scales, shifts, biases", "float32: the epilogue of a linear rounds once"),
)


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of a calibrated or quantized model, see `memory`.

    Attributes:
        linear_bytes: the linears of the decoder blocks: weights (codes and scales once quantized), biases, and the
            shifts and static scales or clip factors of their inputs. Before `quantize_` floating-point weight and
            codes are both held.
        linear_bf16_bytes: the same weights in bfloat16.
        kept_bytes: embedding and head.
        kv_bytes: what the cache holds, the prefix's keys and values, the shifts of all others and their static scales
            or clip factors; None without a cache.
        kv_bf16_bytes: keys and values of a StaticCache in bfloat16, same batch and length; None without a cache.
    """

    linear_bytes: int
    linear_bf16_bytes: int
    kept_bytes: int
    kv_bytes: int | None = None
    kv_bf16_bytes: int | None = None

    @property
    def linear_ratio(self) -> float:
        """linear_bytes over linear_bf16_bytes."""
        return self.linear_bytes / self.linear_bf16_bytes

    @property
    def kv_ratio(self) -> float | None:
        """kv_bytes over kv_bf16_bytes; None without a cache."""
        return None if self.kv_bytes is None else self.kv_bytes / self.kv_bf16_bytes


def memory(model: PreTrainedModel, cache: PrefixStaticCache | None = None) -> MemoryReport:
    """Counts the bytes of a calibrated or quantized model, and of a cache made for it.

    Raises:
        ValueError: the model is not calibrated.
        TypeError: `cache` is another kind of cache.

    Example::

        report = pq_ao.memory(model, pq_ao.PrefixStaticCache(model, batch_size=1, max_cache_len=1024))
        report.linear_ratio, report.kv_ratio
    """
    attentions = attention_modules(model)
    linears = [linear for _, linear in _linears(model)]
    kept = [module.weight for module in model.modules() if isinstance(module, KeptEmbedding | KeptLinear)]
    report = MemoryReport(
        linear_bytes=sum(_linear_bytes(linear) for linear in linears),
        linear_bf16_bytes=sum(linear.weight.numel() * _BF16_BYTES for linear in linears),
        kept_bytes=sum(_bytes(weight) for weight in kept),
    )
    if cache is None:
        return report
    if not isinstance(cache, PrefixStaticCache):
        raise TypeError(
            f"cache: got {type(cache).__name__}; pass a pq_ao.PrefixStaticCache, the one that holds packed keys and "
            "values, or leave it out."
        )
    return dataclasses.replace(
        report,
        kv_bytes=cache.nbytes + sum(_prefix_bytes(attention) for attention in attentions),
        kv_bf16_bytes=sum(
            2 * layer.batch_size * layer.num_heads * layer.max_cache_len * layer.k_head_dim * _BF16_BYTES
            for layer in cache.layers
        ),
    )


def live_bytes() -> Counter[str]:
    """Bytes of every tensor that is alive in this process, by dtype such as "uint8".

    A storage counts once, as the first dtype that it was found with, and counts whole even if only a slice of it is in
    use. Tensor subclasses count as the tensors inside them. Tensors that no Python object refers to, such as scratch
    memory of a kernel at work, are not seen, and a tensor on the meta device has no bytes.

    Example::

        before = live_bytes()
        model(ids)
        (live_bytes() - before).total()  # 0: the forward leaves nothing behind
    """
    gc.collect()
    total: Counter[str] = Counter()
    seen: set[int] = set()
    for item in gc.get_objects():
        # type(), not isinstance: that asks the object for __class__, which lazy ones answer with an import
        if (
            not issubclass(type(item), Tensor)
            or is_traceable_wrapper_subclass(item)
            or item.layout is not torch.strided
        ):
            continue
        storage = item.untyped_storage()
        # the compiler's fake tensors show a device, and only their storage tells that they have no bytes
        if storage.device.type != "meta" and storage._cdata not in seen:
            seen.add(storage._cdata)
            total[str(item.dtype).removeprefix("torch.")] += storage.nbytes()
    return total


def explain(model: PreTrainedModel) -> str:
    """Describes a calibrated or quantized model: the linears of each decoder layer, keys and values, and calibration.

    Raises:
        ValueError: the model is not calibrated.

    Example::

        print(pq_ao.explain(model))
    """
    attentions = attention_modules(model)
    linears = _linears(model)
    sections = [_linear_table(linears), _paths(linears), _kernels(linears)]
    sections += [_kv_text(attentions, linears[0][1]), _kept_text(model)]
    record = getattr(model, "calibration_record", None)
    sections.append("calibration: no record is kept with this model" if record is None else _record_text(record))
    return "\n\n".join(sections)


def _linears(model: nn.Module) -> list[tuple[str, CalibratedLinear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, CalibratedLinear)]


def _bytes(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.nbytes


def _linear_bytes(linear: CalibratedLinear) -> int:
    site = linear.quantizers[0]
    weight = (linear.weight, linear.bias, linear.packed, linear.packed_bias)
    return sum(map(_bytes, (*weight, site.scale, site.clip, site.shift)))


def _prefix_bytes(attention: PrefixAttention) -> int:
    return sum(map(_bytes, (attention.prefix_k, attention.prefix_v, *attention.kv.buffers())))


def _scale_text(site: ActivationQuantizer) -> str:
    return f"per token, clip {site.clip.item():.3g}" if site.dynamic else f"{site.scale.item():.5g}"


def _linear_table(linears: list[tuple[str, CalibratedLinear]]) -> str:
    rows = [("linear", "shape", "scheme", "path", "bytes", "activation scale")]
    for name, linear in linears:
        config = linear.config
        rows.append(
            (
                name,
                f"{linear.out_features} x {linear.in_features}",
                f"w{config.weight_bits}a{config.act_bits} {config.mode}",
                linear.path.value,
                f"{_linear_bytes(linear):,}",
                _scale_text(linear.quantizers[0]),
            )
        )
    held = sum(_linear_bytes(linear) for _, linear in linears)
    dense = sum(linear.weight.numel() * _BF16_BYTES for _, linear in linears)
    return f"{_columns(rows, right=(1, 4, 5))}\n{held:,} bytes in all, {held / dense:.3f} of bfloat16 ({dense:,})"


def _columns(rows: list[tuple[str, ...]], right: tuple[int, ...]) -> str:
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


def _kernels(linears: list[tuple[str, CalibratedLinear]]) -> str:
    """Which kernel the linears take for how many tokens, on the device that they are on."""
    integer = [linear for _, linear in linears if linear.path is Path.INTEGER]
    if not integer:
        return "kernels: none yet"
    shapes = {(linear.out_features, linear.in_features): linear for linear in integer}
    chosen: dict[str, list[str]] = {}
    for (outs, inner), linear in shapes.items():
        capability = capability_of(linear.weight.device)
        bits = linear.config.weight_bits, linear.config.act_bits
        spans: list[tuple[int, LinearPath]] = []
        for tokens in range(1, _MOST_TOKENS + 1):
            path = linear_path(tokens, outs, inner, *bits, capability)
            if not spans or spans[-1][1] is not path:
                spans.append((tokens, path))
        ends = [f"to {begin - 1}" for begin, _ in spans[1:]] + ["and more"]
        text = ", ".join(f"{begin} {end} {path.value}" for (begin, path), end in zip(spans, ends, strict=True))
        chosen.setdefault(text, []).append(f"{outs} x {inner}")
    lines = [f"kernels by tokens, {', '.join(names)}: {text}" for text, names in chosen.items()]
    used = [path for path in LinearPath if any(path.value in text for text in chosen)]
    return "\n".join(lines + [f"  {path.value}: {_KERNEL_MEANS[path]}" for path in used])


def _kv_text(attentions: list[PrefixAttention], linear: CalibratedLinear) -> str:
    first = attentions[0]
    if first.kv.bits == 16:
        scheme = f"kept in {_name(first.fixed_dtype)}"
    else:
        scales = "one scale a token and head" if first.kv.dynamic else "one static scale a head"
        scheme = f"{first.kv.bits} bits, {scales}, one shift a channel, path {first.kv.path.value}"
    rotation = "R1 and R2 in the weights, R3 and R4 online" if linear.config.rotation else "none"
    prefix = sum(_bytes(attention.prefix_k) + _bytes(attention.prefix_v) for attention in attentions)
    return "\n".join(
        (
            f"keys and values: {scheme}; {first.kv_heads} heads of {first.head_dim} in {len(attentions)} layers",
            f"prefix: {first.prefix_k.shape[1]} tokens, {prefix:,} bytes in {_name(first.prefix_k.dtype)}",
            f"rotation: {rotation}",
        )
    )


def _kept_text(model: nn.Module) -> str:
    lines = ["kept in high precision:"]
    lines += [f"  {what}: {why}" for what, why in _KEPT]
    for name, module in model.named_modules():
        if isinstance(module, KeptEmbedding | KeptLinear):
            shape = " x ".join(map(str, module.weight.shape))
            is_int8 = isinstance(module.weight, PackedWeight)
            kind = "int8, one scale a row" if is_int8 else _name(module.weight.dtype)
            lines.append(f"  {name}: {shape} in {kind}, {_bytes(module.weight):,} bytes")
    return "\n".join(lines)


def _record_text(record) -> str:
    lines = ["calibration:", f"  scheme: {record.config.scheme} {record.config.mode}"]
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, float):
            lines.append(f"  {field.name}: {value:.1f}")
        elif isinstance(value, str | int):
            lines.append(f"  {field.name}: {value}")
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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
