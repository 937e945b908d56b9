"""The model card of a saved model: what it is, how to load it, and what was measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from pq_ao import __version__
from pq_ao.checkpoint.config import CheckpointConfig
from pq_ao.checkpoint.description import describe

CARD_NAME = "README.md"

_FRONT = """---
library_name: transformers
tags:
- prefixquant
- pq_ao
- {scheme}
---
"""

_BODY = """
# {name}, quantized to {scheme}

Quantized with pq_ao {version}, after *PrefixQuant*, [arXiv 2410.05265](https://arxiv.org/abs/2410.05265).

**Import `pq_ao` first.** Without it transformers does not know this format, and stops with an error about shapes.

```python
import pq_ao
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder)  # this folder, or its name on the Hub
cache = pq_ao.PrefixStaticCache(model, batch_size=1, max_cache_len=4096)  # packed keys and values
```

| | |
|---|---|
{facts}
"""


def model_card(model: PreTrainedModel, results: Sequence[Mapping[str, Any]] | None = None) -> str:
    """Markdown for a quantized model.

    Args:
        model: quantized.
        results: rows of measurements; a column for each key.

    Raises:
        ValueError: the model is not quantized.
    """
    config = describe(model)
    scheme = f"w{config.scheme['weight_bits']}a{config.scheme['act_bits']}kv{config.scheme['kv_bits']}"
    name = model.config.name_or_path.rstrip("/").rsplit("/", 1)[-1] or model.config.model_type
    facts = "\n".join(f"| {what} | {value} |" for what, value in _facts(config, scheme))
    card = _FRONT.format(scheme=scheme) + _BODY.format(name=name, scheme=scheme, version=__version__, facts=facts)
    return card + (f"\n## Measured\n\n{_table(results)}\n" if results else "")


def _facts(config: CheckpointConfig, scheme: str) -> list[tuple[str, str]]:
    rotated = "Hadamard, R1 and R2 in the weights, R3 and R4 online" if config.scheme["rotation"] else "none"
    ids = "" if config.prefix_ids is None else f": ids {', '.join(map(str, config.prefix_ids))}"
    facts = [
        ("scheme", f"{scheme}, {config.scheme['mode']} scales"),
        (
            "prefix",
            f"{config.prefix_tokens} tokens{ids}, hidden: text starts at position 0"
            if config.prefix_tokens
            else "none",
        ),
        ("rotation", f"{rotated}; embedding and head are two tensors"),
        ("embedding, norms, prefix", config.dtype),
        ("head", "INT8 weights, one scale a row" if config.head_bits == 8 else config.dtype),
    ]
    if config.calibration is not None:
        known = config.calibration
        balanced = ", balanced" if known.get("balance") else ""
        tuned = "" if known["finetune"] is None else f", fine-tuned for {known['finetune']['epochs']} epochs"
        facts.append(
            (
                "calibration",
                f"{known['num_sequences']} x {known['sequence_length']} tokens of {known['data']}, "
                f"{known['search']} search, {known['rounding']} rounding{balanced}{tuned}, seed {known['seed']}",
            )
        )
    return facts


def _table(results: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in results for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row.get(column)) for column in columns] for row in results]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
