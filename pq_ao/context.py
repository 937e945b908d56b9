"""How far static keys were calibrated for, and the warning where more is asked of them."""

import warnings

from torch import nn


class ContextWarning(UserWarning):
    """Static scales of keys are used at positions that they were not calibrated for."""


def warn_beyond_context(model: nn.Module, name: str, tokens: int) -> None:
    """Warns if `tokens`, an argument called `name`, are more positions than a calibrated model's static keys fit.

    Warns:
        ContextWarning: says what to do.
    """
    record = getattr(model, "calibration_record", None)
    if record is None or record.config.mode != "static" or record.config.kv_bits == 16:
        return
    if 0 < record.context < tokens:
        warnings.warn(
            f"{name}={tokens}: static scales of this model's keys were calibrated for {record.context} positions; "
            f"perplexity rises beyond. Calibrate with context={tokens}, and enough windows to cover it, or use "
            'mode="dynamic".',
            ContextWarning,
            stacklevel=3,
        )
