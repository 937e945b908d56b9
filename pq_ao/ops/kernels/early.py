"""Launching a kernel before the one in front of it has ended (programmatic dependent launch).

A decode step is hundreds of kernels of a few microseconds; starting each only when the last one is through costs one
or two more. A kernel launched early waits inside, before it touches what others write or read, its outputs and the
counters included. What is constant it asks for before: weights into registers, scales and shifts at least into L2.
(Asking L2 for weights, whether the linear's own or those of the next one, made decode slower on an H200.)
"""

import torch
import triton
import triton.language as tl

from pq_ao.ops.kernels.interpret import INTERPRETED


def launches_early(device: torch.device) -> bool:
    """Whether kernels on `device` are launched early."""
    if INTERPRETED.value or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(early: bool) -> dict[str, bool]:
    """What the launch of such a kernel needs."""
    return {"launch_pdl": True} if early else {}


@triton.jit
def wait(EARLY: tl.constexpr):
    """Lets the kernel behind this one be launched, and waits for the one in front."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
