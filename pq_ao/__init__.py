"""PrefixQuant for PyTorch: W4A4KV4 with static scales, as torchao tensor subclasses.

Public names resolve on first use, so that ``import pq_ao.ops`` needs neither torchao nor transformers. The import also
lets transformers load what `save` and `save_pretrained` wrote, now or as soon as transformers is imported.
"""

import importlib
from typing import Any

from pq_ao.registration import register_with_transformers

__version__ = "0.1.0"

_HOME = {
    "PrefixQuantConfig": "pq_ao.quantize",
    "prefixquant_config": "pq_ao.quantize",
    "calibrate": "pq_ao.calibration",
    "ContextWarning": "pq_ao.context",
    "FinetuneConfig": "pq_ao.finetune",
    "FinetuneWarning": "pq_ao.finetune",
    "PrefixStaticCache": "pq_ao.cache",
    "UnpackedCacheWarning": "pq_ao.attention",
    "PrefixWarning": "pq_ao.prefix",
    "find_prefix": "pq_ao.prefix",
    "rotate_": "pq_ao.rotation",
    "reference_path": "pq_ao.modules",
    "perplexity": "pq_ao.evaluation",
    "PrefixQuantLM": "pq_ao.harness",
    "evaluate_tasks": "pq_ao.harness",
    "local_tasks": "pq_ao.tasks.local_task",
    "explain": "pq_ao.explanation",
    "memory": "pq_ao.explanation",
    "live_bytes": "pq_ao.explanation",
    "MemoryReport": "pq_ao.explanation",
    "GenerationEngine": "pq_ao.generation",
    "recommended_compile_options": "pq_ao.static_step",
    "random_quantized_decoder": "pq_ao.random_decoder",
    "quantize_head_": "pq_ao.head",
    "save": "pq_ao.checkpoint.saving",
    "push_to_hub": "pq_ao.checkpoint.saving",
    "export_decoder": "pq_ao.export",
    "DecoderPrograms": "pq_ao.export",
    "load_exported": "pq_ao.exported",
    "ExportedDecoder": "pq_ao.exported",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'pq_ao' has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register_with_transformers()
