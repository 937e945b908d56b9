"""The calibration record in a checkpoint: how the model came about, without what its tensors hold."""

from dataclasses import fields
from typing import Any

from pq_ao.calibration_record import CalibrationRecord
from pq_ao.config import PrefixQuantConfig
from pq_ao.finetune import FinetuneConfig
from pq_ao.prefix import PrefixReport

_PLACE = "config.json: quantization_config: calibration"

# of the record: name -> types allowed
_FACTS: dict[str, tuple[type, ...]] = {
    "data": (str,),
    "num_sequences": (int,),
    "sequence_length": (int,),
    "rounding": (str,),
    "search": (str,),
    "finetune": (dict, type(None)),
    "seed": (int,),
    "seconds": (int, float),
    "prefix_seconds": (int, float),
}
# facts that came after the first checkpoints of this format -> what their absence means
_LATER = {"balance": False, "context": 0}  # no balance; all windows at the first positions
_LATER_OF_FINETUNING = {
    "end_to_end_epochs": 0,
    "end_to_end_rate": FinetuneConfig.end_to_end_rate,
    "end_to_end_weight_rate": 0.0,
    "end_to_end_prefix_rate": 0.0,
}
_PREFIX: dict[str, tuple[type, ...]] = {
    "rule_ids": (list, type(None)),
    "ratios_before": (dict,),
    "ratios_after": (dict,),
    "threshold": (int, float),
}


def record_to_facts(record: CalibrationRecord) -> dict[str, Any]:
    """Plain JSON; scheme and prefix ids stand elsewhere in the checkpoint."""
    known = record.to_dict()
    prefix = {name: known["prefix"][name] for name in _PREFIX}
    if prefix["rule_ids"] is not None:
        prefix["rule_ids"] = list(prefix["rule_ids"])
    return {name: known[name] for name in (*_FACTS, *_LATER)} | {"prefix": prefix}


def record_from_facts(
    facts: dict[str, Any], scheme: PrefixQuantConfig, prefix_ids: list[int] | None
) -> CalibrationRecord:
    """The record, its lists by layer empty.

    Raises:
        ValueError: a field is missing, unknown or of another type; those of `_LATER` may be missing.
    """
    facts = _LATER | facts
    _check(facts, _FACTS | {name: (type(absent),) for name, absent in _LATER.items()} | {"prefix": (dict,)}, _PLACE)
    _check(facts["prefix"], _PREFIX, f"{_PLACE}: prefix")
    prefix = dict(facts["prefix"])
    if prefix["rule_ids"] is not None:
        prefix["rule_ids"] = tuple(prefix["rule_ids"])
    finetune = facts["finetune"]
    if finetune is not None:
        finetune = _LATER_OF_FINETUNING | finetune
        _check(finetune, {field.name: (object,) for field in fields(FinetuneConfig)}, f"{_PLACE}: finetune")
        try:
            finetune = FinetuneConfig(**finetune)
        except ValueError as error:
            raise ValueError(f"{_PLACE}: {error}") from error
    rest = {name: facts[name] for name in (*_FACTS, *_LATER) if name != "finetune"}
    report = PrefixReport(prefix_ids=tuple(prefix_ids or ()), **prefix)
    return CalibrationRecord(config=scheme, prefix=report, finetune=finetune, **rest)


def _check(facts: dict[str, Any], allowed: dict[str, tuple[type, ...]], place: str) -> None:
    if facts.keys() != allowed.keys():
        differing = sorted(map(str, facts.keys() ^ allowed.keys()))
        raise ValueError(f"{place}: missing or unknown fields: {', '.join(differing)}; restore config.json.")
    for name, types in allowed.items():
        value = facts[name]
        if not isinstance(value, types) or isinstance(value, bool) and not {bool, object} & set(types):
            raise ValueError(f"{place}: {name}={str(value)[:60]!r} is of the wrong type; restore config.json.")
