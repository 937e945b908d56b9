"""`calibrate`: the pipeline that decides every scale and every weight code, block by block on the quantized path."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pq_ao.config import PrefixQuantConfig, prefixquant_config
from pq_ao.data import calibration_windows
from pq_ao.families import DecoderFamily, family_of
from pq_ao.linears import CalibratedLinear
from pq_ao.modules import PrefixAttention, on_path, path_switches
from pq_ao.prefix import PrefixReport, find_prefix, outlier_statistics
from pq_ao.quantizers import FixedDtype, Path
from pq_ao.rotation import begin_rotation, check_weights
from pq_ao.rounding import LayerInputs, corrected_bias, round_nearest
from pq_ao.scale_search import BlockSites, search_activations, search_keys, search_values
from pq_ao.tensors import PackedWeight

SEARCHES = ("none", "tensor", "block")
ROUNDINGS = ("nearest",)

# tokens that run through a block at once: bounds the memory of its activations
_TOKENS_AT_ONCE = 8192


@dataclass
class CalibrationRecord:
    """How a model was calibrated; kept as `model.calibration_record`.

    Attributes:
        config: the scheme.
        prefix: the prefix and how well it holds.
        data, num_sequences, sequence_length, rounding, search, seed: arguments of `calibrate`.
        scales: by layer, each static scale, and its factor on the absmax scale as "<name>_factor".
        seconds: wall time.
    """

    config: PrefixQuantConfig
    prefix: PrefixReport
    data: str
    num_sequences: int
    sequence_length: int
    rounding: str
    search: str
    seed: int
    scales: list[dict[str, float | list[float]]] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict:
        """Plain dictionary for JSON."""
        return asdict(self)


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PrefixQuantConfig | None = None,
    *,
    data="embedded",
    num_sequences: int = 16,
    sequence_length: int = 2048,
    rounding: str = "nearest",
    search: str = "tensor",
    prefix_ids: Sequence[int] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> CalibrationRecord:
    """Rotates the model, finds its prefix, searches the scales and rounds the weights; in place.

    Afterwards the model still computes in (rotated) floating point, behind its prefix; `quantize_(model, config)`
    puts the integers in place. On any error before the rotation the model is untouched.

    Args:
        model: a floating-point decoder of a known family, on the device to calibrate on.
        tokenizer: its tokenizer.
        config: the scheme, `prefixquant_config()` where None.
        data: corpus: "embedded", "wikitext2", "pile", "c4", a text or jsonl file, or a list of strings
            (see `pq_ao.data.load_text`).
        num_sequences, sequence_length: calibration windows and their tokens; long ones, for keys are searched at the
            distances that they are seen at.
        rounding: "nearest" (searched clipping of each output channel).
        search: objective for the static activation scales: "tensor" (the activation's own squared error), "block"
            (that of the block's output, method section 4.2) or "none" (min-max).
        prefix_ids: a prefix of your own instead of the rule's.
        seed: draws the rotation and the windows.
        progress: show progress bars.

    Returns:
        The record, also kept as `model.calibration_record`.

    Raises:
        ValueError: unsupported model or argument, too little text, NaN or Inf in weights or activations.

    Example::

        pq_ao.calibrate(model, tokenizer, prefixquant_config())
        quantize_(model, prefixquant_config())
    """
    started = time.perf_counter()
    config = config or prefixquant_config()
    _check_arguments(model, config, rounding, search, prefix_ids)
    check_weights(model)
    windows = calibration_windows(tokenizer, data, num_sequences, sequence_length, seed)
    if config.prefix:
        prefix = find_prefix(model, tokenizer, windows, prefix_ids, progress)
    else:
        prefix = PrefixReport((), statistics=outlier_statistics(model, windows, progress=progress))
    described = data if isinstance(data, str) else f"{type(data).__name__}"
    record = CalibrationRecord(config, prefix, described, num_sequences, sequence_length, rounding, search, seed)

    family, dtype = family_of(model), model.dtype
    rotator = begin_rotation(model, config, seed=seed, block_dtype=torch.float32)
    body = _Stream(model, family, windows, first_position=0)
    head = _Stream(model, family, torch.tensor([prefix.prefix_ids], dtype=torch.int64), -len(prefix.prefix_ids))
    layers = model.get_submodule(family.layers)
    for index, layer in enumerate(tqdm(layers, desc="calibrating", unit="block", disable=not progress)):
        rotator.replace(layer, index)  # in float32, one block at a time
        if prefix.prefix_ids:
            _store_prefix(layer, family, head)
        record.scales.append(_calibrate_block(layer, family, config, body, search))
        with on_path(path_switches(layer), Path.REFERENCE):
            body.advance(layer)
        _cast_block(layer, dtype)
    record.seconds = time.perf_counter() - started
    model.calibration_record = record
    return record


class _Stream:
    """Hidden states of some sequences on their way through the blocks.

    Attributes:
        hidden: float32 [N, T, d].
        position_embeddings: cos and sin, [1, T, D].
        mask: bool [1, 1, T, T], causal.
    """

    def __init__(self, model: PreTrainedModel, family: DecoderFamily, ids: Tensor, first_position: int):
        length = ids.shape[1]
        ids = ids.to(model.device)
        self.hidden = model.get_submodule(family.embedding)(ids).float()
        positions = torch.arange(first_position, first_position + length, device=model.device)
        self.position_embeddings = model.get_submodule(family.rotary)(self.hidden, positions.unsqueeze(0))
        self.mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=model.device).tril()
        self.batch_size = max(1, _TOKENS_AT_ONCE // max(1, length))

    def batches(self, limit: int | None = None) -> list[Tensor]:
        """The first `limit` sequences, some at a time."""
        return list(self.hidden[:limit].split(self.batch_size))

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """One decoder block on [n, T, d]."""
        return layer(hidden, attention_mask=self.mask, position_embeddings=self.position_embeddings)

    def advance(self, layer: nn.Module) -> None:
        """Moves all sequences through `layer`, in place."""
        for batch in self.batches():
            batch.copy_(self.run(layer, batch))


def _attention(layer: nn.Module, family: DecoderFamily) -> PrefixAttention:
    return layer.get_submodule(family.attention)


def _store_prefix(layer: nn.Module, family: DecoderFamily, head: _Stream) -> None:
    """Keeps the prefix's keys and values of this block in full precision (method section 3.3), then moves it on."""
    attention = _attention(layer, family)
    normed = layer.get_submodule(family.attention_norm)(head.hidden)
    _, key, value = attention.project(normed, head.position_embeddings)
    head.advance(layer)  # the prefix sees itself as ordinary causal tokens, so before it becomes a prefix
    attention.prefix_k, attention.prefix_v = key[0].contiguous(), value[0].contiguous()


def _calibrate_block(
    layer: nn.Module, family: DecoderFamily, config: PrefixQuantConfig, body: _Stream, search: str
) -> dict:
    attention, mlp = _attention(layer, family), layer.get_submodule(family.mlp)
    sites = BlockSites(layer, family, body)
    scales: dict[str, float | list[float]] = {}
    if config.mode == "static":
        scales |= search_activations(sites, sites.observe(), config.act_bits, search)
        if config.kv_bits < 16:
            scales |= search_values(sites, config.kv_bits, search)
            scales |= search_keys(sites, config.kv_bits, search)
    inputs = sites.layer_inputs()
    linears: dict[str, CalibratedLinear] = {
        "attn_in": attention.qkv_proj,
        "o_in": attention.o_proj,
        "mlp_in": mlp.gate_up_proj,
        "down_in": mlp.down_proj,
    }
    for site, linear in linears.items():
        _round(linear, inputs[site], config)
    return scales


def _round(linear: CalibratedLinear, inputs: LayerInputs, config: PrefixQuantConfig) -> None:
    codes, scale = round_nearest(linear.weight, config.weight_bits, inputs)
    linear.packed = PackedWeight.from_codes(codes, scale, config.weight_bits, linear.fixed_dtype)
    bias = None if linear.bias is None else linear.bias.float()
    if config.mode == "static":
        bias = corrected_bias(linear.weight, bias, codes, scale, inputs)
    linear.packed_bias = bias


def _cast_block(layer: nn.Module, dtype: torch.dtype) -> None:
    """Float weights and prefix to the model's dtype; codes and scales stay as they are."""
    for module in layer.modules():
        if isinstance(module, CalibratedLinear):
            module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)
            if module.bias is not None:
                module.bias = nn.Parameter(module.bias.to(dtype), requires_grad=False)
            packed = module.packed
            module.packed = PackedWeight(packed.qdata, packed.scale, packed.in_features, dtype)
        if isinstance(module, PrefixAttention):
            module.prefix_k, module.prefix_v = module.prefix_k.to(dtype), module.prefix_v.to(dtype)
        if isinstance(module, FixedDtype):
            module.fixed_dtype = dtype


def _check_arguments(
    model: PreTrainedModel, config: PrefixQuantConfig, rounding: str, search: str, prefix_ids: Sequence[int] | None
) -> None:
    if not isinstance(config, PrefixQuantConfig):
        raise TypeError(f"config: got {type(config).__name__}; pass a PrefixQuantConfig, from prefixquant_config().")
    for name, value, allowed in (("rounding", rounding, ROUNDINGS), ("search", search, SEARCHES)):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is unknown; use one of {allowed}.")
    if prefix_ids is not None and not config.prefix:
        raise ValueError("prefix_ids: given although config.prefix is False; leave one of the two out.")
    if any(isinstance(module, CalibratedLinear) for module in model.modules()):
        raise ValueError("model: is calibrated already; load the original model to calibrate again.")
    if not model.dtype.is_floating_point or model.dtype.itemsize < 2:
        raise ValueError(f"model: dtype {model.dtype} is not supported; load it with dtype=torch.bfloat16.")
    family_of(model)
