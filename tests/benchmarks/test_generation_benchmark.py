"""The generation benchmark from end to end on a tiny decoder, and the baseline that it compares with."""

import time
from dataclasses import replace

import pytest
import torch

from benchmarks import generation
from benchmarks.baselines import (
    CACHE_ATTENTION_NAME,
    SDPA_NAME,
    AttentionChoice,
    baseline_cache,
    inductor_settings,
    llama_3_8b,
    random_llama,
    tiny_llama,
)
from benchmarks.fused_llama import fuse_
from benchmarks.generation import shapes_of, systems_of, time_limit
from benchmarks.kernel_profile import KernelTime, group_of, kernels_per_layer, split_ms
from benchmarks.results_file import load_results
from benchmarks.systems import BASELINE, SYSTEMS, Loaded, Settings, Shape, compiled_step, step_bytes

pytestmark = pytest.mark.usefixtures("one_thread")


class TestBaseline:
    # attention without a mask is right once the cache is full, which is where decode is timed
    @pytest.mark.parametrize(
        ("implementation", "steps"),
        [(SDPA_NAME, ((0, 11), (11, 12))), (CACHE_ATTENTION_NAME, ((0, 10), (10, 11), (11, 12)))],
    )
    @pytest.mark.parametrize("fused", [False, True])
    @torch.no_grad()
    def test_equals_the_stock_model(self, implementation, steps, fused):
        config = tiny_llama(2)
        ids = torch.randint(config.vocab_size, (2, 12))
        stock = random_llama(config, "sdpa", "cpu")(ids).logits
        loaded = Loaded(random_llama(config, implementation, "cpu"), baseline_cache(config, 2, 12, "cpu"))
        if fused:
            fuse_(loaded.model)
        layer = loaded.cache.layers[1]
        address = layer.keys.data_ptr()
        for first, last in steps:
            torch.testing.assert_close(loaded.forward(ids[:, first:last]), stock[:, last - 1], atol=0.01, rtol=0)
        assert layer.keys.data_ptr() == address and int(layer.cumulative_length) == 12 and int(layer.start) == 11
        assert (layer.keys.float().abs().sum(-1) > 0).all()

    def test_refuses_padding(self):
        config = tiny_llama(1)
        model = random_llama(config, SDPA_NAME, "cpu")
        with pytest.raises(ValueError, match="attention_mask"):
            model(torch.zeros(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 4, dtype=torch.long))

    def test_options_that_torchao_sets_do_not_stay(self):
        config = torch._inductor.config
        before = config.coordinate_descent_tuning, torch.get_float32_matmul_precision()
        with inductor_settings():
            config.coordinate_descent_tuning = not before[0]
            torch.set_float32_matmul_precision("medium")
        assert (config.coordinate_descent_tuning, torch.get_float32_matmul_precision()) == before

    def test_bytes_of_a_step(self):
        config, systems = llama_3_8b(), {system.label: system for system in SYSTEMS}
        ours = systems["pq_ao-static"]
        assert step_bytes(config, systems[BASELINE], 128, 2048) == pytest.approx(49.4e9, rel=0.01)
        assert step_bytes(config, ours, 128, 2048) == pytest.approx(12.6e9 + 0.5e9, rel=0.02)
        head = step_bytes(config, ours, 1, 1) - step_bytes(config, systems["pq_ao-static-int8-head"], 1, 1)
        assert head == config.vocab_size * config.hidden_size


@pytest.mark.parametrize("system", SYSTEMS[:4], ids=lambda system: system.label)
@torch.no_grad()
def test_a_step_appends_one_token_and_can_be_put_back(system):
    loaded = system.build(
        tiny_llama(1), Shape("decode", 2, 16), torch.device("cpu"), AttentionChoice("sdpa"), Settings()
    )
    loaded.fill()
    step = compiled_step(loaded, torch.ones(2, 1, dtype=torch.long), "eager", "eager", 8)
    loaded.set_length(8)
    first = step()
    assert int(loaded.cache.get_seq_length()) == 9 and first.shape == (2, 320)
    loaded.set_length(8)
    assert torch.equal(step(), first)
    assert all(layer.keys.float().std() > 0 for layer in loaded.cache.layers)


def arguments(folder, *more: str) -> list[str]:
    where = ["--model", "tiny", "--device", "cpu", "--backend", "eager", "--output", str(folder)]
    return [*where, "--layers", "1", "--steps", "2", "--repeats", "1", *more]


class TestRun:
    def test_from_end_to_end(self, tmp_path, capsys):
        assert generation.main(arguments(tmp_path, "--rows", "decode-2x16", "prefill-2x8")) == 1
        (results,) = load_results("generation", tmp_path)
        rows = {(row["phase"], row["system"], row["head"]): row for row in results.rows}
        assert len(rows) == len(results.rows) == 2 * len(SYSTEMS) - 1  # the head does not count in prefill
        failed = {key[1] for key, row in rows.items() if "error" in row}
        assert failed and all(name.startswith("torchao") for name in failed)  # they need a GPU
        for (phase, system, _), row in rows.items():
            if system in failed:
                assert row["ms"] is None and row["speedup"] is None and row["error"]
                continue
            baseline = rows[phase, BASELINE, "bf16"]
            assert row["speedup"] == pytest.approx(baseline["ms"] / row["ms"], rel=0.01) and row["counts"]
            tokens = 2 * (8 if phase == "prefill" else 1)
            assert row["tokens_per_s"] == pytest.approx(1e3 * tokens / row["ms"], rel=0.01)
            assert (row["bandwidth_fraction"] is None) == (phase == "prefill")
            assert {"batch": 2, "layers": 1, "model_layers": 4, "extrapolated": False}.items() <= row.items()
        assert rows["decode", "bf16-eager", "bf16"]["compile_mode"] == "eager"
        assert "AssertionError" in capsys.readouterr().out

    def test_failing_system_does_not_stop_the_others(self, tmp_path, monkeypatch, capsys):
        def fails(*_):
            raise RuntimeError("no luck\nand a long story")

        systems = (SYSTEMS[0], replace(SYSTEMS[1], build=fails), replace(SYSTEMS[3], name="other"))
        monkeypatch.setattr(generation, "SYSTEMS", systems)
        assert generation.main(arguments(tmp_path, "--rows", "decode-1x8")) == 1
        baseline, failed, other = load_results("generation", tmp_path)[0].rows
        assert failed["error"] == "RuntimeError: no luck" and "error" not in baseline and other["speedup"] > 0

    def test_fewer_layers_are_extrapolated(self, tmp_path, monkeypatch):
        run = generation.GenerationRun

        def measured(self, system, shape, attention, layers):
            return generation.Measurement(10.0 + 2.0 * layers, "eager", 0.0, 1.5, [])

        monkeypatch.setattr(run, "_measure", measured)
        more = ["--layers", "2", "--extrapolate", "--systems", BASELINE, "--rows", "decode-1x16"]
        assert generation.main(arguments(tmp_path, *more)) == 0
        (row,) = load_results("generation", tmp_path)[0].rows
        assert (row["ms"], row["layers"], row["extrapolated"], row["peak_gib"]) == (18.0, 2, True, None)
        with pytest.raises(SystemExit):
            generation.parse(arguments(tmp_path, "--layers", "4", "--extrapolate"))

    def test_weak_baseline_makes_its_rows_not_count(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(generation, "LEAST_BANDWIDTH", {Shape("decode", 1, 16): 1e9})
        rows = ["--systems", BASELINE, "bf16-eager", "--rows", "decode-1x16"]
        generation.main(arguments(tmp_path, *rows, "--layers", "4", "--fuse-baseline"))
        assert [row["counts"] for row in load_results("generation", tmp_path)[0].rows] == [False, False]
        assert "(1.00x)" in capsys.readouterr().out

    def test_time_is_up(self, tmp_path, capsys):
        assert generation.main(arguments(tmp_path, "--rows", "decode-1x16", "--seconds", "-1")) == 0
        assert not load_results("generation", tmp_path) and "not measured" in capsys.readouterr().out

    def test_a_system_takes_too_long(self):
        with pytest.raises(TimeoutError, match="longer than 1 s"), time_limit(1):
            time.sleep(5)
        with time_limit(0):
            pass

    @pytest.mark.parametrize("more", [["--rows", "w2*"], ["--systems", "x"], ["--rows", "decode-1x3"]])
    def test_arguments_that_do_not_fit(self, tmp_path, capsys, more):
        assert generation.main(arguments(tmp_path, *more)) == 2
        assert more[0] in capsys.readouterr().err

    def test_names_of_rows_and_systems(self):
        assert shapes_of(["*"]) == list(generation.SHAPES) and len(generation.SHAPES) == 8
        assert shapes_of(["decode-32x8k", "prefill-*", "decode-3x100"]) == [
            Shape("decode", 32, 8192),
            *(Shape("prefill", batch, 2048) for batch in (1, 4, 16)),
            Shape("decode", 3, 100),
        ]
        labels = [system.label for system in systems_of(["pq_ao-static*", "bf16-compiled"])]
        assert labels == ["bf16-compiled", "pq_ao-static", "pq_ao-static-int8-head"]


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "linears"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_32x32_128x2_tn_align8>", "linears"),
        ("gemv_kernel", "linears"),
        ("tile_kernel", "linears"),
        ("decode_kernel", "attention"),
        ("triton_tem_fused_mm_3", "linears"),
        ("void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("triton_red_fused__to_copy_add_mean_mm_scaled_dot_product_flash_attention_2", "rest"),
        ("silu_hadamard_kernel", "rest"),
        ("Memcpy DtoD (Device -> Device)", "rest"),
    ],
)
def test_group_of_a_kernel(kernel, group):
    assert group_of(kernel) == group


def test_kernels_of_a_layer():
    names = {"gemv_kernel": 8, "first norm": 1, "norm": 7, "head gemm": 1, "attention": 4}
    kernels = [KernelTime(name, count, 10.0 * count) for name, count in names.items()]
    assert kernels_per_layer(kernels, 4) == 2 + 2 + 1 and kernels_per_layer([], 4) is None
    assert split_ms(kernels) == pytest.approx({"linears": 0.09, "attention": 0.04, "rest": 0.08}) and not split_ms([])
