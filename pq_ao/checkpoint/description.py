"""The `quantization_config` of a quantized model."""

from dataclasses import asdict

from transformers import PreTrainedModel

from pq_ao.checkpoint.config import CheckpointConfig
from pq_ao.checkpoint.record import record_to_facts
from pq_ao.families import family_of
from pq_ao.head import Int8Head
from pq_ao.linears import CalibratedLinear
from pq_ao.modules import attention_modules
from pq_ao.tensors import PackedWeight


def describe(model: PreTrainedModel) -> CheckpointConfig:
    """Everything but the fingerprint of the tensors.

    Raises:
        ValueError: the model is not calibrated, or not quantized yet.
    """
    attention = attention_modules(model)[0]
    linears = [module for module in model.modules() if isinstance(module, CalibratedLinear)]
    if not all(isinstance(linear.weight, PackedWeight) for linear in linears):
        raise ValueError(
            "model: is calibrated but not quantized, and only quantized models are saved. Run this line first:\n"
            "    quantize_(model, config)"
        )
    record = getattr(model, "calibration_record", None)
    head = model.get_submodule(family_of(model).head)
    return CheckpointConfig(
        scheme=asdict(linears[0].config),
        dtype=str(attention.fixed_dtype).removeprefix("torch."),
        prefix_tokens=attention.prefix_k.shape[1],
        prefix_ids=None if record is None else list(record.prefix.prefix_ids),
        head_bits=8 if isinstance(head, Int8Head) else 16,
        calibration=None if record is None else record_to_facts(record),
        tensors_sha256=None,
    )
