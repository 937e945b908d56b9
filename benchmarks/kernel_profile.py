"""Which kernels one call runs on the GPU, how long each takes, and what they are for."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.timing import is_cuda

# what the profiler calls a kernel, but is a region that somebody named
_REGION_PREFIXES = ("## ", "Torch-Compiled Region", "ProfilerStep")

# a kernel's group by its name; Inductor's pointwise and reduction kernels are named after their neighbours too
_INDUCTOR = re.compile(r"^triton_(poi|red|per|for|unk)_")
_ATTENTION = re.compile(r"flash|fmha|attention|attend|sdpa|cudnn|decode_kernel|prefill|widen", re.IGNORECASE)
_LINEAR = re.compile(
    r"gemm|gemv|nvjet|cublas|cutlass|split_?k|xmma|_mm|mm_|linear|tile_kernel|matmul|unpack|int4|triton_tem",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class KernelTime:
    """What the GPU did under one name: how often and, in all, how long."""

    name: str
    count: int
    us: float


def kernel_times(
    run: Callable[[], object], device: str | torch.device, before: Callable[[], object] = lambda: None
) -> list[KernelTime]:
    """GPU kernels of one call, longest first; empty on a CPU. `before` runs ahead of it, outside."""
    if not is_cuda(device):
        return []
    before()
    run()
    before()
    torch.cuda.synchronize(device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize(device)
    counts: Counter[str] = Counter()
    times: dict[str, float] = defaultdict(float)
    for event in profile.events():
        if event.device_type != torch.autograd.DeviceType.CUDA or event.name.startswith(_REGION_PREFIXES):
            continue
        if getattr(event, "is_user_annotation", False):
            continue
        counts[event.name] += 1
        times[event.name] += event.self_device_time_total
    found = [KernelTime(name, count, times[name]) for name, count in counts.items()]
    return sorted(found, key=lambda kernel: -kernel.us)


def group_of(kernel: str) -> str:
    """What a kernel is for: "linears", "attention" or "rest"."""
    if _INDUCTOR.match(kernel):
        return "rest"
    if _ATTENTION.search(kernel):
        return "attention"
    return "linears" if _LINEAR.search(kernel) else "rest"


def kernels_per_layer(kernels: Sequence[KernelTime], layers: int) -> int | None:
    """GPU operations a layer: all over `layers`, rounded down; what stands outside of some thirty layers goes with it.

    Names do not tell: Inductor gives the norm of one layer another name than that of the next.
    """
    return sum(kernel.count for kernel in kernels) // layers or None


def split_ms(kernels: Sequence[KernelTime]) -> dict[str, float]:
    """GPU milliseconds of linears, attention and the rest; empty without kernels."""
    split = dict.fromkeys(("linears", "attention", "rest"), 0.0) if kernels else {}
    for kernel in kernels:
        split[group_of(kernel.name)] += 1e-3 * kernel.us
    return split


def print_profile(kernels: Sequence[KernelTime], most: int = 24) -> None:
    """The longest kernels with their groups."""
    total = sum(kernel.us for kernel in kernels)
    for kernel in kernels[:most]:
        name = re.sub(r"\s+", " ", kernel.name)
        print(f"    {group_of(name):9} {kernel.count:4} x {kernel.us:9.1f} us {kernel.us / total:5.1%}  {name[:90]}")
    print(f"    {len(kernels)} names, {sum(kernel.count for kernel in kernels)} kernels, {total:.1f} us", flush=True)
