"""Fine-tuning of all blocks together: what it gains, what it leaves alone, and how it stops."""

from functools import cache

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax
from torchao.quantization import quantize_

import pq_ao
from pq_ao import FinetuneConfig, calibration, prefixquant_config
from pq_ao.block_calibration import block_tensors
from pq_ao.finetune import FinetuneWarning

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"num_sequences": 32, "sequence_length": 96, "context": 96, "prefix_ids": (5, 0), "progress": False}
BLOCKWISE = {"epochs": 1, "validation_sequences": 8}
TOGETHER = BLOCKWISE | {"end_to_end_epochs": 4, "end_to_end_rate": 1e-3}
# with `search="none"`: scales of the largest values, and blocks that were not trained, so that there is much to gain
UNTRAINED = {"learning_rate": 0.0, "weight_learning_rate": 0.0}
GAINING = TOGETHER | UNTRAINED | {"end_to_end_rate": 5e-3}
WEIGHTS_TOO = GAINING | {"end_to_end_weight_rate": 0.003}
PREFIX_TOO = GAINING | {"end_to_end_prefix_rate": 0.005}
IDS = torch.randint(3, 300, (4, 32), generator=torch.Generator().manual_seed(0))


def _calibrate(model, tokenizer, english, mode="static", finetune=TOGETHER, **kwargs):
    config, finetune = prefixquant_config(mode=mode), FinetuneConfig(**finetune)
    return pq_ao.calibrate(model, tokenizer, config, data=english, finetune=finetune, **(SMALL | kwargs))


def _sharp(make_tiny, family="llama"):
    """Logits far from uniform, so that there is something to lose."""
    model = make_tiny(family)
    with torch.no_grad():
        model.lm_head.weight *= 20
    return model


@pytest.fixture(scope="module")
def untrained(make_tiny, tiny_tokenizer, english):
    """The static llama that training all blocks together begins with, not to be changed."""
    model = _sharp(make_tiny)
    _calibrate(model, tiny_tokenizer, english, finetune=BLOCKWISE | UNTRAINED, search="none")
    return model


@pytest.fixture(scope="module")
def gained(make_tiny, tiny_tokenizer, english):
    """`gained(family, mode)`: what GAINING makes of it, not to be changed, and the record; each is trained once."""

    @cache
    def calibrate(family, mode):
        model = _sharp(make_tiny, family)
        return model, _calibrate(model, tiny_tokenizer, english, mode, GAINING, search="none")

    return calibrate


def _tensors(model):
    return [block_tensors(layer) for layer in model.model.layers]


@pytest.mark.parametrize(
    ("family", "mode"), [("llama", "static"), ("llama", "dynamic"), ("qwen2", "static"), ("smollm3", "static")]
)
def test_integers_come_nearer_to_the_logits_of_floating_point(gained, family, mode):
    record = gained(family, mode)[1]
    history = record.end_to_end
    assert history["stopped"] is None and len(history["validation"]) == 4
    assert history["validation"][history["kept"] - 1] < 0.95 * history["before"]
    assert record.end_to_end_seconds > 0


@pytest.mark.parametrize("finetune", [GAINING, WEIGHTS_TOO, PREFIX_TOO], ids=["scales", "weights-too", "prefix-too"])
def test_the_loss_is_the_divergence_that_the_quantized_model_has(
    make_tiny, tiny_tokenizer, english, untrained, finetune
):
    """What training saw on its validation windows is what integers give on them."""
    model, windows = _sharp(make_tiny), []
    draw = calibration.calibration_windows

    def keep(*args):
        windows.append(draw(*args))
        return windows[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "calibration_windows", keep)
        history = _calibrate(model, tiny_tokenizer, english, finetune=finetune, search="none").end_to_end
    held_out = windows[0][SMALL["num_sequences"] :]
    with torch.no_grad():
        exact = log_softmax(untrained(held_out).logits.float(), dim=-1)
        quantize_(model, prefixquant_config())
        ours = log_softmax(model(held_out).logits.float(), dim=-1)
    found = float(kl_div(ours, exact, reduction="sum", log_target=True) / held_out.numel())
    assert history["kept"] > 0
    assert found == pytest.approx(history["validation"][history["kept"] - 1], rel=0.02)


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_codes_shifts_and_floating_point_stay(make_tiny, tiny_tokenizer, english, gained, mode):
    apart, together = _sharp(make_tiny), gained("llama", mode)[0]
    _calibrate(apart, tiny_tokenizer, english, mode, BLOCKWISE | UNTRAINED, search="none")
    for before, after in zip(_tensors(apart), _tensors(together), strict=True):
        changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
        quantizers = {"key_scale", "value_scale"} if mode == "static" else {"clip", "key_clip", "value_clip"}
        assert changed == {"scale", "bias"} | quantizers
    with torch.no_grad():
        assert torch.equal(apart(IDS).logits, together(IDS).logits)


def test_weights_with_a_rate_of_their_own_change_codes_too(make_tiny, tiny_tokenizer, english, untrained):
    together = _sharp(make_tiny)
    record = _calibrate(together, tiny_tokenizer, english, finetune=WEIGHTS_TOO, search="none")
    assert record.end_to_end["kept"] > 0 and record.finetune.end_to_end_weight_rate == 0.003
    for before, after in zip(_tensors(untrained), _tensors(together), strict=True):
        assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith(".codes"))


def _prefixes(model):
    attentions = [layer.self_attn for layer in model.model.layers]
    return [tensor for attention in attentions for tensor in (attention.prefix_k, attention.prefix_v)]


def test_the_prefix_learns_where_it_has_a_rate_of_its_own(make_tiny, tiny_tokenizer, english, untrained):
    learned = _sharp(make_tiny)
    record = _calibrate(learned, tiny_tokenizer, english, finetune=PREFIX_TOO, search="none")
    assert record.end_to_end["kept"] > 0 and record.finetune.end_to_end_prefix_rate == 0.005
    for before, after in zip(_prefixes(untrained), _prefixes(learned), strict=True):
        assert before.shape == after.shape and before.dtype == after.dtype and not torch.equal(before, after)


def test_a_rate_for_a_prefix_that_is_not_there_trains_the_rest_alone(make_tiny, tiny_tokenizer, english):
    records, config = [], prefixquant_config(prefix=False)
    for finetune in (GAINING, PREFIX_TOO):
        options = SMALL | {"prefix_ids": None, "data": english, "search": "none"}
        finetune = FinetuneConfig(**finetune)
        records.append(pq_ao.calibrate(_sharp(make_tiny), tiny_tokenizer, config, finetune=finetune, **options))
    assert records[0].end_to_end == records[1].end_to_end and records[0].end_to_end["kept"] > 0


def test_same_seed_same_bytes(make_tiny, tiny_tokenizer, english):
    models = [_sharp(make_tiny) for _ in range(2)]
    finetune = TOGETHER | {"end_to_end_epochs": 2}
    records = [_calibrate(model, tiny_tokenizer, english, finetune=finetune) for model in models]
    assert records[0].end_to_end == records[1].end_to_end
    first, second = map(_tensors, models)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a)


def test_a_rate_far_too_high_keeps_the_state_of_before(make_tiny, tiny_tokenizer, english):
    plain, wild = _sharp(make_tiny), _sharp(make_tiny)
    _calibrate(plain, tiny_tokenizer, english, finetune=BLOCKWISE)
    with pytest.warns(FinetuneWarning, match="all blocks together: the error was not finite in epoch 1"):
        record = _calibrate(wild, tiny_tokenizer, english, finetune=TOGETHER | {"end_to_end_rate": 1e4})
    assert record.end_to_end["kept"] == 0 and record.end_to_end["stopped"]
    first, second = map(_tensors, (plain, wild))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a)


def test_no_epochs_is_no_training(untrained):
    record = untrained.calibration_record
    assert record.end_to_end is None and record.end_to_end_seconds == 0
