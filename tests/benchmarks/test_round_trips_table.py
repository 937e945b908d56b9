"""The README's tables of round trips."""

from benchmarks.results_file import Results, Row
from benchmarks.round_trips_table import round_trips


def run_of(device: str, *rows: Row, date: str = "2026-01-01T00:00:00Z") -> Results:
    rows = [{"model": "m", **row} for row in rows]
    return Results(
        "round_trips", date, "abc1234", device, {"torch": "2.13.0"}, "python -m benchmarks.round_trips", rows
    )


def cell(way: str, save: str, equal: int = 8, **changes) -> Row:
    row: Row = {"what": "cell", "way": way, "save": save, "integers": True, "steps": 8, "steps_as_eager": equal}
    return row | {"cache_as_eager": True, "cache_as_original": True} | changes


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| ") and "saved" not in line]


def test_ways_down_and_saves_across():
    rows = [
        cell("aoti", "original"),
        cell("eager", "original"),
        cell("eager", "sharded", 3, cache_as_eager=False),
        cell("eager", "single", integers=False),
        cell("compiled", "single", error="RuntimeError: no compiler"),
    ]
    text = round_trips([run_of("CPU", *rows)])
    assert lines_of(text) == [
        "| eager | 8 of 8 | 8 of 8, codes differ | 3 of 8, codes differ |  |",
        "| compiled |  | failed |  |  |",
        "| aoti | 8 of 8 |  |  |  |",
    ]
    assert text.count("Measured 2026-01-01 on CPU (torch 2.13.0), commit abc1234") == 1


def test_the_newest_of_each_device_and_what_stands_below():
    folder = {"what": "folder", "save": "single", "quantized_bytes": 1000, "ratio": 0.2583, "load_seconds": 0.5}
    folder |= {"peak_mib": 297.5, "model_mib": 160.0, "float_copies": []}
    decode = {"what": "decode", "exported_ms": 0.5, "engine_ms": 1.0, "ratio": 0.5}
    runs = [
        run_of("GPU", cell("eager", "original", 1), decode | {"by": "reduce-overhead"}),
        run_of("CPU", cell("eager", "original", 2), folder),
        run_of("GPU", cell("eager", "original", 4), decode | {"by": "our recording"}, date="2026-02-01T00:00:00Z"),
    ]
    text = round_trips(runs)
    assert lines_of(text) == ["| eager | 4 of 8 |  |  |  |", "| eager | 2 of 8 |  |  |  |"]
    assert text.index("**m on GPU**") < text.index("**m on CPU**")
    assert "take 1,000 bytes, 0.258 of bf16; loaded in 0.50 s, peak 297.5 MiB for 160.0 MiB; no floating" in text
    for by in ("our recording", "reduce-overhead"):
        assert f"CUDA graph by {by}: 0.500 ms a token, 0.50x the engine's 1.000 ms." in text
    likewise = {"what": "decode", "by": "reduce-overhead", "exported_ms": 0.5, "model_ms": 2.0, "ratio": 0.25}
    text = round_trips([run_of("GPU", cell("eager", "original", 1), likewise)])
    assert "CUDA graph by reduce-overhead: 0.500 ms a token, 0.25x the model's 2.000 ms." in text


def test_no_results():
    assert round_trips([]).startswith("No results yet")
