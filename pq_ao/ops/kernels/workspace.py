"""What launchers need of a device: its size, its abilities, and counters where the last program to arrive reduces."""

import torch
from torch import Tensor

COUNTERS = 1 << 16

_counters: dict[torch.device, Tensor] = {}


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; an H200's for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def has_descriptors(device: torch.device) -> bool:
    """Whether tiles can come by descriptor (TMA): a GPU of compute capability 9.0 or newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def counters(device: torch.device) -> Tensor:
    """int32 [65536], zero between kernels: whoever arrives last at a counter puts it back to zero.

    One buffer a device, for kernels of one stream at a time. It must not be born inside a CUDA graph's memory pool, so
    `quantize_` and the cache ask for it beforehand.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device not in _counters:
        _counters[device] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    return _counters[device]
