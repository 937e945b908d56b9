"""The generation engine: the tokens of `model.generate`, however they are cut, padded, streamed or continued."""

import pytest
import torch
from torch._dynamo.utils import counters

import pq_ao
from tests.decoders import tiny_config
from tests.inductor import ROUNDS_AS_EAGER

pytestmark = pytest.mark.usefixtures("one_thread")

BUCKETS = (8, 16)
NO_END = {"eos_token_id": ()}


def _random(scheme="w4a4kv4", family="llama", **options):
    return pq_ao.random_quantized_decoder(tiny_config(family), scheme, device="cpu", dtype=torch.float32, **options)


@pytest.fixture(scope="module")
def model():
    return _random()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 300, (2, 45), generator=torch.Generator().manual_seed(1))


def _engine(model, batch_size=1, max_cache_len=128, **options):
    options = {"compile": False, "prefill_buckets": BUCKETS} | options
    return pq_ao.GenerationEngine(model, batch_size, max_cache_len, **options)


def _expected(model, ids, cache, **options):
    options = {"max_new_tokens": 12, "attention_mask": torch.ones_like(ids), "eos_token_id": None} | options
    return model.generate(ids, past_key_values=cache, do_sample=False, pad_token_id=2, **options)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize("scheme", ["w4a4kv4", "w8a8kv8", pq_ao.prefixquant_config(mode="dynamic")])
def test_greedy_tokens_are_those_of_generate(ids, family, scheme):
    model = _random(scheme, family)
    engine = _engine(model, 2)
    for length in (1, 8, 13, 45):  # below, at and above buckets
        prompt = ids[:, :length]
        expected = _expected(model, prompt, pq_ao.PrefixStaticCache(model, 2, 64))
        assert torch.equal(engine.generate(prompt, max_new_tokens=12, **NO_END), expected)


def test_a_model_that_is_not_quantized_runs_on_a_stock_cache(make_tiny, ids):
    model = make_tiny("llama")
    assert torch.equal(_engine(model, 2).generate(ids, max_new_tokens=12, **NO_END), _expected(model, ids, cache=None))


def test_logits_of_prefill_and_decode_are_those_of_the_model(model, ids):
    engine = _engine(model, 2)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(engine.prefill(ids[:, :21]), expected[:, 20], rtol=0, atol=1e-4)
    torch.testing.assert_close(engine.decode(ids[:, 21]), expected[:, 21], rtol=0, atol=1e-4)
    torch.testing.assert_close(engine.prefill(ids[:, 22:40]), expected[:, 39], rtol=0, atol=1e-4)  # appends
    assert int(engine.cache.get_seq_length()) == 40
    engine.reset()
    torch.testing.assert_close(engine.prefill(ids[:, :3]), expected[:, 2], rtol=0, atol=1e-4)


def test_left_padded_rows_equal_rows_alone(model, ids):
    alone = [
        _engine(model).generate(row[None, start:], max_new_tokens=12, **NO_END)
        for row, start in zip(ids, (0, 27), strict=True)
    ]
    mask = torch.ones_like(ids)
    mask[1, :27] = 0
    out = _engine(model, 2).generate(ids, mask, max_new_tokens=12, **NO_END)
    assert torch.equal(out[:1], alone[0]) and torch.equal(out[1:, 27:], alone[1])
    expected = _expected(model, ids, pq_ao.PrefixStaticCache(model, 2, 128), attention_mask=mask)
    assert torch.equal(out, expected)


class _Streamer:
    def __init__(self):
        self.received, self.ended = [], False

    def put(self, value):
        self.received.append(value)

    def end(self):
        self.ended = True


def test_stream_and_streamer_give_the_tokens_of_generate(model, ids):
    engine, streamer = _engine(model, 2), _Streamer()
    out = engine.generate(ids, max_new_tokens=9, streamer=streamer, **NO_END)
    assert torch.equal(torch.stack(list(engine.stream(ids, max_new_tokens=9, **NO_END)), dim=1), out[:, 45:])
    assert torch.equal(streamer.received[0], ids) and torch.equal(torch.stack(streamer.received[1:], 1), out[:, 45:])
    assert streamer.ended


def test_rows_end_at_their_end_token_and_the_batch_with_the_last(model, ids):
    free = _engine(model, 2).generate(ids, max_new_tokens=20, **NO_END)[:, 45:]
    ends = (int(free[0, 4]), int(free[1, 9]))
    out = _engine(model, 2).generate(ids, max_new_tokens=20, eos_token_id=ends, pad_token_id=2)[:, 45:]
    stops = [next(i for i, token in enumerate(row.tolist()) if token in ends) for row in free]
    assert stops[0] != stops[1] and out.shape[1] == max(stops) + 1
    for row, expected, stop in zip(out, free, stops, strict=True):
        assert torch.equal(row[: stop + 1], expected[: stop + 1]) and (row[stop + 1 :] == 2).all()


@pytest.mark.parametrize("batch", [1, 2])
def test_a_second_turn_equals_the_whole_conversation(model, ids, batch):
    free = _engine(model, 2).generate(ids, max_new_tokens=20, **NO_END)[:, 45:]
    ends = (int(free[0, 4]), int(free[1, 9]))
    question = ids.flip(1)[:, :11]
    engine = _engine(model, batch)
    first = engine.generate(ids[:batch], max_new_tokens=20, eos_token_id=ends)
    second = engine.generate(question[:batch], max_new_tokens=6, append=True, **NO_END)
    for row in range(batch):
        reply = first[row, 45:]
        stop = next(i for i, token in enumerate(reply.tolist()) if token in ends)
        whole = torch.cat((ids[row], reply[: stop + 1], question[row]))[None]
        expected = _engine(model).generate(whole, max_new_tokens=6, **NO_END)
        assert torch.equal(second[row, 11:], expected[0, whole.shape[1] :])


def test_leaving_a_stream_keeps_what_was_given_out(model, ids):
    engine = _engine(model)
    given = []
    for token in engine.stream(ids[:1], max_new_tokens=20, **NO_END):
        given.append(token)
        if len(given) == 5:
            break
    assert int(engine.cache.get_seq_length()) == 45 + 4  # the last one has not been fed
    more = engine.generate(ids[:1, :3], max_new_tokens=6, append=True, **NO_END)
    whole = torch.cat((ids[:1], torch.stack(given, dim=1), ids[:1, :3]), dim=1)
    assert torch.equal(more[:, 3:], _engine(model).generate(whole, max_new_tokens=6, **NO_END)[:, whole.shape[1] :])


def test_a_stream_whose_cache_was_taken_over_says_so(model, ids):
    engine = _engine(model)
    abandoned = engine.stream(ids[:1], max_new_tokens=20, **NO_END)
    next(abandoned)
    out = engine.generate(ids[:1, :9], max_new_tokens=4, **NO_END)
    with pytest.raises(RuntimeError, match="taken its cache over"):
        next(abandoned)
    assert int(engine.cache.get_seq_length()) == out.shape[1] - 1


def test_other_lengths_and_steps_compile_nothing_again(model, ids):
    torch._dynamo.reset()
    counters.clear()
    # what is compiled is Dynamo's doing, whatever the backend
    engine = _engine(model, 2, compile=True, compile_options={"backend": "eager"})
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    expected = [_engine(model, 2).generate(ids, m, max_new_tokens=5, **NO_END) for m in (None, mask)]
    for expect, m in zip(expected, (None, mask), strict=True):
        assert torch.equal(engine.generate(ids, m, max_new_tokens=5, **NO_END), expect)
    for m in (None, mask[:, 5:8]):
        engine.generate(ids[:, :3], m, max_new_tokens=2, **NO_END)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled == 6  # two buckets and decode, with and without a mask
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (1, 5, 8, 9, 16, 30, 45):
            engine.generate(ids[:, :length], max_new_tokens=20, **NO_END)
            engine.generate(ids[:, :length], mask.flip(0)[:, 45 - length :], max_new_tokens=20, **NO_END)
    assert counters["stats"]["unique_graphs"] == compiled


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=ROUNDS_AS_EAGER)])
def test_compiled_code_gives_the_tokens_of_eager_code(ids, dtype):
    """With the options that an engine takes by itself."""
    model = pq_ao.random_quantized_decoder(tiny_config(), "w4a4kv4", prefix_tokens=2, device="cpu", dtype=dtype)
    compiled, eager = (_engine(model, 2, compile=compiles, prefill_buckets=(16,)) for compiles in (True, False))
    assert torch.equal(compiled.prefill(ids[:, :20]), eager.prefill(ids[:, :20]))
    compiled.reset(), eager.reset()
    out = compiled.generate(ids[:, :20], max_new_tokens=12, **NO_END)
    assert torch.equal(out, eager.generate(ids[:, :20], max_new_tokens=12, **NO_END))


def test_a_prompt_of_many_tokens_is_tuned_and_decode_is_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    decode, prompt = (pq_ao.recommended_compile_options("cuda", tokens)["options"] for tokens in (128, 16 * 2048))
    assert decode == {"triton.enable_pdl": True} and pq_ao.recommended_compile_options("cuda")["options"] == decode
    assert prompt == decode | {"coordinate_descent_tuning": True}
    assert prompt.keys() <= torch._inductor.config.get_config_copy().keys()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_graphs_give_the_logits_of_eager_code(ids):
    model = pq_ao.random_quantized_decoder(tiny_config(), device="cuda")
    ids = ids.cuda()
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    for m in (None, mask):
        eager = _engine(model, 2)
        graphs = _engine(model, 2, compile=True, compile_options={"options": {"emulate_precision_casts": True}})
        for _ in range(2):  # recording, then replay
            for engine in (eager, graphs):
                engine.reset()
            torch.testing.assert_close(graphs.prefill(ids, m), eager.prefill(ids, m), rtol=0, atol=0.1)
            for token in ids.T[:6]:
                torch.testing.assert_close(graphs.decode(token), eager.decode(token), rtol=0, atol=0.1)
            assert int(graphs.cache.get_seq_length()) == 51
    first = graphs.generate(ids, mask, max_new_tokens=20, **NO_END)
    assert torch.equal(first, graphs.generate(ids, mask, max_new_tokens=20, **NO_END))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="options of long prompts are for GPUs")
def test_a_long_prompt_with_the_options_it_gets():
    """From 2,048 tokens on kernels are tuned as they compile: still the logits of eager code."""
    options = pq_ao.recommended_compile_options("cuda", 2 * 2048)["options"]
    assert options["coordinate_descent_tuning"]
    config = tiny_config()
    config.max_position_embeddings = 4096
    model = pq_ao.random_quantized_decoder(config, device="cuda")
    ids = torch.randint(3, 300, (2, 1500), generator=torch.Generator().manual_seed(0)).cuda()
    how = {"compile": True, "compile_options": {"options": options | {"emulate_precision_casts": True}}}
    eager, tuned = (_engine(model, 2, 2048, prefill_buckets=(2048,), **more) for more in ({}, how))
    torch.testing.assert_close(tuned.prefill(ids), eager.prefill(ids), rtol=0, atol=0.1)


def test_sampled_text_is_reproducible_and_varies(model, ids):
    def sample(seed):
        generator = torch.Generator().manual_seed(seed)
        options = {"do_sample": True, "top_k": 50, "top_p": 0.95, "generator": generator, "max_new_tokens": 12}
        return _engine(model, 2).generate(ids, **options, **NO_END)

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, ValueError, "at least one"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.int64)}, ValueError, "that batch_size"),
        ({"input_ids": torch.zeros(4, dtype=torch.int64)}, ValueError, r"got shape \(4,\)"),
        ({"input_ids": torch.zeros(2, 4)}, TypeError, "integers"),
        ({"input_ids": [[1, 2]]}, TypeError, "got list"),
        ({"input_ids": torch.full((2, 4), 300)}, ValueError, "300 rows"),
        ({"attention_mask": torch.ones(2, 3)}, ValueError, "that of input_ids"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0]] * 2)}, ValueError, "on the left"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1]] * 2)}, ValueError, "on the left"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens=0"),
        ({"max_new_tokens": 125}, ValueError, "max_cache_len=129"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"top_p": 1.5}, ValueError, "top_p"),
    ],
)
def test_wrong_arguments_are_named(model, change, error, message):
    arguments = {"input_ids": torch.zeros(2, 4, dtype=torch.int64), "max_new_tokens": 3} | change
    with pytest.raises(error, match=message):
        _engine(model, 2).generate(**arguments)


def test_room_is_used_to_the_last_token(model, ids):
    engine = _engine(model, 2, 57)
    out = engine.generate(ids, max_new_tokens=12, **NO_END)
    assert torch.equal(out, _engine(model, 2).generate(ids, max_new_tokens=12, **NO_END))
    engine.reset()
    engine.prefill(torch.cat((ids, ids[:, :12]), dim=1))
    with pytest.raises(ValueError, match="holds 57 tokens"):
        engine.decode(ids[:, 0])


def test_wrong_engines_are_refused(model, make_tiny):
    for options, message in (
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_cache_len": 1.5}, "max_cache_len=1.5"),
        ({"prefill_buckets": ()}, "prefill_buckets"),
        ({"prefill_buckets": (8, 1000)}, "1000"),
        ({"compile_options": {"mode": "reduce-overhead"}}, "reduce-overhead"),
    ):
        with pytest.raises(ValueError, match=message):
            _engine(model, **options)
    with pytest.raises(ValueError, match="sliding-window"):
        _engine(make_tiny("mistral", sliding_window=16))
