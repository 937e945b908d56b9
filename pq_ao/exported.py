"""Runs an exported decoder. Needs torch and `pq_ao.ops`: neither torchao nor transformers is imported.

Shape suffixes: B batch, L tokens, V vocabulary.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

import pq_ao.ops  # noqa: F401  registers the ops that the programs call
from pq_ao.export_manifest import FILES, Manifest, checked_file, read_manifest
from pq_ao.ops.kernels.workspace import counters
from pq_ao.static_step import MODES_WITH_GRAPHS, StaticStep
from pq_ao.token_inputs import check_ids, left_padding

# the cache's buffers in a program; every other name belongs to the model
CACHE_PREFIX = "cache_"
LENGTH_NAME = "cache_length"
# with padding: bool [B, S], slots that count; int64 [B, 1], tokens of each row
VISIBLE_NAME = "cache_visible"
SEEN_NAME = "cache_seen"

_RESTORE = "Restore the folder, or export the model again"

Step = Callable[..., Tensor]


class ExportedDecoder:
    """Prefill and decode over one cache, and greedy generation on top of them.

    Of a batch, rows that are finished give padding.

    Args:
        prefill: ids [B, L] with 2 <= L <= max_prefill_len, and with padding a mask bool [B, L], to logits [B, V];
            appends to the cache.
        decode: ids [B, 1] to logits [B, V]; appends to the same cache.
        cache: the tensors that both programs change in place, by name.
        manifest: of the programs.
    """

    def __init__(self, prefill: Step, decode: Step, cache: dict[str, Tensor], manifest: Manifest):
        self.cache, self.manifest = cache, manifest
        self._prefill, self._decode, self._length = prefill, decode, cache[LENGTH_NAME]
        self._held = 0  # its number, as the host knows it
        self.reset()

    @property
    def device(self) -> torch.device:
        """Where ids go in and logits come out."""
        return self._length.device

    @property
    def held(self) -> int:
        """Tokens in the cache."""
        return self._held

    def reset(self) -> None:
        """Forgets all tokens."""
        self._length.zero_()
        self._held = 0
        if self.manifest.padded:
            self.cache[VISIBLE_NAME].fill_(True)
            self.cache[SEEN_NAME].zero_()

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Appends tokens to the cache.

        Args:
            input_ids: integers [B, L]; more than max_prefill_len run in several calls.
            attention_mask: [B, L], 0 for padding on the left, else 1; None for none.

        Returns:
            [B, V] logits of the last token.

        Raises:
            ValueError: wrong shape or batch, no tokens, ids that the model does not have, padding elsewhere than on
                the left or for programs without it, or more tokens than the cache has room for.
            TypeError: ids that are not integers.
        """
        ids, mask = self._checked(input_ids, attention_mask)
        self._check_room(ids.shape[1])
        logits = None
        for start in range(0, ids.shape[1], self.manifest.max_prefill_len):
            part = slice(start, start + self.manifest.max_prefill_len)
            inputs = [ids[:, part].contiguous()]
            if inputs[0].shape[1] == 1:  # the last token, which is never padding
                logits = self._decode(*inputs)
            else:
                inputs += [mask[:, part].contiguous()] if mask is not None else []
                logits = self._prefill(*inputs)
            self._held += inputs[0].shape[1]
        return logits

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Appends one token a row.

        Args:
            tokens: int64 [B], on the programs' device.

        Returns:
            [B, V] logits; where decode was compiled on a GPU, valid until the next call.

        Raises:
            ValueError: the cache is full.
        """
        self._check_room(1)
        logits = self._decode(tokens.view(self.manifest.batch_size, 1))
        self._held += 1
        return logits

    def generate(
        self, input_ids: Tensor, max_new_tokens: int = 128, attention_mask: Tensor | None = None, **options
    ) -> Tensor:
        """Begins a new text and generates a whole reply, greedily.

        Args:
            input_ids, attention_mask: see `prefill`.
            max_new_tokens, options: see `stream`.

        Returns:
            int64 [B, L + new tokens] on the CPU: prompt and reply.
        """
        reply = list(self.stream(input_ids, max_new_tokens, attention_mask, **options))
        return torch.cat((input_ids.cpu().to(torch.int64), torch.stack(reply, dim=1)), dim=1)

    def stream(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 128,
        attention_mask: Tensor | None = None,
        *,
        eos_token_ids: Sequence[int] | None = None,
    ) -> Iterator[Tensor]:
        """Begins a new text and yields the likeliest tokens step by step, as int64 [B] on the CPU.

        Args:
            input_ids, attention_mask: see `prefill`.
            max_new_tokens: at least 1.
            eos_token_ids: tokens that end a row; None for those of the model, an empty tuple for none.

        Raises:
            ValueError, TypeError: see `prefill`; or prompt and `max_new_tokens` exceed the cache.
        """
        if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens!r}: must be an integer of at least 1.")
        ids, mask = self._checked(input_ids, attention_mask)
        self.reset()
        self._check_room(ids.shape[1] + max_new_tokens)
        ends = self.manifest.eos_token_ids if eos_token_ids is None else eos_token_ids
        return self._run(ids, mask, max_new_tokens, torch.tensor(tuple(ends), dtype=torch.int64))

    @torch.no_grad()
    def _run(self, ids: Tensor, mask: Tensor | None, max_new_tokens: int, ends: Tensor) -> Iterator[Tensor]:
        logits = self.prefill(ids, mask)
        finished = torch.zeros(self.manifest.batch_size, dtype=torch.bool)
        for left in reversed(range(max_new_tokens)):
            token = logits.argmax(dim=-1)
            given = token.cpu().masked_fill(finished, self.manifest.pad_token_id)
            finished |= torch.isin(given, ends)
            yield given
            if finished.all():
                break
            if left:
                logits = self.decode(given.to(self.device))

    def _check_room(self, length: int) -> None:
        room = self.manifest.max_cache_len
        if self._held + length > room:
            raise ValueError(
                f"max_cache_len={room}: the cache holds {self._held} tokens; {length} more (prompt and reply) do not "
                f"fit; export the model with max_cache_len={self._held + length} or more, or reset() this decoder."
            )

    def _checked(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """int64 ids, and for programs with padding a boolean mask; both on the programs' device."""
        manifest = self.manifest
        check_ids(ids, manifest.batch_size, manifest.vocab_size, "these programs take", "export the model")
        return ids.to(self.device, torch.int64), self._checked_mask(ids, mask)

    def _checked_mask(self, ids: Tensor, mask: Tensor | None) -> Tensor | None:
        mask = left_padding(torch.ones_like(ids) if mask is None else mask, ids)
        if self.manifest.padded:
            return mask.to(self.device)
        if not mask.all():
            raise ValueError("attention_mask: these programs know no padding; export the model with padded=True.")
        return None


def cache_names(program: ExportedProgram) -> list[str]:
    """Names of the buffers that a program changes: keys, values, per-token scales and the length."""
    return sorted(program.graph_signature.buffers_to_mutate.values())


def _inputs(program: ExportedProgram) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The fake tensors behind the inputs of a program's graph: those that are given, and its state by name."""
    given, state = [], {}
    placeholders = (node for node in program.graph.nodes if node.op == "placeholder")
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        if spec.target is None:
            given.append(node.meta["val"])
        else:
            state[spec.target] = node.meta["val"]
    return given, state


def share_state(prefill: ExportedProgram, decode: ExportedProgram) -> None:
    """Gives both programs one empty cache, and decode the weights of prefill; in place.

    Raises:
        ValueError: decode has a tensor that prefill lacks, or has in another shape or dtype.
    """
    theirs, mine = _inputs(prefill)[1], _inputs(decode)[1]
    for name, tensor in mine.items():
        like = theirs.get(name)
        if like is None or (like.shape, like.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(
                f"decode: {name!r}, which is another tensor in prefill or none: the programs are of different models. "
                "Export the model again."
            )
    for name in cache_names(prefill):
        like = theirs[name]
        prefill.state_dict[name] = torch.zeros(tuple(like.shape), dtype=like.dtype, device=like.device)
    for target, source in ((decode.state_dict, prefill.state_dict), (decode.constants, prefill.constants)):
        for name in target:
            target[name] = source[name]


def load_exported(folder: str | os.PathLike[str], *, compile_options: dict[str, Any] | None = None) -> ExportedDecoder:
    """Loads what `export_decoder(...).save(folder)` wrote.

    A program is code: load only what comes from somebody you trust. The checks here find damage, not malice.

    Args:
        folder: with a manifest.json.
        compile_options: keyword arguments of `torch.compile` for decode, best those of
            `pq_ao.recommended_compile_options`; None runs it as it is. On a GPU what was compiled is recorded as a CUDA
            graph, unless a mode such as "reduce-overhead" does that. Packages of AOTInductor are compiled already.

    Raises:
        ValueError: the folder is damaged, incomplete or of a later version; its device is not here; or
            `compile_options` for packages.

    Example::

        decoder = load_exported("out/exported")
        print(decoder.generate(torch.tensor([[1, 15, 27]]), max_new_tokens=32))
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if compile_options is not None and manifest.backend == "aoti":
        raise ValueError("compile_options: packages of AOTInductor are compiled already; leave it out.")
    paths = {name: checked_file(folder, manifest, name) for name in FILES[manifest.backend]}
    if manifest.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"folder={str(folder)!r}: the programs are for CUDA, and there is no GPU here; export the model on the CPU."
        )
    if manifest.backend == "aoti":
        return _load_packages(paths, manifest, folder)
    programs = {name: _loaded(torch.export.load, path, manifest) for name, path in paths.items()}
    share_state(programs["prefill"], programs["decode"])
    batch = manifest.batch_size
    for name, program in programs.items():
        given, state = _inputs(program)
        shapes = [tuple(tensor.shape) for tensor in given]
        padded = manifest.padded and name == "prefill"
        if len(given) != 1 + padded or name == "decode" and shapes != [(batch, 1)]:
            wanted = f"ids {(batch, 1)}" if name == "decode" else f"ids{' and a mask' if padded else ''} [{batch}, L]"
            raise ValueError(
                f"folder={str(folder)!r}: {name}: takes tensors of {shapes} instead of {wanted}. {_RESTORE}."
            )
        _check_sizes(state, name, manifest, folder)
    return decoder_of(programs["prefill"], programs["decode"], manifest, compile_options)


def decoder_of(
    prefill: ExportedProgram,
    decode: ExportedProgram,
    manifest: Manifest,
    compile_options: dict[str, Any] | None = None,
) -> ExportedDecoder:
    """Of programs that share their state already."""
    cache = {name: prefill.state_dict[name] for name in cache_names(prefill)}
    counters(cache[LENGTH_NAME].device)  # must exist before a CUDA graph is recorded
    step = decode.module()
    if compile_options is not None:
        step = _compiled(step, cache, compile_options)
    return ExportedDecoder(prefill.module(), step, cache, manifest)


def _compiled(decode: Step, cache: dict[str, Tensor], options: dict[str, Any]) -> Step:
    device = cache[LENGTH_NAME].device
    if device.type != "cuda" or options.get("mode") in MODES_WITH_GRAPHS:
        return torch.compile(decode, **options)
    return StaticStep(decode, options, lambda: take_back(cache), torch.cuda.graph_pool_handle())


def take_back(cache: dict[str, Tensor]) -> None:
    """Forgets the last token of each row; the next one takes its slot."""
    for name in {LENGTH_NAME, SEEN_NAME} & cache.keys():
        cache[name].sub_(1)


def _load_packages(paths: dict[str, Path], manifest: Manifest, folder: Path) -> ExportedDecoder:
    """Packages hold no tensors: both are given the same ones, which stay Python's."""
    state = _loaded(lambda path: torch.load(path, mmap=True, weights_only=True), paths["state"], manifest)
    _check_sizes(state, "state", manifest, folder)
    for name in state:
        if name.startswith(CACHE_PREFIX):
            state[name] = torch.zeros(state[name].shape, dtype=state[name].dtype)
    steps = []
    for program in ("prefill", "decode"):
        package = _loaded(torch._inductor.aoti_load_package, paths[program], manifest)
        names = package.get_constant_fqns()
        if missing := sorted(set(names) - state.keys()):
            raise ValueError(f"{paths['state']}: lacks {missing[0]!r}, which {program} needs. {_RESTORE}.")
        package.load_constants({name: state[name] for name in names}, check_full_update=True, user_managed=True)
        steps.append(package)
    cache = {name: tensor for name, tensor in state.items() if name.startswith(CACHE_PREFIX)}
    decoder = ExportedDecoder(*steps, cache, manifest)
    decoder._state = state  # the packages only point to it
    return decoder


def _loaded(load: Callable[[Path], Any], path: Path, manifest: Manifest) -> Any:
    try:
        return load(path)
    except Exception as error:  # torch raises whatever its parsers meet
        raise ValueError(
            f"{path}: torch {torch.__version__} cannot load this file, which torch {manifest.torch} wrote "
            f"({type(error).__name__}: {error}). Export the model again with the torch that is here."
        ) from error


def _check_sizes(tensors: dict[str, Tensor], place: str, manifest: Manifest, folder: Path) -> None:
    """The manifest must not promise room that the cache does not have: what finds no slot is not stored."""
    batch, slots = manifest.batch_size, manifest.max_cache_len
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if not name.startswith(CACHE_PREFIX) or name == LENGTH_NAME:
            continue
        sizes = {SEEN_NAME: {0: batch}, VISIBLE_NAME: {0: batch, 1: slots}}.get(name, {0: batch, 2: slots})
        if any(shape[axis : axis + 1] != (size,) for axis, size in sizes.items()):
            raise ValueError(
                f"folder={str(folder)!r}: manifest.json says batch_size={batch} and max_cache_len={slots}, but {name} "
                f"of {place} is {shape}. {_RESTORE}."
            )
