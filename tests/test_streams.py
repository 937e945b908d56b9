"""Hidden states on their way through the blocks: positions, storage, and what static keys owe to them."""

import pytest
import torch

import pq_ao
from pq_ao import prefixquant_config
from pq_ao.families import family_of
from pq_ao.streams import Stream

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.randint(3, 300, (8, 32), generator=torch.Generator().manual_seed(0))


def _stream(model, context=0, ids=IDS, **kwargs):
    return Stream(model, family_of(model), ids, context=context, **kwargs)


@torch.no_grad()
def test_first_sequences_are_spread_as_evenly_as_all(make_tiny):
    first = _stream(make_tiny("llama"), context=512).first_positions
    assert first[0] == 0 and int(first.max()) + 32 <= 512
    for count in (2, 4, 8):
        gaps = torch.diff(torch.cat((first[:count].sort().values, torch.tensor([480]))))
        assert int(gaps.max()) < 2.7 * 480 / count  # the golden ratio's worst gap over the mean one


@torch.no_grad()
def test_without_a_context_all_begin_at_the_first_position(make_tiny):
    assert not _stream(make_tiny("llama")).first_positions.any()
    assert not _stream(make_tiny("llama"), context=16).first_positions.any()  # shorter than the sequences


@torch.no_grad()
def test_blocks_see_the_positions(make_tiny):
    """A stream's blocks give what the model itself gives at those positions."""
    model = make_tiny("llama").float()
    stream = _stream(model, context=400)
    for layer in model.model.layers:
        stream.advance(layer)
    position_ids = stream.first_positions[:, None] + torch.arange(32)
    seen = []
    hook = model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(IDS, position_ids=position_ids, use_cache=False)
    hook.remove()
    torch.testing.assert_close(stream.hidden, seen[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_sequences_by_slice_index_and_one_by_one(make_tiny):
    stream = _stream(make_tiny("llama"), context=400)
    stream.batch_size = 3
    chosen = torch.tensor([5, 1])
    some = stream.sequences(chosen)
    assert torch.equal(some.hidden, stream.hidden[chosen])
    ones = [one for batch in stream.batches() for one in batch.split()]
    assert len(ones) == 8
    for index, place in enumerate(chosen):
        assert torch.equal(ones[place].hidden[0], some.hidden[index])
        for mine, theirs in zip(ones[place].angles, some.angles, strict=True):
            assert torch.equal(mine[0], theirs[index])
    assert [len(batch.hidden) for batch in stream.batches(5)] == [3, 2]


@torch.no_grad()
def _key_means_apart(make_tiny):
    """Keys with one large mean in channels that turn slowly, as those of real models have."""
    model = make_tiny("llama", max_position_embeddings=4096).float()
    for layer in model.model.layers:
        attention = layer.self_attn
        dim = attention.head_dim
        attention.k_proj.weight.mul_(0.2)
        bias = torch.zeros(attention.k_proj.out_features)
        bias[dim // 2 - 1 :: dim] = 6.0
        attention.k_proj.bias = torch.nn.Parameter(bias)
    return model


@torch.no_grad()
def test_static_keys_stand_positions_that_the_windows_alone_would_not_reach(make_tiny, tiny_tokenizer, english):
    """Keys of the last positions, restored from their codes: with windows at the first positions they are clipped."""
    errors = {}
    for context in (64, 4096):
        model = _key_means_apart(make_tiny)
        pq_ao.calibrate(
            model, tiny_tokenizer, prefixquant_config(), data=english, num_sequences=16, sequence_length=64,
            context=context, balance=False, prefix_ids=(5, 0), progress=False,
        )  # fmt: skip
        attention = model.model.layers[0].self_attn
        hidden = torch.randn(1, 64, 96, generator=torch.Generator().manual_seed(0))
        angles = model.model.rotary_emb(hidden, torch.arange(4000, 4064)[None])
        _, key, _ = attention.project(hidden, angles)
        with pq_ao.reference_path(model):
            restored = attention.kv(key, key, torch.float32)[0]
        errors[context] = float((restored - key).square().mean() / key.square().mean())
    assert errors[4096] < 0.2 * errors[64]


def test_context_that_is_no_context(make_tiny, tiny_tokenizer, english):
    for context in (31, 64.0, True):
        with pytest.raises(ValueError, match=f"context={context!r}"):
            pq_ao.calibrate(
                make_tiny("llama"), tiny_tokenizer, data=english, num_sequences=2, sequence_length=32, context=context,
                progress=False,
            )  # fmt: skip


@pytest.mark.parametrize(("positions", "context"), [(4096, 128), (100, 100), (16, 32)])
def test_default_context_is_covered_four_times_and_no_longer_than_the_model_s(
    make_tiny, tiny_tokenizer, english, positions, context
):
    model = make_tiny("llama", max_position_embeddings=positions)
    record = pq_ao.calibrate(
        model, tiny_tokenizer, data=english, num_sequences=16, sequence_length=32, prefix_ids=(5, 0), progress=False
    )
    assert record.context == context
