"""One step of generation over tensors of fixed shapes: compiled, and on a GPU recorded once as a CUDA graph."""

from collections.abc import Callable

import torch
from torch import Tensor

# runs before recording: the first compiles and lets kernels load, the second finds everything in place
_WARM_UP_RUNS = 2

# of torch.compile, that record CUDA graphs themselves
MODES_WITH_GRAPHS = ("reduce-overhead", "max-autotune")

# Dynamo allows 8 variants of one function; every prefill bucket of every engine in the process is one
_VARIANTS = 256


# of a call, from which on its norms take long enough to measure what suits them
_MANY_TOKENS = 2048


def recommended_compile_options(device: torch.device | str, tokens: int = 1) -> dict[str, dict]:
    """Keyword arguments of `torch.compile` that suit a quantized model on `device`.

    From compute capability 9.0 on, kernels are launched before the one in front has ended (programmatic dependent
    launch), and wait inside: in decode, hundreds of kernels of a few microseconds each, that counts. For many tokens
    Inductor measures how to cut its kernels, the norms above all; that adds some seconds to compilation. On a CPU
    compiled code rounds where eager code does, so that both give the same tokens (with PyTorch 2.13; 2.11 does not).

    Args:
        device: of the model.
        tokens: of one call, all sequences together; 1 suits decode.

    Example::

        step = torch.compile(model, fullgraph=True, **pq_ao.recommended_compile_options(model.device))
    """
    device = torch.device(device)
    if device.type != "cuda":
        return {"options": {"emulate_precision_casts": True}}
    options = {"triton.enable_pdl": torch.cuda.get_device_capability(device) >= (9, 0)}
    if tokens >= _MANY_TOKENS:
        options["coordinate_descent_tuning"] = True
    return {"options": options}


class StaticStep:
    """`function(*inputs)` for inputs that keep their shapes.

    The graph is recorded by hand instead of by `mode="reduce-overhead"`: a replay then costs one launch, while a
    compiled call first checks its guards, hundreds for a decoder of dozens of layers, and that takes about as long as
    a quantized decoder takes for a token. What the function reads beside its inputs must keep its address.

    Args:
        function: tensors to one tensor. May change tensors in place if `rewind` undoes it.
        compile_options: keyword arguments of `torch.compile`; None runs the function as it is.
        rewind: called after each run that is not meant to count.
        pool: memory pool that the CUDA graphs of one engine share; None for a plain call, on a CPU.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        compile_options: dict | None,
        rewind: Callable[[], None],
        pool: tuple[int, int] | None,
    ):
        if compile_options is not None:
            function = torch.compile(function, fullgraph=True, dynamic=False, **compile_options)
        self.function, self.rewind, self.pool = function, rewind, pool
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, ...] = ()
        self.output: Tensor | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's result; on a GPU its memory is overwritten by the next call of this step."""
        if not self.inputs:  # buffers of its own: one address and one stride, whatever is given
            self.inputs = tuple(
                torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in inputs
            )
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        if self.pool is None:
            return self._run()
        if self.graph is None:
            self._record()
        self.graph.replay()
        return self.output

    def _run(self) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=_VARIANTS, accumulated_recompile_limit=_VARIANTS):
            return self.function(*self.inputs)

    def _record(self) -> None:
        with torch.cuda.device(self.inputs[0].device):
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP_RUNS):
                    self._run()
                    self.rewind()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # other threads may allocate meanwhile: only this one's calls are recorded and restricted
            with torch.cuda.graph(graph, pool=self.pool, stream=side, capture_error_mode="thread_local"):
                self.output = self._run()
        self.graph = graph
