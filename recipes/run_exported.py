"""Generates text from an exported decoder and the tokenizer's file alone: without transformers and torchao.

    python -m recipes.run_exported FOLDER --tokenizer tokenizer.json --prompt "The capital of France is"
    python -m recipes.run_exported FOLDER --compile  # compiles decode first: worth it on a GPU

FOLDER is what `pq_ao.export_decoder(model, ...).save(folder)` wrote, programs or packages. The tokenizer's file is
FOLDER/tokenizer.json unless another is named; the package `tokenizers` reads it.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from pq_ao.export_manifest import read_manifest
from pq_ao.exported import ExportedDecoder, load_exported
from pq_ao.static_step import recommended_compile_options
from recipes.terminal import count, print_reply, run


def stream_text(decoder: ExportedDecoder, tokenizer: Tokenizer, prompt: str, new_tokens: int) -> list[int]:
    """Prints the reply to stdout while it is made; returns its token ids."""
    # a hidden prefix is in the programs: nothing is added in front
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False).ids])
    return print_reply(map(int, decoder.stream(ids, new_tokens)), tokenizer.decode)


def _compile_options(folder: Path) -> dict:
    return recommended_compile_options(read_manifest(folder).device)


def main(argv: Sequence[str] | None = None) -> list[int]:
    """Runs everything; returns the reply's token ids."""
    arguments = parse(argv)
    folder = Path(arguments.folder)
    path = Path(arguments.tokenizer or folder)
    if path.is_dir():
        path /= "tokenizer.json"
    if not path.is_file():
        raise SystemExit(f"--tokenizer {path}: there is no such file; name the tokenizer.json of the model.")
    tokenizer = Tokenizer.from_file(str(path))
    started = time.perf_counter()
    decoder = load_exported(folder, compile_options=_compile_options(folder) if arguments.compile else None)
    if decoder.manifest.batch_size != 1:
        raise SystemExit(f"{folder}: was exported for batches of {decoder.manifest.batch_size}; export with 1.")
    loaded = time.perf_counter()
    reply = stream_text(decoder, tokenizer, arguments.prompt, arguments.new_tokens)
    seconds = time.perf_counter() - loaded
    print(
        f"\n{decoder.manifest.backend} on {decoder.manifest.device}, loaded in {loaded - started:.1f} s; "
        f"{len(reply)} tokens in {seconds:.1f} s, {len(reply) / seconds:.1f} tokens/s with the prompt."
    )
    return reply


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Generate text from an exported decoder.")
    parser.add_argument("folder", help="of the exported decoder")
    parser.add_argument("--tokenizer", help="a tokenizer.json, or a folder with one (default: FOLDER)")
    parser.add_argument("--prompt", default="The capital of France is", help="default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="compile decode, on a GPU as a CUDA graph")
    parser.add_argument("--new-tokens", type=count, default=64, help="at most (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
