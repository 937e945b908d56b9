"""The README's tables of round trips: what came back equal, what folders cost, and decode of exported programs."""

from collections.abc import Iterable, Sequence

from benchmarks.provenance import provenance
from benchmarks.results_file import Results, Row, newest_rows
from benchmarks.ways import SAVES, WAYS

_KEYS = ("model", "what", "way", "save", "by")
_COLUMNS = ("original", *SAVES)


def round_trips(results: Iterable[Results]) -> str:
    """Markdown: a table a device and model.

    Args:
        results: of the benchmark of round trips, oldest first.
    """
    results = list(results)
    parts, runs = [], []
    for device in dict.fromkeys(run.device for run in results):
        here = [run for run in results if run.device == device]
        for model in dict.fromkeys(row["model"] for run in here for row in run.rows):
            found = newest_rows(here, _KEYS)
            found = [(row, run) for row, run in found if row["model"] == model]
            parts.append(_table(f"{model} on {device}", [row for row, _ in found]))
            runs += [run for _, run in found]
    if not parts:
        return "No results yet: `python -m benchmarks.round_trips` writes them, `python -m benchmarks.tables` this."
    return "\n\n".join([*parts, provenance(runs)])


def _table(title: str, rows: Sequence[Row]) -> str:
    cells = {(row["way"], row["save"]): _cell(row) for row in rows if row["what"] == "cell"}
    ways = [way for way in WAYS if any(way == found for found, _ in cells)]
    lines = [
        f"**{title}**: steps of greedy decoding with bitwise the logits of the eager original, of all",
        "",
        f"| run \\ saved | {' | '.join(_COLUMNS)} |",
        "|" + "---|" * (len(_COLUMNS) + 1),
        *(f"| {way} | {' | '.join(cells.get((way, save), '') for save in _COLUMNS)} |" for way in ways),
    ]
    notes = [_folder(row) for row in rows if row["what"] == "folder"]
    notes += [_decode(row) for row in rows if row["what"] == "decode"]
    notes += [_devices(row) for row in rows if row["what"] == "devices"]
    return "\n".join([*lines, "", *notes] if notes else lines)


def _cell(row: Row) -> str:
    if "error" in row:
        return "failed"
    # integers and codes of the cache are part of it
    equal = row["integers"] and row["cache_as_eager"] and row["cache_as_original"]
    return f"{row['steps_as_eager']} of {row['steps']}" + ("" if equal else ", codes differ")


def _folder(row: Row) -> str:
    copies = "no floating-point copy of them was made" if not row["float_copies"] else "with floating-point copies"
    return (
        f"- {row['save']}: codes and scales of linears take {row['quantized_bytes']:,} bytes, {row['ratio']:.3f} of "
        f"bf16; loaded in {row['load_seconds']:.2f} s, peak {row['peak_mib']:,} MiB for {row['model_mib']:,} MiB; "
        f"{copies}."
    )


def _devices(row: Row) -> str:
    return (
        f"- perplexity of {row['windows']} windows of {row['length']:,} tokens: {row['ppl'][0]:.3f} on the GPU, "
        f"{row['ppl'][1]:.3f} on the CPU; ratio {row['ratio']:.4f}, standard error {row['standard_error']:.4f}."
    )


def _decode(row: Row) -> str:
    return (
        f"- exported decode, CUDA graph by {row['by']}: {row['exported_ms']:.3f} ms a token, {row['ratio']:.2f}x "
        + (
            f"the engine's {row['engine_ms']:.3f} ms."
            if "engine_ms" in row
            else f"the model's {row['model_ms']:.3f} ms."
        )
    )
