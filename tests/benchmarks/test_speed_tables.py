"""Tables and plot made from results of the speed benchmarks."""

import pytest
from PIL import Image

from benchmarks import tables
from benchmarks.generation_table import generation, speedups
from benchmarks.kernels_table import kernels
from benchmarks.results_file import Results, ResultsFile, Row

VERSIONS = {"torch": "2.13.0", "triton": None}


def run_of(date: str, rows: list[Row], benchmark: str = "generation") -> Results:
    return Results(benchmark, date, "abc1234", "NVIDIA H200", VERSIONS, f"python -m benchmarks.{benchmark}", rows)


def row_of(system: str = "pq_ao-static", ms: float | None = 2.0, **changes) -> Row:
    row: Row = {"model": "m", "system": system, "head": "bf16", "phase": "decode", "batch": 1, "context": 1024}
    row |= {"layers": 32, "model_layers": 32, "extrapolated": False, "ms": ms, "tokens_per_s": 500.0, "counts": True}
    row |= {"speedup": 2.5, "peak_gib": 6.25, "bandwidth_fraction": 0.5, "kernels_per_layer": 9}
    return row | {"split_ms": {"linears": 1.0, "attention": 0.25, "rest": 0.5}} | changes


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| ") and "system" not in line]


class TestGeneration:
    def test_columns_and_order(self):
        rows = [
            row_of(head="int8", ms=1.5, speedup=3.333),
            row_of(),
            row_of("bf16-compiled", 5.0, speedup=1.0, fused=True),
            row_of("torchao-int4wo", None, error="RuntimeError: a | b", speedup=None),
            row_of(phase="prefill", batch=4, context=2048, bandwidth_fraction=None, tokens_per_s=81920.0),
            row_of(batch=32, context=8192, kernels_per_layer=None, peak_gib=None),
        ]
        text = generation([run_of("2026-01-01T00:00:00Z", rows)])
        assert lines_of(text) == [
            "| 1 x 1,024 | bf16-compiled, fused projections | 5.00 | 500 | 1.00x | 0.40x | 6.2 | 50% | 9 |",
            "| 1 x 1,024 | torchao-int4wo | failed: RuntimeError: a / b |  |  |  |  |  |  |",
            "| 1 x 1,024 | pq_ao-static | 2.00 | 500 | 2.50x |  | 6.2 | 50% | 9 |",
            "| 1 x 1,024 | pq_ao-static, int8 head | 1.50 | 500 | 3.33x |  | 6.2 | 50% | 9 |",
            "| 32 x 8,192 | pq_ao-static | 2.00 | 500 | 2.50x |  |  | 50% |  |",
            "| 4 x 2,048 | pq_ao-static | 2.00 | 81,920 | 2.50x |  | 6.2 | 1.0, 0.2, 0.5 |",
        ]
        assert text.count("Measured 2026-01-01 on NVIDIA H200 (torch 2.13.0), commit abc1234") == 1
        assert "extrapolated" not in text and "In brackets" not in text

    def test_ratio_to_ours_is_that_of_one_run(self):
        """A row of all layers in another file does not stand in for the one of as few layers beside it."""
        few = {"layers": 2, "extrapolated": True}
        runs = [
            run_of("2026-01-01T00:00:00Z", [row_of(ms=3.0)]),
            run_of("2026-01-02T00:00:00Z", [row_of(ms=2.0, **few), row_of("torchao-float8dq", 2.5, **few)]),
            run_of("2026-01-03T00:00:00Z", [row_of("torchao-int4wo", 2.5, **few)]),
        ]
        cells = {line.split(" | ")[1]: line.split(" | ")[2:6] for line in lines_of(generation(runs))}
        assert cells["torchao-float8dq"] == ["2.50*", "500", "2.50x", "0.80x"]
        assert cells["torchao-int4wo"][3] == "" and cells["pq_ao-static"] == ["3.00", "500", "2.50x", ""]

    def test_newest_whole_and_measured_rows_win(self):
        runs = [
            run_of("2026-01-01T00:00:00Z", [row_of(ms=3.0), row_of(batch=8, ms=4.0)]),
            run_of("2026-01-02T00:00:00Z", [row_of(ms=2.0), row_of(ms=9.0, layers=4)]),
            run_of("2026-01-03T00:00:00Z", [row_of(ms=8.0, layers=8, extrapolated=True), row_of(ms=None, error="x")]),
            run_of("2026-01-04T00:00:00Z", [row_of(ms=None, error="x"), row_of(batch=8, ms=None, error="x")]),
            run_of("2026-01-05T00:00:00Z", [row_of(batch=32, ms=7.0, layers=8, extrapolated=True, counts=False)]),
        ]
        text = generation(runs)
        cells = [line.split(" | ")[:5] for line in lines_of(text) if "pq_ao" in line]
        assert cells == [
            ["| 1 x 1,024", "pq_ao-static", "2.00", "500", "2.50x"],
            ["| 8 x 1,024", "pq_ao-static", "4.00", "500", "2.50x"],
            ["| 32 x 1,024", "pq_ao-static", "7.00*", "500", "(2.50x)"],
        ]
        assert "\\* extrapolated" in text and "In brackets" in text
        assert speedups(runs, "decode") == {"pq_ao-static": {(1, 1024): 2.5, (8, 1024): 2.5}}

    def test_a_run_that_was_cut_takes_no_place(self):
        """Its baseline is alone: no ratio, and beside a speed-up over another one."""
        whole = run_of("2026-01-01T00:00:00Z", [row_of("bf16-compiled", 5.0, speedup=1.0), row_of()])
        cut = run_of("2026-01-02T00:00:00Z", [row_of("bf16-compiled", 6.0, speedup=1.0), row_of(ms=None, error="x")])
        assert generation([whole, cut]).count("2026-01-02") == 0 and "| 5.00 |" in generation([whole, cut])
        assert "| 6.00 |" in generation([cut])

    def test_no_results(self):
        assert generation([]).startswith("No results yet") and not speedups([], "decode")
        assert generation([run_of("2026-01-01T00:00:00Z", [row_of(layers=4)])]).startswith("No results yet")


class TestKernels:
    def test_columns_and_order(self):
        numbers = {"us": 10.0, "baseline_us": 25.0, "speedup": 2.5, "limit_fraction": 0.8, "exact": True}
        rows = [
            {"model": "m", "op": "rope_store", "path": "static", "m": 1, "k": 64, **numbers, "exact": None},
            {"model": "m", "op": "linear", "path": "auto", "layer": "o", "m": 1, "n": 8, "k": 8, **numbers},
            {"model": "m", "op": "linears", "path": "auto", "m": 128, **numbers, "exact": False},
            {"model": "m", "op": "linears", "path": "auto", "m": 1, **numbers, "baseline_us": None, "speedup": None},
            {"model": "m", "op": "attention_decode", "path": "kv4", "batch": 1, "context": 1024, "error": "x"},
        ]
        text = kernels([run_of("2026-01-01T00:00:00Z", rows, "kernels")])
        assert lines_of(text)[1:] == [
            "| linears | auto | m 1 | 10.0 |  |  | 80% | yes |",
            "| linears | auto | m 128 | 10.0 | 25.0 | 2.50x | 80% | NO |",
            "| attention decode | kv4 | batch 1, context 1,024 | failed |  |  |  |  |",
            "| rope store | static | m 1, k 64 | 10.0 | 25.0 | 2.50x | 80% |  |",
        ]

    def test_no_results(self):
        assert kernels([]).startswith("No results yet")


@pytest.fixture
def readme(tmp_path):
    names = [section.name for section in tables.SECTIONS]
    sections = (f"<!-- {name}:begin -->\n<!-- {name}:end -->\n" for name in names)
    path = tmp_path / "README.md"
    path.write_text("".join(sections), encoding="utf-8")
    return path


class TestPlot:
    def test_is_drawn_and_checked(self, readme, tmp_path, capsys):
        folder = tmp_path / "results"
        arguments = ["--readme", str(readme), "--results", str(folder)]
        assert tables.main(arguments) == 0 and not (folder / tables.PLOT).exists()
        ResultsFile(run_of("2026-01-01T00:00:00Z", []), folder).append(row_of())
        assert tables.main([*arguments, "--check"]) == 1
        assert capsys.readouterr().err.count("out of date") == 2
        assert tables.main(arguments) == tables.main([*arguments, "--check"]) == 0
        assert f"benchmarks/results/{tables.PLOT}" in readme.read_text()
        with Image.open(folder / tables.PLOT) as image:
            assert image.width > 1000 and "[1, 1024, 2.5]" in image.info["Description"]
        (folder / tables.PLOT).unlink()
        assert tables.main([*arguments, "--check"]) == 1
        assert "generation.png is out of date" in capsys.readouterr().err

    def test_baseline_alone_is_no_plot(self, readme, tmp_path):
        folder = tmp_path / "results"
        ResultsFile(run_of("2026-01-01T00:00:00Z", []), folder).append(row_of("bf16-compiled", speedup=1.0))
        assert tables.main(["--readme", str(readme), "--results", str(folder)]) == 0
        assert not (folder / tables.PLOT).exists() and tables.PLOT not in readme.read_text()
