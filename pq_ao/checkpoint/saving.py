"""`save`: a whole checkpoint or none, whatever happens meanwhile; and `push_to_hub`.

`save_pretrained` of transformers writes into the files of an older checkpoint, and tells no hook of a quantizer where.
An interruption leaves neither the old one nor the new then, but something that is refused on loading. `save` writes
beside the old files, under names of their own, and then replaces `config.json`, which names the weights file in use:
with that one rename the new checkpoint takes the place of the old one.
"""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from pq_ao.checkpoint.card import CARD_NAME, model_card
from pq_ao.checkpoint.config import QUANT_METHOD
from pq_ao.checkpoint.description import describe
from pq_ao.files import sync_file, sync_folder

_STAGING = ".pq_ao-saving-"

# weights files and their index as `save` (with an id) and `save_pretrained` (without) name them
_WEIGHTS = re.compile(r"model(?P<id>-[0-9a-f]{16})?(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")

Results = Sequence[Mapping[str, Any]]


def save(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    results: Results | None = None,
    max_shard_size: int | str = "50GB",
) -> None:
    """Saves a quantized model; a checkpoint that the folder holds is replaced at once or not at all.

    Whenever the process or the machine stops, `from_pretrained(folder)` gives the old model or the new one. For that
    the room for both is needed; the old weights are deleted at the end. Tokenizer, generation config and model card are
    written right after the new checkpoint is in place. Other files of the folder are left alone.

    Args:
        model: after `calibrate` and `quantize_`.
        folder: made if need be; may hold other files, but no other kind of model.
        tokenizer: saved beside the model.
        results: rows for the table in the model card, such as those of `benchmarks/results`.
        max_shard_size: as for `save_pretrained`.

    Raises:
        ValueError: the model is not quantized, or the folder holds another kind of model.
        RuntimeError: another process is saving into the folder.
        OSError: it could not be written, such as on a full disk; the checkpoint that was there stands then.

    Example::

        quantize_(model, config)
        pq_ao.save(model, folder, tokenizer=tokenizer)
    """
    describe(model)  # raises before anything is touched
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r} is a file; give a folder.")
    _check_owner(folder)
    folder.mkdir(parents=True, exist_ok=True)
    committed = False
    try:
        with _exclusive(folder), _staging(folder) as staging:
            _write(model, staging, tokenizer, results, max_shard_size)
            weights = _move_weights(staging, folder)
            os.replace(staging / CONFIG_NAME, folder / CONFIG_NAME)
            committed = True
            sync_folder(folder)
            if results is None and (folder / CARD_NAME).exists():
                (staging / CARD_NAME).unlink()  # somebody may have written more on the old one
            _move_rest(staging, folder)
            _delete_old_weights(folder, weights)
            sync_folder(folder)
    except (OSError, SafetensorError) as error:
        what = (
            "the model is saved, but not all that comes with it, or old weights could not be deleted"
            if committed
            else "the model could not be saved; a checkpoint that the folder held is still there"
        )
        advice = f"{error}: {what}. Make room or mend the folder, and save again"
        raise OSError(_errno(error), advice, str(folder)) from error


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    results: Results | None = None,
    private: bool | None = None,
    token: str | None = None,
    max_shard_size: int | str = "5GB",
    commit_message: str = "Upload a model quantized with pq_ao",
) -> str:
    """Uploads a quantized model with its model card, in one commit.

    Args:
        model, tokenizer, results, max_shard_size: see `save`.
        repo_id: "name" or "owner/name"; made if need be.
        private, token: see `huggingface_hub.HfApi.create_repo`.
        commit_message: of the commit.

    Returns:
        URL of the commit.

    Raises:
        ValueError: the model is not quantized.
        OSError: it could not be written to a temporary folder, or not be uploaded.

    Example::

        pq_ao.push_to_hub(model, "me/SmolLM2-135M-w4a4kv4", tokenizer=tokenizer)
    """
    from huggingface_hub import HfApi

    describe(model)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        _write(model, Path(folder), tokenizer, results, max_shard_size)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message))


def _write(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    results: Results | None,
    max_shard_size: int | str,
) -> None:
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    (folder / CARD_NAME).write_text(model_card(model, results), encoding="utf-8")
    for path in folder.glob("*.safetensors"):
        _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Equal models give equal files: safetensors writes metadata in an order that changes from run to run."""
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length).decode()
        start = header.index("{", header.index('"__metadata__"'))
        metadata, end = json.JSONDecoder().raw_decode(header, start)
        text = json.dumps(metadata, sort_keys=True, separators=(",", ":"))
        assert len(text) == end - start, path
        file.seek(8 + start)
        file.write(text.encode())


def _move_weights(staging: Path, folder: Path) -> set[str]:
    """Gives the weights in `staging` names of their own and moves them to `folder`; its config names them then.

    Returns:
        the new names.
    """
    config = json.loads((staging / CONFIG_NAME).read_bytes())
    key = config["quantization_config"]["tensors_sha256"][:16]
    names = {path.name: path.name.replace("model", f"model-{key}", 1) for path in staging.glob("model*.safetensors*")}
    index = staging / SAFE_WEIGHTS_INDEX_NAME
    main = next(iter(names.values()))
    if index.exists():
        main = names[index.name]
        content = json.loads(index.read_bytes())
        content["weight_map"] = {tensor: names[file] for tensor, file in content["weight_map"].items()}
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    config["transformers_weights"] = main
    (staging / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in staging.rglob("*"):
        if path.is_file():
            sync_file(path)
    for old, new in sorted(names.items()):  # the index last: one of the same name may be in use
        os.replace(staging / old, folder / new)
    sync_folder(folder)
    return set(names.values())


def _move_rest(staging: Path, folder: Path) -> None:
    for path in sorted(staging.rglob("*")):
        target = folder / path.relative_to(staging)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            os.replace(path, target)


def _errno(error: Exception) -> int:
    """Also of an error of safetensors, which has the number in its text only."""
    number = re.search(r"os error (\d+)", str(error))
    return getattr(error, "errno", None) or (int(number[1]) if number else errno.EIO)


def _delete_old_weights(folder: Path, current: set[str]) -> None:
    for path in folder.iterdir():
        if _WEIGHTS.fullmatch(path.name) and path.name not in current:
            path.unlink()


def _check_owner(folder: Path) -> None:
    """Refuses a folder with a model that is not ours: its weights would be lost, and they may be the original's."""
    method = QUANT_METHOD
    if (folder / CONFIG_NAME).exists():
        try:
            method = json.loads((folder / CONFIG_NAME).read_bytes()).get("quantization_config", {}).get("quant_method")
        except (ValueError, AttributeError):
            method = None
    elif folder.exists() and any(
        (match := _WEIGHTS.fullmatch(name)) and not match["id"] for name in os.listdir(folder)
    ):
        method = None
    if method != QUANT_METHOD:
        raise ValueError(
            f"folder={str(folder)!r} holds another model, or one that is damaged, and saving would delete its weights; "
            "give another folder, or empty this one."
        )


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """One save at a time, where the system has locks for folders."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(
                f"folder={str(folder)!r}: another process is saving into it; wait for its end."
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A folder inside `folder`, so that moving out of it is a rename; gone at the end."""
    for left in folder.glob(f"{_STAGING}*"):  # by a process that was killed
        shutil.rmtree(left)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
