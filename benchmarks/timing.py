"""Clocks of the speed benchmarks: CUDA events and graphs on a GPU, the wall clock on a CPU.

Medians throughout. A CPU's numbers only show that a benchmark runs.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# inputs are rotated over more than this, so that none waits in L2 (60 MB on an H200) from its last use
ROTATED_BYTES = 160 << 20

_COPY_BYTES = 2 << 30

# of `launch_us`: launches in a graph unless they are long, milliseconds of a graph, milliseconds for all replays
_GRAPH_LAUNCHES, _GRAPH_MS, _REPLAYS_MS = 20, 4.0, 200.0


def is_cuda(device: str | torch.device) -> bool:
    """Whether `device` is an NVIDIA GPU."""
    return torch.device(device).type == "cuda"


def span_ms(run: Callable[[], object], device: str | torch.device) -> float:
    """Milliseconds that `run` takes on the device; what was queued before it is not counted."""
    if not is_cuda(device):
        begin = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begin)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def call_ms(
    run: Callable[[], object], device: str | torch.device, repeats: int, before: Callable[[], object] | None = None
) -> float:
    """Median milliseconds of one call; `before` runs ahead of each, outside the clock."""
    times = []
    for _ in range(repeats):
        if before is not None:
            before()
        times.append(span_ms(run, device))
    return statistics.median(times)


def step_ms(
    step: Callable[[], object],
    device: str | torch.device,
    steps: int,
    repeats: int,
    before: Callable[[], object],
    lead: int = 2,
) -> float:
    """Median milliseconds of one of `steps` calls in a row, as in a generation loop.

    Args:
        before: puts everything back to the beginning, outside the clock.
        lead: steps ahead of the clock. They keep the GPU busy until the CPU is ahead of it.
    """

    def prepare() -> None:
        before()
        for _ in range(lead):
            step()

    def several() -> None:
        for _ in range(steps):
            step()

    return call_ms(several, device, repeats, prepare) / steps


def launch_us(launches: Sequence[Callable[[], object]], device: str | torch.device) -> float:
    """Median microseconds of one launch, from replays of a CUDA graph that holds some twenty of them.

    Args:
        launches: the same work on different buffers, see `rotation`; short ones are repeated in the graph, so that
            the gap ahead of a replay does not count.
    """
    for launch in launches:  # compiles, and asks for workspaces, which must not be born inside the graph
        launch()

    def together() -> None:
        for launch in launches:
            launch()

    once_ms = span_ms(together, device)
    if not is_cuda(device):
        return 1e3 * once_ms / len(launches)
    rounds = max(1, min(-(-_GRAPH_LAUNCHES // len(launches)), math.ceil(_GRAPH_MS / once_ms)))
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            together()
    for _ in range(2):
        graph.replay()
    replays = max(5, min(20, int(_REPLAYS_MS / (rounds * once_ms))))
    milliseconds = call_ms(graph.replay, device, replays)
    return 1e3 * milliseconds / (rounds * len(launches))


def rotation(nbytes: int, device: str | torch.device, least: int = 2, most: int = 64) -> int:
    """How many buffers of `nbytes` to rotate over, so that L2 does not help."""
    if not is_cuda(device):
        return least
    return min(most, max(least, -(-ROTATED_BYTES // max(1, nbytes))))


def copy_bandwidth(device: str | torch.device) -> float:
    """Bytes per second of a large device-to-device copy, read and written bytes counted."""
    nbytes = _COPY_BYTES if is_cuda(device) else 1 << 20
    source = torch.empty(nbytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * nbytes / (1e-3 * call_ms(lambda: target.copy_(source), device, 9))


def fill_random_(tensor: Tensor) -> Tensor:
    """Random content for any dtype, never zeros: those can be faster than data."""
    if tensor.dtype == torch.uint8:
        return tensor.random_(0, 256)
    if tensor.dtype == torch.int8:
        return tensor.random_(-8, 8)
    return tensor.normal_()
