"""Programs of torch.export against the model they were made of: prefill and decode over one cache."""

import pytest
import torch

import pq_ao
from pq_ao.export import export_decoder
from pq_ao.exported import LENGTH_NAME, SEEN_NAME, VISIBLE_NAME, cache_names, take_back
from tests.checkpoints import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

SLOTS = 64
IDS = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(5))
NO_END = {"eos_token_ids": ()}

# family, scheme, batch, strict
CASES = {
    "llama": ("llama", "w4a4kv4", 1, False),
    "qwen2-dynamic-strict": ("qwen2", pq_ao.prefixquant_config(mode="dynamic"), 2, True),
    "qwen3-w8a8kv8": ("qwen3", "w8a8kv8", 1, False),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """Model, programs, and ids of their batch."""
    family, scheme, batch, strict = CASES[request.param]
    model = tiny(family, scheme, dtype=torch.bfloat16)
    return model, export_decoder(model, batch, SLOTS, max_prefill_len=24, strict=strict), IDS[:batch]


@pytest.fixture(scope="module")
def llama():
    model = tiny("llama")
    return model, export_decoder(model, 1, SLOTS)


def _eager(model, ids, new_tokens):
    return model.generate(
        ids, past_key_values=pq_ao.PrefixStaticCache(model, ids.shape[0], SLOTS), attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=2,
    )  # fmt: skip


@torch.no_grad()
def test_logits_and_cache_are_those_of_the_model_bit_by_bit(case):
    model, programs, ids = case
    decoder = programs.decoder()
    for length in (1, 2, 7, 13, 24):  # one program serves all; one token goes through decode
        cache = pq_ao.PrefixStaticCache(model, ids.shape[0], SLOTS)
        expected = model(ids[:, :length], past_key_values=cache, logits_to_keep=1).logits[:, -1]
        decoder.reset()
        assert torch.equal(decoder.prefill(ids[:, :length]), expected)
        for token in ids[:, length : length + 3].unbind(dim=1):
            expected = model(token[:, None], past_key_values=cache).logits[:, -1]
            assert torch.equal(decoder.decode(token), expected)
        held = length + 3
        assert decoder.held == int(programs.prefill.state_dict[LENGTH_NAME]) == int(cache.get_seq_length()) == held
        for index, layer in enumerate(cache.layers):
            for name in ("keys", "values", "key_scale", "value_scale"):
                expected = getattr(layer, name)
                if expected is not None:  # slots behind those held may be of the prompt before
                    got = programs.decode.state_dict[f"cache_{name}_{index}"]
                    assert torch.equal(got[:, :, :held], expected[:, :, :held]), name


def test_greedy_tokens_are_those_of_generate(case):
    model, programs, ids = case
    decoder = programs.decoder()
    for length in (20, 3):  # the shorter one behind the longer: its state is forgotten
        prompt = ids[:, :length]
        assert torch.equal(decoder.generate(prompt, 32, **NO_END), _eager(model, prompt, 32))


@torch.no_grad()
def test_a_long_prompt_runs_in_several_calls_of_prefill(case):
    model, programs, ids = case
    cache = pq_ao.PrefixStaticCache(model, ids.shape[0], SLOTS)
    for part in ids[:, :25].split(24, dim=1):
        expected = model(part, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    decoder = programs.decoder()
    assert torch.equal(decoder.prefill(ids[:, :25]), expected)
    assert decoder.held == 25


@pytest.fixture(scope="module")
def padded():
    """A model, programs with padding, ids and mask of three rows of unequal length."""
    model = tiny("qwen3", dtype=torch.bfloat16, num_hidden_layers=1)
    ids = torch.randint(3, 300, (3, 30), generator=torch.Generator().manual_seed(8))
    mask = torch.arange(30) >= torch.tensor([[12], [0], [29]])
    programs = export_decoder(model, 3, SLOTS, max_prefill_len=11, padded=True)
    return model, programs, ids.where(mask, 2), mask


@torch.no_grad()
def test_padded_rows_give_the_logits_of_the_model_bit_by_bit(padded):
    model, programs, ids, mask = padded
    decoder, cache = programs.decoder(), pq_ao.PrefixStaticCache(model, 3, SLOTS)
    visible = torch.ones(3, SLOTS, dtype=torch.bool)
    visible[:, :30] = mask
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    for part in torch.arange(30).split(11):
        expected = model(
            ids[:, part], attention_mask=visible, position_ids=positions[:, part], past_key_values=cache
        ).logits[:, -1]
    assert torch.equal(decoder.prefill(ids, mask), expected)
    following = positions[:, -1:]
    for token in (5, 77, 123):
        tokens, following = torch.full((3,), token), following + 1
        expected = model(tokens[:, None], attention_mask=visible, position_ids=following, past_key_values=cache).logits
        assert torch.equal(decoder.decode(tokens), expected[:, -1])
    assert torch.equal(decoder.cache[VISIBLE_NAME], visible)
    assert torch.equal(decoder.cache[SEEN_NAME], following + 1)


def test_a_padded_row_is_continued_as_it_is_alone(padded):
    model, programs, ids, mask = padded
    decoder = programs.decoder()
    replies = decoder.generate(ids, 24, mask, **NO_END)
    assert torch.equal(replies, decoder.generate(ids, 24, mask.long(), **NO_END))  # its state is forgotten
    for row in range(3):
        prompt = ids[row : row + 1, mask[row]]
        assert torch.equal(replies[row, 30:], _eager(model, prompt, 24)[0, prompt.shape[1] :])
    expected = _eager(model, ids, 24)
    assert torch.equal(decoder.generate(ids, 24, **NO_END), expected)  # without a mask every token counts


def test_a_token_that_was_taken_back_leaves_nothing_behind(padded):
    """As recording a CUDA graph does with the runs before it."""
    _, programs, ids, mask = padded
    decoder = programs.decoder()
    decoder.prefill(ids, mask)
    expected = decoder.decode(ids[:, -1]).clone()
    after = {name: tensor.clone() for name, tensor in decoder.cache.items()}
    take_back(decoder.cache)
    decoder.decode(ids[:, 0])
    take_back(decoder.cache)
    assert torch.equal(decoder.decode(ids[:, -1]), expected)
    assert all(torch.equal(tensor, after[name]) for name, tensor in decoder.cache.items())


def test_padded_programs_of_aten_alone(padded):
    """Those that packages are compiled of."""
    model, programs, ids, mask = padded
    plain = export_decoder(model, 3, SLOTS, padded=True, backend="aoti")
    targets = [node.target for node in plain.prefill.graph.nodes if node.op == "call_function"]
    assert {op.namespace for op in targets if isinstance(op, torch._ops.OpOverload)} == {"aten"}
    # as eager code calls them: taken apart they round otherwise, and a code flips once in some hundred tokens
    assert {torch.ops.aten.silu.default, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default} <= set(
        targets
    )
    assert torch.equal(plain.decoder().generate(ids, 12, mask), programs.decoder().generate(ids, 12, mask))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, 5), r"attention_mask: got shape \(3, 5\); it must be that of input_ids, \(3, 4\)"),
        (torch.tensor([[1, 1, 1, 0]] * 3), "zeros may stand on the left only"),
        (torch.tensor([[1, 0, 1, 1]] * 3), "zeros may stand on the left only"),
        (torch.zeros(3, 4), "zeros may stand on the left only"),
    ],
)
def test_wrong_masks_are_refused(padded, mask, message):
    with pytest.raises(ValueError, match=message):
        padded[1].decoder().prefill(torch.full((3, 4), 7), mask)


def test_programs_without_padding_say_so(llama):
    decoder, ids, mask = llama[1].decoder(), IDS[:1, :4], torch.tensor([[0, 1, 1, 1]])
    with pytest.raises(ValueError, match="know no padding; export the model with padded=True"):
        decoder.generate(ids, 4, mask)
    expected = decoder.generate(ids, 4)
    assert torch.equal(decoder.generate(ids, 4, torch.ones(1, 4)), expected)


def test_programs_hold_plain_tensors_and_known_ops_alone(case):
    _, programs, _ = case
    for program in (programs.prefill, programs.decode):
        for tensor in (*program.state_dict.values(), *program.constants.values()):
            assert type(tensor) in (torch.Tensor, torch.nn.Parameter)
        targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
        namespaces = {op.namespace for op in targets if isinstance(op, torch._ops.OpOverload)}
        assert namespaces == {"aten", "pq_ao"}
        others = {str(op) for op in targets if not isinstance(op, torch._ops.OpOverload)}
        assert others == {"auto_functionalized_v2", "<built-in function getitem>"}  # rope_store, and its results


def test_the_cache_is_buffers_that_both_programs_share(case):
    model, programs, ids = case
    names = cache_names(programs.prefill)
    assert names == cache_names(programs.decode)
    dynamic = model.get_submodule("model.layers.0.self_attn").kv.dynamic
    assert len(names) == 1 + 2 * len(model.model.layers) * (2 if dynamic else 1)
    prefill, decode = programs.prefill.module(), programs.decode.module()
    for name, tensor in dict(decode.named_buffers()).items():
        assert tensor.data_ptr() == prefill.get_buffer(name).data_ptr(), name
    for name, tensor in dict(decode.named_parameters()).items():
        assert tensor.data_ptr() == prefill.get_parameter(name).data_ptr(), name
    assert programs.manifest.cache_bytes == pq_ao.PrefixStaticCache(model, len(ids), SLOTS).nbytes + 8


def test_a_full_cache_is_a_clear_error_and_changes_nothing(llama):
    _, programs = llama
    decoder = programs.decoder()
    with pytest.raises(ValueError, match="max_cache_len=64: the cache holds 0 tokens; 65 more.*=65 or more, or reset"):
        decoder.prefill(torch.ones(1, 65, dtype=torch.int64))
    decoder.prefill(torch.full((1, SLOTS), 9))
    with pytest.raises(ValueError, match="max_cache_len=64: the cache holds 64 tokens; 1 more"):
        decoder.decode(torch.tensor([9]))
    assert decoder.held == SLOTS == int(programs.prefill.state_dict[LENGTH_NAME])
    with pytest.raises(ValueError, match="max_cache_len=64.*holds 0 tokens; 65 more"):
        decoder.stream(IDS[:1], 25)
    decoder.reset()
    decoder.decode(torch.tensor([9]))


def test_a_finished_row_ends_the_reply_or_gives_padding(llama):
    model, programs = llama
    decoder = programs.decoder()
    whole = decoder.generate(IDS[:1, :9], 12, **NO_END)
    end = int(whole[0, 9 + 4])
    first = whole[0, 9:].tolist().index(end)
    assert torch.equal(decoder.generate(IDS[:1, :9], 12, eos_token_ids=[end]), whole[:, : 9 + first + 1])
    assert programs.manifest.eos_token_ids == [model.generation_config.eos_token_id]


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.ones(2, 4, dtype=torch.int64), ValueError, r"input_ids: got shape \(2, 4\); these programs take \[1, L"),
        (torch.ones(1, 0, dtype=torch.int64), ValueError, r"at least one token"),
        (torch.ones(1, 4), TypeError, "input_ids: got torch.float32"),
        (torch.tensor([[3, 300]]), ValueError, "ids from 3 to 300, but the model's embedding has 300 rows"),
        (torch.tensor([[-1, 3]]), ValueError, "ids from -1"),
        ([[1, 2]], TypeError, "input_ids: got list"),
    ],
)
def test_wrong_ids_are_refused(llama, ids, error, message):
    decoder = llama[1].decoder()
    with pytest.raises(error, match=message):
        decoder.prefill(ids)
    with pytest.raises(error, match=message):
        decoder.stream(ids, 4)


@pytest.mark.parametrize("new_tokens", [0, -1, True, 2.0])
def test_a_reply_has_at_least_one_token(llama, new_tokens):
    with pytest.raises(ValueError, match="max_new_tokens=.*integer of at least 1"):
        llama[1].decoder().stream(IDS[:1, :4], new_tokens)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: must be an integer, at least 1"),
        ({"max_cache_len": 3}, "max_cache_len=3: must be an integer, at least 4"),
        ({"max_cache_len": True}, "max_cache_len=True"),
        ({"max_prefill_len": 65}, "max_prefill_len=65: must be an integer, 4 to max_cache_len=64"),
        ({"max_prefill_len": 3}, "max_prefill_len=3"),
        ({"backend": "onnx"}, r"backend='onnx': must be one of \('export', 'aoti'\)"),
    ],
)
def test_sizes_that_are_not_possible_are_refused(llama, sizes, message):
    with pytest.raises(ValueError, match=message):
        export_decoder(llama[0], **({"batch_size": 1, "max_cache_len": SLOTS} | sizes))


def test_a_model_that_is_not_quantized_is_refused(make_tiny):
    with pytest.raises(ValueError, match="not calibrated"):
        export_decoder(make_tiny("llama"), 1, SLOTS)


def test_the_model_goes_on_as_before(llama):
    model, _ = llama
    fresh = tiny("llama")
    assert torch.equal(_eager(model, IDS[:1, :8], 6), _eager(fresh, IDS[:1, :8], 6))


def test_an_int8_head_and_the_smallest_cache():
    model = pq_ao.quantize_head_(tiny("llama"))
    decoder = export_decoder(model, 1, 4).decoder()
    cache = pq_ao.PrefixStaticCache(model, 1, 4)
    with torch.no_grad():
        expected = model(IDS[:1, :3], past_key_values=cache, logits_to_keep=1).logits[:, -1]
        assert torch.equal(decoder.prefill(IDS[:1, :3]), expected)
        assert torch.equal(decoder.decode(IDS[:1, 3]), model(IDS[:1, 3:4], past_key_values=cache).logits[:, -1])
