"""`export_decoder`: a quantized model as two programs of `torch.export` over one cache.

Prefill and decode are two programs, for the best kernels differ: one has a dynamic length, the other one token. The
cache is made of buffers of both (what a model reaches in another way, torch takes for constants), and so is its
length; a program moves them on in place. Both name the same buffers, so that whoever loads them lets one
set of tensors stand in both: cache and weights are held once, and nothing is copied between prefill and decode. The
weights are in the file of prefill; in that of decode, and for the cache in both, empty tensors hold their place.
With padding the cache also says which slots count, and how many tokens each row has.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from pq_ao.cache import PrefixStaticCache
from pq_ao.checkpoint.description import describe
from pq_ao.export_aoti import compile_packages, decompositions
from pq_ao.export_folder import write_folder
from pq_ao.export_manifest import FILES, Manifest
from pq_ao.exported import (
    CACHE_PREFIX,
    LENGTH_NAME,
    SEEN_NAME,
    VISIBLE_NAME,
    ExportedDecoder,
    cache_names,
    decoder_of,
    share_state,
)
from pq_ao.ops.linear_paths import LinearPath, capability_of, forced_path

_LAYER_TENSORS = ("keys", "values", "key_scale", "value_scale")

_TRACED_LENGTH = 7  # any that is allowed
_TILE_CAPABILITY = (8, 0)


class _CachedDecoder(nn.Module):
    """The model and its cache, whose tensors are buffers here.

    Args:
        padded: rows may begin with padding; buffers then say which slots are visible, and how many tokens a row has.
        unfused: gives attention a whole mask, as users may: it then takes the way of small ops over all slots.
    """

    def __init__(self, model: PreTrainedModel, cache: PrefixStaticCache, padded: bool, unfused: bool):
        super().__init__()
        self.model, self.cache, self.padded, self.unfused = model, cache, padded, unfused
        self.layer_buffers = [
            {name: f"{CACHE_PREFIX}{name}_{index}" for name in _LAYER_TENSORS if getattr(layer, name) is not None}
            for index, layer in enumerate(cache.layers)
        ]
        for layer, names in zip(cache.layers, self.layer_buffers, strict=True):
            for name, buffer in names.items():
                self.register_buffer(buffer, getattr(layer, name))
        self.register_buffer(LENGTH_NAME, cache.layers[0].cumulative_length)
        if padded:
            batch, slots, device = cache.layers[0].batch_size, cache.layers[0].max_cache_len, model.device
            self.register_buffer(VISIBLE_NAME, torch.ones(batch, slots, dtype=torch.bool, device=device))
            self.register_buffer(SEEN_NAME, torch.zeros(batch, 1, dtype=torch.int64, device=device))

    def forward(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """int64 [B, L], and with padding bool [B, L] unless all tokens count, to the last token's logits [B, V]."""
        for layer, names in zip(self.cache.layers, self.layer_buffers, strict=True):
            for name, buffer in names.items():  # a layer that kept its own would make constants of them
                setattr(layer, name, getattr(self, buffer))
            layer.cumulative_length = getattr(self, LENGTH_NAME)
        visible, positions = None, None
        if self.padded:
            visible, positions = getattr(self, VISIBLE_NAME), self._positions(input_ids, mask)
        output = self.model(
            input_ids=input_ids,
            attention_mask=self._whole_mask(input_ids, visible) if self.unfused else visible,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def _positions(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """int64 [B, L], 0 for padding; notes in the buffers which of the tokens count."""
        seen = getattr(self, SEEN_NAME)
        if mask is None:
            positions = seen + torch.arange(input_ids.shape[1], device=input_ids.device)
            seen.add_(input_ids.shape[1])
            return positions
        slots = torch.arange(input_ids.shape[1], device=input_ids.device) + getattr(self, LENGTH_NAME)
        getattr(self, VISIBLE_NAME).index_copy_(1, slots, mask)
        positions = (seen + mask.cumsum(dim=1) - 1).clamp_min(0)
        seen.add_(mask.sum(dim=1, keepdim=True))
        return positions

    def _whole_mask(self, input_ids: Tensor, visible: Tensor | None) -> Tensor:
        """bool [B, 1, L, S]."""
        batch, length = input_ids.shape
        slots = torch.arange(self.cache.layers[0].max_cache_len, device=input_ids.device)
        positions = torch.arange(length, device=input_ids.device) + getattr(self, LENGTH_NAME)
        causal = (slots <= positions[:, None])[None, None]
        return causal.expand(batch, -1, -1, -1) if visible is None else causal & visible[:, None, None]


@dataclass(frozen=True)
class DecoderPrograms:
    """What `export_decoder` gives.

    Attributes:
        prefill: ids int64 [B, L], 2 <= L <= max_prefill_len, and with padding a mask bool [B, L], to logits [B, V] of
            the last token.
        decode: ids int64 [B, 1] to logits [B, V].
        manifest: shapes, dtypes, device.

    The programs hold the tensors of the model they were made of, and one cache; see `decoder` to run them.
    """

    prefill: ExportedProgram
    decode: ExportedProgram
    manifest: Manifest

    def decoder(self) -> ExportedDecoder:
        """Runs the programs in this process; every decoder of them uses the same cache."""
        return decoder_of(self.prefill, self.decode, self.manifest)

    def save(self, folder: str | os.PathLike[str]) -> Manifest:
        """Writes programs or packages and manifest.json; an older export there is replaced at once or not at all.

        `pq_ao.exported.load_exported` reads them. One process at a time may save into a folder.

        Args:
            folder: made if need be; other files in it are left alone.

        Returns:
            what manifest.json says.

        Raises:
            ValueError: the folder is a file, or has a manifest.json that is not ours.
            OSError: it could not be written, such as on a full disk; the export that was there stands then.
        """
        return write_folder(Path(folder), self.manifest, self._write)

    def _write(self, staging: Path) -> None:
        if self.manifest.backend == "aoti":
            compile_packages(self.prefill, self.decode, staging)
            return
        caches = cache_names(self.prefill)
        everything = [*self.decode.state_dict, *self.decode.constants]
        for name, program, left_out in (("prefill", self.prefill, caches), ("decode", self.decode, everything)):
            with _emptied(program, left_out):
                torch.export.save(program, staging / f"{name}{FILES['export'][name]}")


def export_decoder(
    model: PreTrainedModel,
    batch_size: int,
    max_cache_len: int,
    *,
    max_prefill_len: int | None = None,
    padded: bool = False,
    strict: bool = False,
    backend: str = "export",
) -> DecoderPrograms:
    """Exports a quantized model as programs of prefill and decode, which torch and `pq_ao.ops` alone can run.

    The hidden prefix is in the programs. Ops are `aten` and `pq_ao`, tensors are plain. On a GPU, prefill runs on the
    kernel that takes every length; the other paths of the model depend on the length, and a program cannot.

    Args:
        model: after `calibrate` and `quantize_`; its device is that of the programs.
        batch_size: rows of every batch.
        max_cache_len: tokens of prompt and reply together, at least 4.
        max_prefill_len: the most tokens of one call of prefill, 4 to max_cache_len; None for max_cache_len. Longer
            prompts run in several calls.
        padded: prefill takes a mask of padding on the left as well; without, all rows have the same length.
        strict: mode of `torch.export.export`.
        backend: "export", or "aoti" for programs of `aten` alone, whose `save` compiles packages of AOTInductor, for
            the CPU: half a minute each even for small models.

    Raises:
        ValueError: the model is not quantized, a size or backend is not allowed, "aoti" for a model on a GPU, or the
            GPU is older than compute capability 8.0.

    Example::

        quantize_(model, config)
        pq_ao.export_decoder(model, batch_size=1, max_cache_len=2048).save("out/exported")
    """
    describe(model)  # raises for a model that is not quantized
    max_prefill_len = max_cache_len if max_prefill_len is None else max_prefill_len
    for name, size, low, high in (
        ("batch_size", batch_size, 1, None),
        ("max_cache_len", max_cache_len, 4, None),
        ("max_prefill_len", max_prefill_len, 4, max_cache_len),
    ):
        if not isinstance(size, int) or isinstance(size, bool) or size < low or (high is not None and size > high):
            allowed = f"at least {low}" if high is None else f"{low} to max_cache_len={high}"
            raise ValueError(f"{name}={size!r}: must be an integer, {allowed}.")
    if backend not in FILES:
        raise ValueError(f"backend={backend!r}: must be one of {tuple(FILES)}.")
    if backend == "aoti" and model.device.type != "cpu":
        raise ValueError(f"backend='aoti': for the CPU only, and the model is on {model.device}; use backend='export'.")
    length = Dim("length", min=2, max=max_prefill_len)
    unfused = backend == "aoti"

    def cached() -> _CachedDecoder:  # with a cache of its own, for tracing leaves traces in it
        return _CachedDecoder(model, PrefixStaticCache(model, batch_size, max_cache_len), padded, unfused).eval()

    def ids(tokens: int) -> Tensor:
        return torch.zeros(batch_size, tokens, dtype=torch.int64, device=model.device)

    with torch.no_grad():
        with forced_path(_path_of_any_length(model.device)):
            prompt = ids(min(_TRACED_LENGTH, max_prefill_len))
            inputs = (prompt, torch.ones_like(prompt, dtype=torch.bool)) if padded else (prompt,)
            prefill = _export(cached(), inputs, strict, length)
        decode = _export(cached(), (ids(1),), strict)
    share_state(prefill, decode)
    manifest = _manifest(model, prefill, backend, batch_size, max_cache_len, max_prefill_len, padded)
    return DecoderPrograms(prefill, decode, manifest)


def _path_of_any_length(device: torch.device) -> LinearPath:
    capability = capability_of(device)
    if capability is None:
        return LinearPath.INT_MM
    if capability < _TILE_CAPABILITY:
        raise ValueError(
            f"model: is on a GPU of compute capability {capability}; programs of a dynamic length need "
            f"{_TILE_CAPABILITY} or later. Export it on the CPU."
        )
    return LinearPath.TILE


def _export(
    decoder: _CachedDecoder, inputs: tuple[Tensor, ...], strict: bool, length: Dim | None = None
) -> ExportedProgram:
    """One program; `length` is the dimension of the tokens, None for exactly those of `inputs`."""
    shapes = None if length is None else tuple({1: length} for _ in inputs)
    program = torch.export.export(decoder, inputs, dynamic_shapes=shapes, strict=strict)
    program = program.run_decompositions(decompositions() if decoder.unfused else None)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _manifest(
    model: PreTrainedModel,
    prefill: ExportedProgram,
    backend: str,
    batch_size: int,
    max_cache_len: int,
    max_prefill_len: int,
    padded: bool,
) -> Manifest:
    logits = prefill.graph.output_node().args[0][-1].meta["val"]
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    pad = model.generation_config.pad_token_id
    return Manifest(
        backend=backend,
        batch_size=batch_size,
        max_cache_len=max_cache_len,
        max_prefill_len=max_prefill_len,
        padded=padded,
        vocab_size=model.get_input_embeddings().weight.shape[0],
        logits=list(logits.shape),
        dtype=str(logits.dtype).removeprefix("torch."),
        device=model.device.type,
        cache_bytes=sum(prefill.state_dict[name].nbytes for name in cache_names(prefill)),
        eos_token_ids=ends,
        pad_token_id=pad if pad is not None else (ends[0] if ends else 0),
        torch=torch.__version__,
        files={},
    )


@contextmanager
def _emptied(program: ExportedProgram, names: list[str]) -> Iterator[None]:
    """Tensors called `names` are empty inside the context."""
    kept = [(tensors, dict(tensors)) for tensors in (program.state_dict, program.constants)]
    try:
        for tensors, before in kept:
            for name in before.keys() & set(names):
                empty = torch.empty(0, dtype=before[name].dtype, device=before[name].device)
                is_parameter = isinstance(before[name], nn.Parameter)
                tensors[name] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
        yield
    finally:
        for tensors, before in kept:
            tensors.update(before)
