"""`quantization_config` in the `config.json` of a saved model: what its tensors are, checked field by field.

This module is imported while transformers is being imported, so it imports nothing that is large.
"""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from pq_ao.config import PrefixQuantConfig

QUANT_METHOD = "prefixquant"
FORMAT_VERSION = 1
HINT = "import pq_ao before from_pretrained"

DTYPES = ("bfloat16", "float16", "float32")

_PLACE = "config.json: quantization_config"


class CheckpointConfig(QuantizationConfigMixin):
    """Everything about a saved model that its tensors do not say. Plain JSON.

    Attributes:
        format_version: of names, shapes and meaning of the tensors.
        scheme: fields of the `PrefixQuantConfig`.
        dtype: of embedding, head, norms and prefix.
        prefix_tokens: length of the prefix.
        prefix_ids: its token ids; None for a model that was never calibrated (`random_quantized_decoder`).
        untied_head: always True: head and embedding are two tensors, whatever the original model had.
        head_bits: 8 after `quantize_head_`, else 16.
        calibration: the calibration record without what the tensors hold; None if there is none.
        tensors_sha256: fingerprint of all tensors; each weights file carries it too, and what is loaded must have it.
        hint: what to do for this model to load.
    """

    def __init__(self, **fields: Any):
        self.quant_method = QUANT_METHOD
        self.format_version = FORMAT_VERSION
        self.hint = HINT
        self.untied_head = True
        for name in _FIELDS:
            setattr(self, name, fields[name])

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs):
        """Reads and checks what `to_dict` gave.

        Raises:
            ValueError: a field is missing, unknown or has a value that is not allowed, or the format is newer.
        """
        _check(config_dict)
        config = cls(**{name: config_dict[name] for name in _FIELDS})
        return (config, kwargs) if return_unused_kwargs else config


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_ids(value: Any) -> bool:
    return value is None or isinstance(value, list) and all(map(_is_count, value))


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


# name -> (test, what is allowed)
_FIELDS = {
    "scheme": (lambda value: isinstance(value, dict), "the fields of a PrefixQuantConfig"),
    "dtype": (lambda value: value in DTYPES, f"one of {DTYPES}"),
    "prefix_tokens": (_is_count, "a whole number of at least 0"),
    "prefix_ids": (_is_ids, "a list of token ids, or null"),
    "head_bits": (lambda value: type(value) is int and value in (8, 16), "8 or 16"),
    "calibration": (lambda value: value is None or isinstance(value, dict), "an object, or null"),
    "tensors_sha256": (_is_sha256, "64 hexadecimal digits"),
}
# fields of schemes that came after the first checkpoints of this format -> what their absence means
_LATER_OF_SCHEMES = {"act_codes": "even"}
_FIXED = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "untied_head": True, "hint": HINT}


def _check(given: dict[str, Any]) -> None:
    version = given.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise ValueError(
            f"{_PLACE}: format_version={version} is newer than this pq_ao, which reads {FORMAT_VERSION}; update pq_ao."
        )
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(f"{_PLACE}: format_version={version!r} is unknown; it should be {FORMAT_VERSION}. Save again.")
    known = {*_FIELDS, *_FIXED}
    for problem, names in (("lacks", known - given.keys()), ("has unknown fields", given.keys() - known)):
        if names:
            raise ValueError(
                f"{_PLACE}: {problem} {', '.join(sorted(map(str, names)))}; restore config.json, or save the model "
                "again with this pq_ao."
            )
    tests = _FIELDS | {
        name: (lambda value, fixed=fixed: type(value) is type(fixed) and value == fixed, repr(fixed))
        for name, fixed in _FIXED.items()
        if name != "hint"
    }
    for name, (test, allowed) in tests.items():
        if not test(given[name]):
            raise ValueError(f"{_PLACE}: {name}={_shortened(given[name])}: must be {allowed}. Restore config.json.")
    check_scheme(given["scheme"])
    ids, tokens = given["prefix_ids"], given["prefix_tokens"]
    if ids is not None and len(ids) != tokens:
        raise ValueError(f"{_PLACE}: prefix_ids names {len(ids)} tokens and prefix_tokens says {tokens}.")
    if tokens and not given["scheme"]["prefix"]:
        raise ValueError(f"{_PLACE}: prefix_tokens={tokens} although the scheme has no prefix.")


def check_scheme(scheme: dict[str, Any]) -> "PrefixQuantConfig":
    """The `PrefixQuantConfig` of these fields.

    Raises:
        ValueError: fields are missing, unknown or not allowed.
    """
    from pq_ao.config import PrefixQuantConfig  # imports torchao

    given = _LATER_OF_SCHEMES | scheme
    names = {field.name for field in fields(PrefixQuantConfig)}
    if given.keys() != names:
        raise ValueError(f"{_PLACE}: scheme has the fields {sorted(map(str, scheme))} instead of {sorted(names)}.")
    try:
        return PrefixQuantConfig(**given)
    except ValueError as error:
        raise ValueError(f"{_PLACE}: scheme: {error}") from error


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
