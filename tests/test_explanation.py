"""Bytes against sums done by hand, what stays alive after a forward, and what the description says."""

import re

import pytest
import torch
from torchao.quantization import quantize_
from transformers import DynamicCache

import pq_ao
from pq_ao import PrefixStaticCache, calibrate, explain, live_bytes, memory, prefixquant_config
from pq_ao.config import SCHEMES
from pq_ao.explanation import totals

pytestmark = pytest.mark.usefixtures("one_thread")

# of `make_tiny`: width, MLP width, query heads, KV heads, head dim, layers
WIDTH, MLP, HEADS, GROUPS, HEAD_DIM, LAYERS = 96, 160, 4, 2, 24, 2
OUTPUTS_INPUTS = ((4 + 2 + 2) * HEAD_DIM, WIDTH), (WIDTH, HEADS * HEAD_DIM), (2 * MLP, WIDTH), (WIDTH, MLP)
DENSE = LAYERS * sum(2 * rows * columns for rows, columns in OUTPUTS_INPUTS)

SMOLLM2_SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "dtype": torch.bfloat16,
}


@pytest.fixture
def calibrated(make_tiny, tiny_tokenizer, english):
    """`calibrated(scheme, family="llama", ..., **config)`: a tiny model, calibrated but not yet quantized."""

    def make(scheme: str = "w4a4kv4", family: str = "llama", shape: dict | None = None, prefix_ids=None, **fields):
        model = make_tiny(family, **(shape or {"dtype": torch.bfloat16}))
        config = prefixquant_config(scheme, **fields)
        settings = {"num_sequences": 2, "sequence_length": 32, "prefix_ids": prefix_ids, "progress": False}
        calibrate(model, tiny_tokenizer, config, data=english, **settings)
        return model, config

    return make


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_of_a_quantized_model(calibrated, scheme, mode):
    model, config = calibrated(scheme, mode=mode)
    quantize_(model, config)
    batch, length = 3, 40
    report = memory(model, PrefixStaticCache(model, batch, length))

    static = mode == "static"
    linears = 0
    for rows, columns in OUTPUTS_INPUTS:
        linears += rows * columns * config.weight_bits // 8 + 4 * rows  # codes and their scales
        linears += 4 * columns + 4  # shift of the input, and its scale or clip factor
        linears += 4 * rows  # bias
    assert report.linear_bytes == LAYERS * linears
    assert report.linear_bf16_bytes == DENSE
    assert report.linear_ratio == LAYERS * linears / DENSE
    assert report.kept_bytes == 2 * 2 * model.config.vocab_size * WIDTH

    slots = LAYERS * 2 * GROUPS * batch * length  # keys and values
    prefix = LAYERS * 2 * GROUPS * model.model.layers[0].self_attn.prefix_k.shape[1] * HEAD_DIM * 2
    scales = 0
    if config.kv_bits < 16:
        scales = LAYERS * 2 * GROUPS * (1 + HEAD_DIM) * 4 + (0 if static else slots * 4)  # scales or clips, shifts
    assert prefix > 0
    assert report.kv_bytes == slots * HEAD_DIM * config.kv_bits // 8 + prefix + scales
    assert report.kv_bf16_bytes == slots * HEAD_DIM * 2
    assert report.kv_ratio == report.kv_bytes / report.kv_bf16_bytes


def test_before_quantize_weights_and_codes_are_both_held(calibrated):
    model, config = calibrated()
    before = memory(model, PrefixStaticCache(model, 1, 16))
    quantize_(model, config)
    after = memory(model)
    assert before.linear_bytes == after.linear_bytes + DENSE
    assert before.linear_bf16_bytes == after.linear_bf16_bytes == DENSE
    assert before.kv_bytes > before.kv_bf16_bytes  # floats, and the prefix
    assert after.kv_bytes is None and after.kv_bf16_bytes is None and after.kv_ratio is None


def test_biases_of_the_model_count_only_before_quantize(calibrated):
    """Every quantized linear has a bias, whether or not the model had one."""
    models = [calibrated(family=family) for family in ("llama", "qwen2")]
    plain, biased = (memory(model).linear_bytes for model, _ in models)
    assert biased - plain == LAYERS * 2 * OUTPUTS_INPUTS[0][0]  # q, k and v in bfloat16
    for model, config in models:
        quantize_(model, config)
    plain, biased = (memory(model).linear_bytes for model, _ in models)
    assert biased == plain


def test_a_quarter_is_what_stays_alive(calibrated):
    """Weights and cache of SmolLM2's shape, counted over everything alive: no unpacked copy stays anywhere."""
    length = 1024
    warm, config = calibrated(shape=SMOLLM2_SHAPE)  # fills the process-wide store of Hadamard matrices
    del warm
    before = live_bytes()
    model, config = calibrated(shape=SMOLLM2_SHAPE)
    quantize_(model, config)
    cache = PrefixStaticCache(model, 1, length)
    ids = torch.arange(64).unsqueeze(0)
    with torch.inference_mode():
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
    del ids
    alive = live_bytes() - before

    report = memory(model, cache)
    assert report.linear_ratio <= 0.27
    assert report.kv_ratio <= 0.27
    counted = report.linear_bytes + report.kept_bytes + report.kv_bytes
    small = alive.total() - counted  # final norm, Hadamard factors, RoPE frequencies, lengths
    assert 0 <= small < 0.002 * counted
    assert alive["int8"] == 0
    prefix = sum(2 * layer.self_attn.prefix_k.nbytes for layer in model.model.layers)
    floats = report.kept_bytes + prefix + model.model.norm.weight.nbytes
    assert 0 <= alive["bfloat16"] - floats < 1000  # RoPE frequencies
    assert alive["uint8"] == report.linear_bf16_bytes // 4 + cache.nbytes

    copy = model.model.layers[0].mlp.down_proj.weight.dequantize()
    assert (live_bytes() - before).total() == alive.total() + copy.nbytes  # it would have been seen


def test_names_of_functions_are_not_hidden_by_modules():
    """Importing a submodule binds its name in the package, and would win over a function of that name."""
    for name, home in pq_ao._HOME.items():
        assert home != f"pq_ao.{name}"


def test_live_bytes_counts_each_storage_once():
    before = live_bytes()
    whole = torch.zeros(1000, dtype=torch.float16)
    view, parameter = whole[10:20], torch.nn.Parameter(torch.zeros(7, 3), requires_grad=False)
    nowhere = torch.empty(10**6, device="meta")
    assert live_bytes() - before == {"float16": 2000, "float32": 84}
    packed = pq_ao.tensors.PackedWeight.from_codes(torch.zeros(6, 8, dtype=torch.int8), torch.ones(6), 4, torch.float16)
    assert live_bytes() - before == {"float16": 2000, "float32": 84 + 24, "uint8": 24}
    del whole
    assert (live_bytes() - before)["float16"] == 2000  # the view keeps all of it
    del view, parameter, nowhere, packed
    assert not live_bytes() - before


def span(scales: torch.Tensor) -> str:
    return f"{scales.min().item():.3g} to {scales.max().item():.3g}"


def memory_of(linear) -> int:
    site, weight = linear.quantizers[0], linear.weight
    held = (weight.qdata, weight.scale, linear.bias, site.scale, site.clip, site.shift)
    return sum(tensor.nbytes for tensor in held if tensor is not None)


@pytest.mark.parametrize("mode, prefix", [("static", True), ("static", False), ("dynamic", True)])
def test_explain(calibrated, mode, prefix):
    model, config = calibrated(mode=mode, prefix=prefix)
    floats = explain(model)
    with pq_ao.reference_path(model):
        reference = explain(model)
    quantize_(model, config)
    integers = explain(model)
    for text, path in ((floats, "float"), (reference, "reference"), (integers, "integer")):
        rows = [line.split() for line in text.splitlines() if line.startswith("model.layers.")]
        rows, attentions = ([row for row in rows if ("_proj" in row[0]) == linear] for linear in (True, False))
        assert [row[0] for row in attentions] == [f"model.layers.{i}.self_attn" for i in range(LAYERS)]
        assert all(row[1:5] == ["4", "bits", mode, path] for row in attentions)
        names = [f"model.layers.{i}.{n}" for i in range(LAYERS) for n in ("self_attn.qkv_proj", "self_attn.o_proj")]
        names += [f"model.layers.{i}.mlp.{n}" for i in range(LAYERS) for n in ("gate_up_proj", "down_proj")]
        assert sorted(row[0] for row in rows) == sorted(names)
        assert all(row[4:7] == ["w4a4", mode, path] for row in rows)
        assert f"path {path} ({len(names)} linears): " in text
    down = model.model.layers[1].mlp.down_in
    line = next(line for line in integers.splitlines() if line.startswith("model.layers.1.mlp.down_proj"))
    codes = model.model.layers[1].mlp.down_proj.weight
    assert re.search(rf"  int_mm +{memory_of(model.model.layers[1].mlp.down_proj):,}  {span(codes.scale)}  ", line)
    assert "  -  " in next(line for line in floats.splitlines() if line.startswith("model.layers.1.mlp.down_proj"))
    kv = model.model.layers[1].self_attn.kv
    line_of_kv = next(line for line in integers.splitlines() if line.startswith("model.layers.1.self_attn "))
    keys, values = (kv.key_scale, kv.value_scale) if mode == "static" else (kv.key_clip, kv.value_clip)
    assert span(keys) in line_of_kv and span(values) in line_of_kv
    assert f"{len(model.calibration_record.prefix.prefix_ids)} tokens" in line_of_kv
    assert line.split()[1:4] == [str(WIDTH), "x", str(MLP)]
    assert line.endswith(
        f"{down.scale.item():.5g} spread" if mode == "static" else f"per token, clip {down.clip.item():.3g}"
    )
    assert f"{memory(model).linear_bytes:,} bytes in all" in integers
    assert (
        "keys and values: 4 bits, one " + ("static scale a head" if mode == "static" else "scale a token") in integers
    )

    found = model.calibration_record.prefix
    assert f"prefix_ids: {list(found.prefix_ids) or 'none'}" in integers
    assert f"prefix: {len(found.prefix_ids)} tokens" in integers
    assert ("largest token ratio, BOS + text" in integers) == prefix
    for fact in ("num_sequences: 2", "sequence_length: 32", "rounding: nearest", "seed: 0", "lm_head: 300 x 96"):
        assert fact in integers


def test_explain_16_bit_keys_and_no_record(calibrated):
    model, config = calibrated("w4a4kv16", rotation=False)
    del model.calibration_record
    quantize_(model, config)
    text = explain(model)
    assert "keys and values: kept in bfloat16" in text
    rows = [line.split() for line in text.splitlines() if line.startswith("model.layers.0.self_attn ")]
    assert [row[1:5] for row in rows] == [["bfloat16", "float", "-", "-"]]
    assert "rotation: none" in text
    assert "no record is kept" in text


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("scheme", ["w4a4kv4", "w8a8kv8", "w4a4kv16"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_totals_add_up(calibrated, family, scheme, mode):
    model, config = calibrated(scheme, family, mode=mode)
    quantize_(model, config)
    cells = {line.split("  ")[0]: line.split("  ")[1:] for line in totals(model).splitlines()}
    numbers = {name: int(next(filter(None, row)).replace(",", "")) for name, row in cells.items() if name != "held"}
    *parts, whole, token = numbers.values()
    assert sum(parts) == whole
    report = memory(model, PrefixStaticCache(model, 1, 8))
    assert parts[:2] == [report.linear_bytes, report.kept_bytes]

    heads = 2 * HEAD_DIM * (family == "qwen3")  # gains of the norms of queries and keys
    gains = (WIDTH + LAYERS * heads) * 2
    rotations = {tensor.data_ptr(): tensor.nbytes for name, tensor in model.named_buffers() if name.endswith("_base")}
    frequencies = sum(tensor.nbytes for name, tensor in model.named_buffers() if "inv_freq" in name)
    assert parts[3] == gains + sum(rotations.values()) + frequencies
    longer = memory(model, PrefixStaticCache(model, 1, 9))
    assert token == longer.kv_bytes - report.kv_bytes
    assert f"of {longer.kv_bf16_bytes - report.kv_bf16_bytes:,}" in totals(model)
    assert totals(model) in explain(model)


def test_what_is_kept_and_why(calibrated):
    model, config = calibrated(prefix_ids=(5, 0))
    quantize_(model, config)
    table = {line.split("  ")[0]: line for line in explain(model).split("kept in high precision")[1].splitlines()[1:]}
    prefix = LAYERS * 2 * GROUPS * 2 * HEAD_DIM * 2
    for name, dtype, number, why in (
        (f"model.embed_tokens: 300 x {WIDTH}", "bfloat16", 300 * WIDTH * 2, "few bits there cost more accuracy"),
        (f"lm_head: 300 x {WIDTH}", "bfloat16", 300 * WIDTH * 2, "every logit hangs on it"),
        ("prefix keys, values", "bfloat16", prefix, "one static scale cannot serve both"),
        ("gains of norms that stand alone", "bfloat16", WIDTH * 2, ""),
    ):
        assert f"  {dtype}  " in table[name] and f"  {number:,}  " in table[name] and why in table[name]
    scales = memory(model).linear_bytes - DENSE // 4  # all but the codes
    heads = sum(tensor.nbytes for layer in model.model.layers for tensor in layer.self_attn.kv.buffers())
    assert f"  {scales + heads:,}  the epilogue" in table["scales, shifts, biases"]
    assert "used once" in table["queries"]

    pq_ao.quantize_head_(model)
    line = next(line for line in explain(model).splitlines() if line.startswith("lm_head"))
    assert re.search(rf"  int8, one scale a row +{300 * WIDTH + 300 * 4:,}  ", line)


def test_explain_tells_of_fine_tuning(calibrated):
    model, config = calibrated()
    model.calibration_record.finetune = pq_ao.FinetuneConfig(epochs=2)
    model.calibration_record.finetuning = [
        {"before": 0.5, "validation": [0.3, 0.25], "kept": 2},
        {"before": 0.4, "validation": [0.5, 0.6], "kept": 0},
    ]
    text = explain(model)
    assert "  finetune: epochs 2, batch_size 2, " in text
    assert "  error of the blocks, fine-tuned over rounded: 0.750 in the median, 0.500 to 1.000" in text


def test_explain_says_that_the_rule_did_not_hold(calibrated):
    model, _ = calibrated()
    object.__setattr__(model.calibration_record.prefix, "rule_ids", (7,))
    assert "prefix by the rule alone: [7]" in explain(model)


@pytest.mark.parametrize("question", [explain, memory])
def test_uncalibrated_models_are_refused(make_tiny, question):
    with pytest.raises(ValueError, match="pq_ao.calibrate"):
        question(make_tiny("llama"))


def test_other_caches_are_refused(calibrated):
    model, _ = calibrated()
    with pytest.raises(TypeError, match="DynamicCache.*PrefixStaticCache"):
        memory(model, DynamicCache())


def test_live_bytes_leaves_out_tensors_without_bytes():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    before = pq_ao.live_bytes()
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fake = mode.from_tensor(torch.zeros(64, 3), static_shapes=False)
    meta = torch.zeros(1000, device="meta")
    assert fake.device.type == "cpu" and meta.numel() == 1000
    assert (pq_ao.live_bytes() - before).total() == 0


def test_explain_says_which_kernels_serve_how_many_tokens(calibrated, monkeypatch):
    model, config = calibrated()
    assert "kernels: none yet" in explain(model)
    quantize_(model, config)
    assert "int_mm" in explain(model) and "dp4a" not in explain(model)
    monkeypatch.setattr("pq_ao.explanation.capability_of", lambda device: (9, 0))
    text = explain(model)
    spans = next(line for line in text.splitlines() if line.startswith("kernels by tokens"))
    assert "1 to 4 dp4a, 5 to 2048 tile, 2049 and more e4m3" in spans and f"{WIDTH} x {MLP}" in spans
    assert "  e4m3: " in text and "int_mm" not in text
