"""The benchmark of single ops from end to end on tiny shapes, and its clocks."""

import pytest
import torch

from benchmarks import block_cases, kernel_cases, kernels, timing
from benchmarks.baselines import llama_3_8b
from benchmarks.kernel_cases import Sizes
from benchmarks.results_file import load_results

pytestmark = pytest.mark.usefixtures("one_thread")


def arguments(folder, *more: str) -> list[str]:
    return ["--model", "tiny", "--device", "cpu", "--output", str(folder), *more]


def test_from_end_to_end(tmp_path, capsys):
    assert kernels.main(arguments(tmp_path, "--tokens", "1", "3", "--all-paths")) == 0
    results = load_results("kernels", tmp_path)
    rows = [row for run in results for row in run.rows]
    ops = [row["op"] for row in rows]
    assert set(ops) == {"linear", "linears", "attention_decode", "attention_prefill", *kernels.OPS} - {"attention"}
    assert ops.count("linear") == 2 * 2 * 4 and ops.count("linears") == 4  # chosen and int_mm, on four layers
    for row in rows:
        assert row["us"] > 0 and row["limit_fraction"] >= 0
        assert row["speedup"] == pytest.approx(row["baseline_us"] / row["us"], rel=0.01)
        assert row["exact"] is (True if row["op"].startswith("linear") else None)
    sums = next(row for row in rows if row["op"] == "linears")
    parts = [row for row in rows if row["op"] == "linear" and (row["path"], row["m"]) == ("auto", 1)]
    assert sums["us"] == pytest.approx(sum(row["us"] for row in parts), rel=1e-3)
    assert {row["note"] for row in parts} == {"int_mm"}
    assert "| linears | auto: int_mm | m 1 |" in capsys.readouterr().out


def test_wrong_integers_are_seen(tmp_path, monkeypatch, capsys):
    accumulate = kernel_cases.int_accumulate

    def off_by_one(*args, **kwargs):
        sums = accumulate(*args, **kwargs)
        sums[-1, -1] += 1
        return sums

    monkeypatch.setattr(kernel_cases, "int_accumulate", off_by_one)
    kernels.main(arguments(tmp_path, "--tokens", "2", "--ops", "linear"))
    assert all(row["exact"] is False for row in load_results("kernels", tmp_path)[0].rows)
    assert "NOT EXACT" in capsys.readouterr().out


def test_failing_op_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise RuntimeError("no luck")

    monkeypatch.setattr(block_cases, "silu_hadamard_op", fails)
    ops = ["--ops", "silu_hadamard", "norm*"]
    assert kernels.main(arguments(tmp_path, "--tokens", "2", *ops)) == 1
    failed, good = load_results("kernels", tmp_path)[0].rows
    assert failed["error"] == "RuntimeError: no luck" and "error" not in good
    assert "| silu hadamard | static | m 2, k 256 | failed |" in capsys.readouterr().out


def test_arguments_that_do_not_fit(tmp_path, capsys):
    assert kernels.main(arguments(tmp_path, "--ops", "x*")) == 2 and "--ops x*" in capsys.readouterr().err
    assert kernels.main(arguments(tmp_path, "--seconds", "-1")) == 0
    assert not load_results("kernels", tmp_path)


def test_shapes_of_an_8b_model():
    linears = Sizes.of(llama_3_8b()).linears
    assert linears == {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}


def test_steps_are_counted_behind_the_lead():
    calls: list[str] = []
    timing.step_ms(lambda: calls.append("s"), "cpu", steps=3, repeats=2, before=lambda: calls.append("b"), lead=1)
    assert "".join(calls) == "bssss" * 2


def test_launches_on_a_cpu_and_random_content():
    count = torch.zeros(())
    assert timing.launch_us([lambda: count.add_(1)] * 3, "cpu") > 0 and int(count) == 6
    assert timing.copy_bandwidth("cpu") > 1e6
    for dtype in (torch.uint8, torch.int8, torch.bfloat16, torch.float32):
        assert timing.fill_random_(torch.zeros(64, dtype=dtype)).float().std() > 0
