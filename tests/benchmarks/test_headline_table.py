"""The README's first tables, from made-up rows."""

from benchmarks.headline_table import headline
from tests.benchmarks.test_accuracy_tables import floating, results_of, row
from tests.benchmarks.test_speed_tables import row_of, run_of


def speed(*runs) -> str:
    return headline([run_of(f"2026-01-0{day}T00:00:00Z", rows) for day, rows in enumerate(runs, 1)], [])


def dense(ms: float, **changes):
    return row_of("bf16-compiled", ms, speedup=1.0, peak_gib=20.0, **changes)


class TestSpeed:
    def test_ours_beside_the_baseline_of_its_run(self):
        large = {"batch": 32, "context": 8192}
        prefill = {"phase": "prefill", "batch": 4, "context": 2048}
        text = speed(
            [dense(9.0), row_of(ms=4.0, speedup=2.25)],
            [dense(5.0), row_of(ms=2.0), row_of(ms=1.5, head="int8"), row_of("pq_ao-dynamic", 2.2)],
            [dense(13.0, **large), row_of(ms=5.2, **large), dense(190.0, **prefill), row_of(ms=118.0, **prefill)],
            [dense(6.0)],  # newer, but ours is not beside it
        )
        assert text.splitlines()[2:] == [
            "| decode, 1 x 1,024 tokens | 5.00 ms a token | 2.00 ms a token | 2.50x |",
            "| decode, 32 x 8,192 tokens | 13.00 ms a token | 5.20 ms a token | 2.50x |",
            "| prefill, 4 x 2,048 tokens | 190.0 ms | 118.0 ms | 2.50x |",
            "| memory, decode, 1 x 1,024 tokens | 20.0 GiB | 6.2 GiB | 0.31x |",
        ]
        assert text.splitlines()[0] == "| m's shape, NVIDIA H200 | compiled bf16 | W4A4KV4, static |  |"

    def test_neither_extrapolated_nor_failed_nor_alone(self):
        few = {"layers": 2, "extrapolated": True}
        rows = [dense(5.0, **few), row_of(**few), row_of(batch=8), dense(7.0, batch=4), row_of(batch=4, error="x")]
        assert speed(rows).startswith("No results yet")

    def test_memory_that_nobody_measured(self):
        assert "memory" not in speed([dense(5.0) | {"peak_gib": None}, row_of()])


class TestAccuracy:
    def test_each_scheme_by_the_method_as_a_whole(self):
        gptq, trained = {"rounding": "gptq"}, {"finetuned": True, "epochs": 3}
        rows = [
            floating(20.0),
            row(40.0),
            *(row(ppl, seed=seed, **gptq) for seed, ppl in enumerate((31.0, 30.0, 35.0))),
        ]
        rows += [row(28.0, **gptq, **trained), row(25.0, **gptq, **trained, end_to_end_epochs=4)]
        rows += [row(21.0, scheme="w8a8kv8"), row(1.0, prefix=False), row(1.0, mode="dynamic"), row(1.0, windows=2)]
        rows += [row(1.0, seqlen=8192), row(1.0, path="reference"), row(1.0, calibration_corpus="other", **gptq)]
        assert headline([], [results_of("2026-01-01T00:00:00Z", rows)]).splitlines() == [
            "| perplexity of m, `text` | bf16 | w8a8kv8 | w4a4kv4 |",
            "| --- | --- | --- | --- |",
            "| as calibrated | 20.00 | 21.00 | 31.00 |",
            "| fine-tuned |  |  | 25.00 |",
        ]

    def test_nothing_but_the_original(self):
        assert headline([], [results_of("2026-01-01T00:00:00Z", [floating(20.0)])]).startswith("No results yet")
