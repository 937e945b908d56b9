"""Exports a checkpoint as programs of `torch.export`, or as packages of AOTInductor, that run without transformers.

    python -m recipes.export out/SmolLM2-135M-Instruct-w4a4kv4 --max-cache-len 1024
    python -m recipes.export FOLDER --output out/packages --backend aoti --device cpu

Writes the programs, manifest.json and tokenizer.json to the output folder; `recipes/run_exported.py` runs them.
"""

import argparse
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import pq_ao
from pq_ao.export_manifest import FILES, Manifest
from pq_ao.files import replace_file
from recipes.models import add_saved_options, load_saved
from recipes.terminal import count, run, step


def main(argv: Sequence[str] | None = None) -> Manifest:
    """Runs everything; returns what manifest.json says."""
    arguments = parse(argv)
    if arguments.output is not None and Path(arguments.output).is_file():
        raise ValueError(f"--output {arguments.output}: is a file; give a folder.")
    folder, model, tokenizer = load_saved(arguments, must_be_ours=True)
    output = Path(arguments.output or Path("out", f"{folder.resolve().name}-{arguments.backend}"))
    started = time.perf_counter()
    step("exporting prefill and decode")
    programs = pq_ao.export_decoder(
        model,
        arguments.batch_size,
        arguments.max_cache_len,
        max_prefill_len=arguments.max_prefill_len,
        padded=arguments.padded,
        strict=arguments.strict,
        backend=arguments.backend,
    )
    step("compiling packages and writing them" if arguments.backend == "aoti" else "writing")
    manifest = programs.save(output)
    if tokenizer.is_fast:
        replace_file(output / "tokenizer.json", tokenizer.backend_tokenizer.to_str(pretty=True).encode())

    size = sum(file.bytes for file in manifest.files.values())
    batches = f"batches of {manifest.batch_size}{', with padding' if manifest.padded else ''}"
    print(f"\nbackend {manifest.backend}, for {manifest.device}; {batches}; prompt and reply")
    print(f"up to {manifest.max_cache_len:,} tokens together; {manifest.cache_bytes:,} bytes of cache when it runs")
    print(f"written to {output}, {size:,} bytes, after {time.perf_counter() - started:.1f} s")
    if manifest.batch_size == 1 and tokenizer.is_fast:
        print(f'run it:\n    python -m recipes.run_exported {shlex.quote(str(output))} --prompt "Once upon a time"')
    else:
        print(f"run it:\n    pq_ao.load_exported({str(output)!r}).generate(input_ids, max_new_tokens=64)")
    return manifest


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Export a quantized model as programs.")
    add_saved_options(parser)
    add = parser.add_argument
    add("--output", metavar="FOLDER", help="of the programs (default: out/MODEL-BACKEND)")
    add("--batch-size", type=count, default=1, metavar="N", help="rows of every batch (default: %(default)s)")
    add("--max-cache-len", type=count, default=2048, metavar="N", help="prompt and reply (default: %(default)s)")
    add("--max-prefill-len", type=count, metavar="N", help="of one call, others take several (default: the cache)")
    add("--padded", action="store_true", help="rows may begin with padding, which a mask tells")
    add("--backend", choices=tuple(FILES), default="export", help="aoti: packages for CPUs (default: %(default)s)")
    add("--strict", action="store_true", help="torch.export's strict mode")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
