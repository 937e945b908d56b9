"""Every way to save a quantized model and every way to run it, behind the same two calls.

Shape suffixes: B batch, L tokens, T steps, V vocabulary.
"""

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import pq_ao
from pq_ao.checkpoint.names import stored_tensors
from pq_ao.export_aoti import save_state
from pq_ao.export_folder import write_folder
from pq_ao.export_manifest import FILES, checked_file, read_manifest
from pq_ao.exported import CACHE_PREFIX, load_exported
from pq_ao.fingerprint import fingerprint
from pq_ao.tensors import PackedWeight

SAVES = ("single", "sharded", "state_dict")
WAYS = ("eager", "compiled", "exported", "aoti")

# the bits of eager: Inductor then rounds between fused operations where eager does, and divides as it does
_COMPILE_OPTIONS = {"emulate_precision_casts": True, "eager_numerics.division_rounding": True}
_LAYER_TENSORS = ("keys", "values", "key_scale", "value_scale")
_SHARDS = 3


def reloaded(model: PreTrainedModel, save: str, folder: Path) -> PreTrainedModel:
    """What comes back after `model` was saved to `folder`: a folder of `save_pretrained`, or a state dict."""
    if save == "state_dict":
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), folder / "model.pt")
        other = _blank(model)
        other.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
        return other
    size = sum(tensor.nbytes for tensor in stored_tensors(model).values())
    model.save_pretrained(folder, max_shard_size=size // _SHARDS if save == "sharded" else 2 * size)
    if (len(list(folder.glob("*.safetensors"))) > 1) != (save == "sharded"):
        raise RuntimeError(f"{folder}: was to be saved as {save!r}, and holds another number of files.")
    return AutoModelForCausalLM.from_pretrained(folder, device_map=model.device)


def _blank(model: PreTrainedModel) -> PreTrainedModel:
    """A model that was quantized alike, with zeros wherever a state dict has something to say."""
    other = copy.deepcopy(model)
    for tensor in other.state_dict().values():
        for part in (tensor.qdata, tensor.scale) if isinstance(tensor, PackedWeight) else (tensor,):
            part.zero_()
    return other


def integers_of(model: PreTrainedModel) -> str:
    """sha256 of all codes, scales, shifts, prefixes and floating-point tensors of a quantized model."""
    return fingerprint(stored_tensors(model).items())


@dataclass(frozen=True)
class Outcome:
    """What greedy decoding gave.

    Attributes:
        logits: [T, B, V] of each step, on the CPU.
        cache: keys, values and their scales by name, as far as they are filled.
    """

    logits: Tensor
    cache: dict[str, Tensor]

    @property
    def tokens(self) -> Tensor:
        """int64 [T, B]."""
        return self.logits.argmax(dim=-1)

    def equal_steps(self, other: "Outcome") -> int:
        """Steps, from the first one on, whose logits are bitwise those of `other`."""
        same = [torch.equal(*pair) for pair in zip(self.logits, other.logits, strict=True)]
        return (same + [False]).index(False)

    def equal_tokens(self, other: "Outcome") -> int:
        """Tokens, from the first one on, that are those of `other`."""
        same = (self.tokens == other.tokens).all(dim=1).tolist()
        return (same + [False]).index(False)

    def prefill_sqnr(self, other: "Outcome") -> float | None:
        """Signal to error of the first step's logits in dB; None where they are equal."""
        got, expected = self.logits[0].double(), other.logits[0].double()
        error = (got - expected).square().sum()
        return round(float(10 * torch.log10(expected.square().sum() / error)), 1) if error else None

    def same_cache(self, other: "Outcome") -> bool:
        """Whether the cache holds the same codes and scales."""
        return self.cache.keys() == other.cache.keys() and all(
            torch.equal(tensor, other.cache[name]) for name, tensor in self.cache.items()
        )


def _forward(model: PreTrainedModel, ids: Tensor, cache: pq_ao.PrefixStaticCache) -> Tensor:
    return model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]


class Runner:
    """Runs models of one architecture in every way. What is compiled for the first one serves all.

    Args:
        folder: for programs and packages; made if need be.
        batch_size: rows.
        max_cache_len: prompt and reply together.
    """

    def __init__(self, folder: Path, batch_size: int, max_cache_len: int):
        self.folder, self.sizes = folder, (batch_size, max_cache_len)
        self._compiled = torch.compile(_forward, fullgraph=True, dynamic=False, options=_COMPILE_OPTIONS)
        self._packages: tuple[Path, str] | None = None  # and the text of the programs that they were made of

    @torch.no_grad()
    def run(self, way: str, model: PreTrainedModel, ids: Tensor, new_tokens: int) -> Outcome:
        """Prefills ids [B, L] and decodes `new_tokens` - 1 tokens greedily; `way` is one of `WAYS`."""
        if way in ("exported", "aoti"):
            decoder = self._exported(model) if way == "exported" else self._packaged(model)
            step, tensors = decoder.prefill, decoder.cache
        else:
            cache, forward = pq_ao.PrefixStaticCache(model, *self.sizes), _forward if way == "eager" else self._compiled
            tensors = {
                f"{CACHE_PREFIX}{name}_{index}": getattr(layer, name)
                for index, layer in enumerate(cache.layers)
                for name in _LAYER_TENSORS
                if getattr(layer, name) is not None
            }

            def step(ids: Tensor) -> Tensor:
                return forward(model, ids, cache)

        logits = _greedy(step, ids.to(model.device), new_tokens)
        held = ids.shape[1] + new_tokens - 1
        kinds = tuple(f"{CACHE_PREFIX}{name}_" for name in _LAYER_TENSORS)
        return Outcome(
            logits,
            {name: tensor[:, :, :held].cpu() for name, tensor in tensors.items() if name.startswith(kinds)},
        )

    def _exported(self, model: PreTrainedModel) -> pq_ao.ExportedDecoder:
        folder = self.folder / "programs"
        pq_ao.export_decoder(model, *self.sizes).save(folder)
        return load_exported(folder)

    def _packaged(self, model: PreTrainedModel) -> pq_ao.ExportedDecoder:
        """Compiling takes minutes, and packages hold no tensors: equal programs share them."""
        programs = pq_ao.export_decoder(model, *self.sizes, backend="aoti")
        text = "\n".join(program.graph_module.code for program in (programs.prefill, programs.decode))
        if self._packages is None:
            programs.save(self.folder / "packages")
            self._packages = self.folder / "packages", text
        compiled, known = self._packages
        if text != known:
            raise RuntimeError("model: its programs are not those that the packages were compiled of.")

        def write(staging: Path) -> None:
            for name in ("prefill", "decode"):
                path = checked_file(compiled, read_manifest(compiled), name)
                shutil.copy(path, staging / f"{name}{FILES['aoti'][name]}")
            save_state(programs.prefill, staging)

        write_folder(self.folder / "packages-again", programs.manifest, write)
        return load_exported(self.folder / "packages-again")


def _greedy(step: Callable[[Tensor], Tensor], ids: Tensor, new_tokens: int) -> Tensor:
    """[T, B, V]."""
    logits = [step(ids).clone()]
    for _ in range(new_tokens - 1):
        logits.append(step(logits[-1].argmax(dim=-1, keepdim=True)).clone())
    return torch.stack(logits).cpu()
