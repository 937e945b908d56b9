"""Checks of a saved model: of its files before anything is loaded, and of its numbers before it is put together."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from pq_ao.checkpoint.config import CheckpointConfig
from pq_ao.checkpoint.names import in_order
from pq_ao.fingerprint import fingerprint

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8, "I8": torch.int8}
_RESTORE = "restore the file, or save the model again"

# how the names of tensors end that a quantization divides by
_FACTORS = ("scale", "clip")


def check_files(
    files: Sequence[str], expected: dict[str, Tensor], config: CheckpointConfig, folder: str
) -> dict[str, str]:
    """Reads the headers of all weights files: together they must hold exactly the expected tensors.

    Args:
        files: paths as transformers found them.
        expected: tensors on meta by name.
        config: of the checkpoint.
        folder: what `from_pretrained` was given.

    Returns:
        the file of each tensor.

    Raises:
        ValueError: a file is outside of the folder, missing, damaged, not safetensors or of another save; or a tensor
            is missing, there twice, unknown, or of another shape or dtype.
    """
    found: dict[str, str] = {}
    for path in files:
        _check_path(path, folder)
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                headers = {name: file.get_slice(name) for name in file.keys()}
                shapes = {name: (header.get_dtype(), header.get_shape()) for name, header in headers.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: is missing, cut short or no safetensors file ({error}); {_RESTORE}.") from error
        if metadata.get("tensors_sha256") != config.tensors_sha256:
            raise ValueError(
                f"{path}: belongs to another save than config.json (tensors_sha256={metadata.get('tensors_sha256')!r} "
                f"instead of {config.tensors_sha256!r}): a save was interrupted, or files were mixed. Restore the "
                "folder, or save the model again into an empty one."
            )
        for name, (dtype, shape) in shapes.items():
            if name in found:
                raise ValueError(f"{path}: tensor {name!r} is in {found[name]} as well; {_RESTORE}.")
            if name not in expected:
                raise ValueError(f"{path}: tensor {name!r} is unknown to a model of this config.json; {_RESTORE}.")
            wanted = (expected[name].dtype, tuple(expected[name].shape))
            if (_DTYPES.get(dtype), tuple(shape)) != wanted:
                raise ValueError(
                    f"{path}: tensor {name!r} is {dtype} {list(shape)}; this config.json asks for "
                    f"{str(wanted[0]).removeprefix('torch.')} {list(wanted[1])}{_hint(name)}. Make config.json and "
                    "weights be of the same save."
                )
            found[name] = path
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(
            f"{', '.join(map(str, files))}: tensor {missing[0]!r} is missing"
            f"{f', and {len(missing) - 1} more' if len(missing) > 1 else ''}; {_RESTORE}."
        )
    return found


def _check_path(path: str, folder: str) -> None:
    if not str(path).endswith(".safetensors"):
        raise ValueError(f"{path}: is not a safetensors file, and a prefixquant checkpoint has no others; {_RESTORE}.")
    if os.path.isdir(folder):
        inside = Path(os.path.abspath(folder))
        if inside not in Path(os.path.abspath(path)).parents:
            raise ValueError(
                f"{path}: the index of {folder} points to a file outside of it; such a folder is not loaded."
            )


def _hint(name: str) -> str:
    if name.endswith(("prefix_k", "prefix_v")):
        return " [KV heads, prefix tokens, head size]: the prefix does not fit the model"
    return ""


def check_prefix(config: CheckpointConfig, vocab_size: int) -> None:
    """Raises ValueError where an id of the prefix is none of the model's."""
    for token in config.prefix_ids or ():
        if token >= vocab_size:
            raise ValueError(
                f"config.json: quantization_config: prefix_ids: {token} does not fit the model, whose vocab_size is "
                f"{vocab_size}; restore config.json."
            )


@torch.no_grad()
def check_values(
    model: PreTrainedModel, expected: dict[str, Tensor], files: dict[str, str], config: CheckpointConfig
) -> None:
    """Looks at what was loaded: finite numbers, scales above zero, and every bit as it was saved.

    Args:
        model: the filled skeleton.
        expected: tensors on meta by name.
        files: of each tensor.
        config: of the checkpoint.

    Raises:
        ValueError: a tensor was not loaded, holds NaN or Inf, or is a scale or clip factor that is not positive; or
            the tensors are others than those that were saved.
    """
    state = model.state_dict()
    for name, wanted in expected.items():
        tensor, place = state[name], f"{files[name]}: tensor {name!r}"
        if tensor.device.type == "meta" or (tensor.dtype, tensor.shape) != (wanted.dtype, wanted.shape):
            raise ValueError(f"{place} was not loaded as it should be; {_RESTORE}.")
        if not tensor.is_floating_point():
            continue
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{place} holds NaN or Inf; {_RESTORE}.")
        if name.endswith(_FACTORS) and not (tensor > 0).all():
            raise ValueError(f"{place} holds a value that is not above zero ({tensor.min().item()}); {_RESTORE}.")
    found = fingerprint(in_order({name: state[name] for name in expected}).items())
    if found != config.tensors_sha256:
        raise ValueError(
            f"{', '.join(sorted(set(files.values())))}: the tensors are not those that were saved (sha256 {found} "
            f"instead of {config.tensors_sha256}): bits were changed. Copy the checkpoint again, or save it again."
        )
