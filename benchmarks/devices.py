"""Perplexity of one quantized model on two devices, window by window.

The integers are the same, but floats are summed in other orders. So a code differs here and there, other differences
follow, and the perplexity of a window differs like that of two roundings. The ratio stands beside its standard error
over the windows.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

import pq_ao


def compare_devices(
    model: PreTrainedModel, ids: Tensor, devices: Sequence[str], windows: int, length: int, progress: bool = True
) -> dict[str, Any]:
    """What `benchmarks.round_trips` keeps of it; the model is left on the first device.

    Args:
        model: quantized.
        ids: [T], at least windows * length.
        devices: two.
        windows, length: how many windows of how many tokens.

    Raises:
        ValueError: the text is too short.
    """
    if len(ids) < windows * length:
        raise ValueError(f"the text has {len(ids)} tokens; {windows} windows of {length} are asked for, lower one.")
    parts = ids[: windows * length].view(windows, length)
    nats = []
    for device in devices:
        model.to(device)
        bar = tqdm(parts, desc=f"windows on {device}", disable=not progress)
        options = {"sequence_length": length, "progress": False}
        nats.append([math.log(pq_ao.perplexity(model, None, window, **options).ppl) for window in bar])
    model.to(devices[0])
    differences = [first - second for first, second in zip(*nats, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(windows) if windows > 1 else None
    first, second = (math.exp(statistics.fmean(one)) for one in nats)
    return {
        "what": "devices", "windows": windows, "length": length, "devices": list(devices), "ppl": [first, second],
        "ratio": first / second, "standard_error": error,
    }  # fmt: skip
