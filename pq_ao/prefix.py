"""The prefix that takes the place of outlier tokens: which tokens it is made of, and the check that it holds."""

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations, groupby, islice
from statistics import fmean

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pq_ao.outliers import OUTLIER_THRESHOLD, OutlierStatistics, outlier_statistics, ratios_and_loss, token_ratios

# a lone candidate seen in fewer than this share of the sequences is an accident
_MIN_LONE_FREQUENCY = 0.1

# frequent tokens tried beside BOS
_ORDINARY_CANDIDATES = 3

# prefixes of one length whose text is compared, and on how much of it
_COMPARED, _COMPARED_WINDOWS, _COMPARED_LENGTH = 3, 8, 1024

_CHECK_SEQUENCES, _CHECK_LENGTH = 2, 256

_CONVERSATION = (
    {"role": "user", "content": "What is the capital of France, and why is it known around the world?"},
    {
        "role": "assistant",
        "content": "The capital of France is Paris. It is known for its art, its food and its river.",
    },
    {"role": "user", "content": "Which places should I see there in two days? Please make a short list."},
    {"role": "assistant", "content": "On the first day, see the Louvre and Notre-Dame. On the second, Montmartre."},
    {"role": "user", "content": "Thank you. How do I get from one to the other without a car?"},
)


class PrefixWarning(UserWarning):
    """Outlier tokens are left although a prefix is in place."""


@dataclass(frozen=True)
class PrefixReport:
    """The prefix, how it came about, and how well it holds.

    Attributes:
        prefix_ids: the prefix in use; empty where the scheme has none.
        rule_ids: what the rule alone gives, more than is needed perhaps; None where the user chose the prefix.
        statistics: see `OutlierStatistics`; None where the user chose the prefix.
        ratios_before, ratios_after: largest token ratio at a down_proj input, by kind of input, without and with
            the prefix.
        threshold: what `ratios_after` should stay below.
    """

    prefix_ids: tuple[int, ...]
    rule_ids: tuple[int, ...] | None = None
    statistics: OutlierStatistics | None = None
    ratios_before: dict[str, float] = field(default_factory=dict)
    ratios_after: dict[str, float] = field(default_factory=dict)
    threshold: float = OUTLIER_THRESHOLD

    def to_dict(self) -> dict:
        """Plain dictionary for JSON."""
        return asdict(self)


def prefix_by_rule(statistics: OutlierStatistics, bos_id: int) -> tuple[int, ...]:
    """The most frequent outlier ids, as many as there are outlier tokens a sequence, then BOS."""
    number = math.ceil(max(statistics.counts))
    distinct = statistics.frequencies
    if len(distinct) == 1 and distinct[0][1] < _MIN_LONE_FREQUENCY * statistics.sequences:
        distinct = ()
    return (*(token for token, _ in distinct[:number]), bos_id)


def bos_role(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that plays BOS: bos, else eos, else pad.

    Raises:
        ValueError: the tokenizer has none of them.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        if token is not None:
            return token
    raise ValueError("tokenizer: has no bos, eos or pad token; choose the prefix yourself: prefix_ids=(id, ...).")


def _check_inputs(tokenizer: PreTrainedTokenizerBase, windows: Tensor, bos_id: int) -> dict[str, list[Tensor]]:
    texts = [ids.cpu()[:_CHECK_LENGTH] for ids in windows[:_CHECK_SEQUENCES]]
    bos = torch.tensor([bos_id])
    inputs = {"plain text": texts}
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(list(_CONVERSATION), tokenize=False, add_generation_prompt=True)
        inputs["chat"] = [torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)]
    inputs["BOS + text"] = [torch.cat((bos, ids)) for ids in texts]
    inputs["BOS BOS text"] = [torch.cat((bos, bos, ids)) for ids in texts]
    return inputs


def worst_ratios(
    model: PreTrainedModel, inputs: dict[str, list[Tensor]], prefix_ids: Sequence[int] = ()
) -> dict[str, float]:
    """Largest token ratio for each kind of input, behind the given prefix."""
    return {
        kind: max(float(token_ratios(model, ids, prefix_ids).max()) for ids in batch) for kind, batch in inputs.items()
    }


@dataclass(frozen=True)
class _Trial:
    """A prefix, and what was found behind it.

    Attributes:
        prefix_ids: the prefix.
        ratios: largest token ratio by kind of check input.
        loss: of the calibration text behind it, in nats a token; None where that was not looked at.
    """

    prefix_ids: tuple[int, ...]
    ratios: dict[str, float]
    loss: float | None


@dataclass(frozen=True)
class _Probe:
    """A sequence that a prefix has to hold on.

    Attributes:
        ids: int64 [T].
        kind: of check input; None for a calibration window.
        compared: first tokens whose loss is looked at.
    """

    ids: Tensor
    kind: str | None = None
    compared: int = 0


def _probes(inputs: dict[str, list[Tensor]], windows: Tensor) -> list[_Probe]:
    """Hardest kinds first, calibration windows last."""
    probes = [_Probe(ids, kind) for kind in reversed(inputs) for ids in inputs[kind]]
    for index, ids in enumerate(windows):
        compared = min(_COMPARED_LENGTH, len(ids)) if index < _COMPARED_WINDOWS else 0
        probes.append(_Probe(ids, compared=compared))
    return probes


def _try(model: PreTrainedModel, probes: list[_Probe], prefix_ids: tuple[int, ...]) -> _Trial | None:
    """None if a token is an outlier; the probe that has it comes first from then on, as it may refuse others, too."""
    ratios, losses = {}, []
    for index, probe in enumerate(probes):
        found, loss = ratios_and_loss(model, probe.ids, prefix_ids, probe.compared)
        ratio = float(found.max())
        if ratio > OUTLIER_THRESHOLD:
            probes.insert(0, probes.pop(index))
            return None
        if probe.kind is not None:
            ratios[probe.kind] = max(ratios.get(probe.kind, 0.0), ratio)
        losses += [loss] if probe.compared else []
    return _Trial(prefix_ids, ratios, fmean(losses) if losses else None)


def _ordinary_tokens(tokenizer: PreTrainedTokenizerBase, windows: Tensor) -> list[int]:
    special = set(tokenizer.all_special_ids)
    common = Counter(windows.flatten().tolist()).most_common()
    return [token for token, _ in common if token not in special][:_ORDINARY_CANDIDATES]


def find_prefix(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Tensor,
    prefix_ids: Sequence[int] | None = None,
    progress: bool = False,
) -> PrefixReport:
    """Chooses the prefix among the rule's tokens and ordinary ones, and checks it on four kinds of input.

    Tokens of the rule that the others make superfluous are left out. A prefix that is only BOS makes a leading BOS of
    the text an outlier again; an ordinary token beside it cures that.

    Args:
        model: floating-point decoder, not rotated.
        tokenizer: its tokenizer; the chat template, if any, makes one kind of input.
        windows: int64 [N, T], tokenized without special tokens.
        prefix_ids: a prefix of the user's own; checked likewise, never changed.
        progress: show a progress bar.

    Raises:
        ValueError: ids out of the vocabulary, no id for BOS, or NaN and Inf activations.

    Warns:
        PrefixWarning: a kind of input still exceeds the threshold.
    """
    if prefix_ids is not None:
        _check_ids(prefix_ids, model.config.vocab_size)
    bos_id = bos_role(tokenizer) if prefix_ids is None or tokenizer.bos_token_id is not None else prefix_ids[-1]
    inputs = _check_inputs(tokenizer, windows, bos_id)
    before = worst_ratios(model, inputs)
    if prefix_ids is not None:
        rule, statistics, trial = None, None, _Trial(tuple(prefix_ids), worst_ratios(model, inputs, prefix_ids), None)
    else:
        statistics = outlier_statistics(model, windows, progress=progress)
        rule = prefix_by_rule(statistics, bos_id)
        trial = _choose(model, inputs, windows, rule, _ordinary_tokens(tokenizer, windows))
    after = {kind: trial.ratios[kind] for kind in inputs}
    failing = {kind: round(ratio, 1) for kind, ratio in after.items() if ratio > OUTLIER_THRESHOLD}
    if failing:
        warnings.warn(
            f"prefix {trial.prefix_ids}: outlier tokens are left, token ratio by kind of input {failing}, threshold "
            f"{OUTLIER_THRESHOLD:.0f}; static scales will suffer there. Try other prefix_ids, or mode='dynamic'.",
            PrefixWarning,
            stacklevel=2,
        )
    return PrefixReport(trial.prefix_ids, rule, statistics, before, after)


def candidates(rule: Sequence[int], ordinary: Sequence[int]) -> list[tuple[int, ...]]:
    """What the prefix could be, shortest first: some of the rule's tokens, BOS, and perhaps an ordinary one beside it.

    Of one length, those without an ordinary token come first, and then those with the more frequent tokens.
    """
    *tokens, bos_id = rule
    some = [kept for count in range(len(tokens) + 1) for kept in combinations(tokens, count)]
    found = [(*kept, bos_id) for kept in some]
    found += [(*kept, *pair) for kept in some for token in ordinary for pair in ((token, bos_id), (bos_id, token))]
    return sorted(dict.fromkeys(found), key=len)


def _choose(
    model: PreTrainedModel,
    inputs: dict[str, list[Tensor]],
    windows: Tensor,
    rule: tuple[int, ...],
    ordinary: list[int],
) -> _Trial:
    """The shortest prefix that holds and, of several, the one behind which the text is likeliest.

    A prefix is context that the text does not have: the shorter it is, the less it changes what the model says. It has
    to hold on all calibration windows, as the rule has seen all of them; where none does, on the other inputs at least;
    else it is the rule's.
    """
    found = candidates(rule, ordinary)
    probes = _probes(inputs, windows)
    for _, same_length in groupby(found, key=len):
        trials = (_try(model, probes, prefix_ids) for prefix_ids in same_length)
        holding = list(islice((trial for trial in trials if trial is not None), _COMPARED))
        if holding:
            return min(holding, key=lambda trial: trial.loss)
    probes = [probe for probe in probes if probe.kind is not None]
    trials = (_try(model, probes, prefix_ids) for prefix_ids in found if len(prefix_ids) >= len(rule))
    holding = next((trial for trial in trials if trial is not None), None)
    return holding or _Trial(rule, worst_ratios(model, inputs, rule), None)


def _check_ids(prefix_ids: Sequence[int], vocab_size: int) -> None:
    if len(prefix_ids) == 0:
        raise ValueError(
            "prefix_ids=(): a prefix has at least one token; for none use prefixquant_config(prefix=False)."
        )
    for token in prefix_ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise ValueError(f"prefix_ids: {token!r} is not a token id; ids are integers from 0 to {vocab_size - 1}.")
