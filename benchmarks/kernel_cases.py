"""What a row of `benchmarks.kernels` is made of, and the rows of linears and head.

Shape suffixes: M rows (tokens), N outputs, K inputs.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig

from benchmarks.timing import fill_random_, is_cuda, launch_us, rotation
from pq_ao.ops import int_accumulate, int_linear, unpack_int4, unscaled_linear
from pq_ao.ops.int8_head import int8_head
from pq_ao.ops.linear_paths import LinearPath, capability_of, forced_path, linear_path

Launch = Callable[[], object]

# of scales and shifts drawn here; for speed any will do
SCALE = 0.1

# linears whose result one op reads, which can apply scales and biases itself, as `CalibratedLinear.unscaled` has it
_UNSCALED = ("qkv", "gate_up")


@dataclass(frozen=True)
class Sizes:
    """What the ops of a decoder work on."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, config: LlamaConfig) -> "Sizes":
        """Sizes of a model."""
        return cls(
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.vocab_size,
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(N, K) of a block's linears, as they run: q, k and v are one, gate and up are one."""
        attention = self.heads * self.head_dim
        return {
            "qkv": (attention + 2 * self.kv_heads * self.head_dim, self.hidden),
            "o": (self.hidden, attention),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


@dataclass
class Work:
    """What to time.

    Attributes:
        launches: of our op, on different buffers.
        baseline: microseconds of what bf16 does instead; None where it does nothing like it.
        exact: whether integers equal the reference; None where the result is floating point.
    """

    launches: list[Launch]
    baseline: Callable[[], float] | None = None
    exact: bool | None = None


@dataclass(frozen=True)
class Case:
    """One row: an op at one shape on one path.

    Attributes:
        nbytes: that must be moved.
        operations: of the tensor cores, on operands of `operation_bits`.
        build: device to `Work`.
        note: on how it runs, for the results.
    """

    op: str
    path: str
    shape: dict[str, int | str]
    nbytes: float
    build: Callable[[torch.device], Work]
    operations: float = 0.0
    operation_bits: int = 8
    note: str = ""

    @property
    def name(self) -> str:
        """For people."""
        return " ".join([self.op, self.path, *(f"{key}={value}" for key, value in self.shape.items())])


def random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random content."""
    return fill_random_(torch.empty(shape, dtype=dtype, device=device))


def bf16(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Normally distributed."""
    return random(shape, torch.bfloat16, device)


def compiled(function: Callable, device: torch.device) -> Callable:
    """`function` compiled where there is a GPU; on a CPU it would take longer than it is worth."""
    return torch.compile(function, fullgraph=True, dynamic=False) if is_cuda(device) else function


def _linear_us(rows: int, outs: int, inner: int, device: torch.device) -> float:
    """Microseconds of cuBLAS in bf16."""
    x = bf16((rows, inner), device)
    weights = [bf16((outs, inner), device) for _ in range(rotation(2 * outs * inner, device))]
    return launch_us([lambda w=w: F.linear(x, w) for w in weights], device)


def linears_case(path: str, tokens: int) -> Case:
    """The row of a layer's linears together; its numbers are sums."""
    return Case("linears", path, {"m": tokens}, 0.0, lambda device: Work([]))


def linear(sizes: Sizes, options: argparse.Namespace) -> Iterator[Case]:
    """INT4 linears with INT4 activations at each number of tokens, on the path chosen, or on all that can be forced."""

    def path_of(rows: int, outs: int, inner: int, path: str) -> LinearPath:
        capability = capability_of(torch.device(options.device))
        if path == "auto":
            return linear_path(rows, outs, inner, 4, 4, capability)
        with forced_path(LinearPath(path)):
            return linear_path(rows, outs, inner, 4, 4, capability)  # ValueError where it cannot

    paths = ["auto", *(path.value for path in LinearPath)] if options.all_paths else ["auto"]
    for rows in options.tokens:
        for path in paths:
            for name, (outs, inner) in sizes.linears.items():
                try:
                    chosen = path_of(rows, outs, inner, path)
                except ValueError:
                    continue
                yield Case(
                    "linear",
                    path,
                    {"layer": name, "m": rows, "n": outs, "k": inner},
                    outs * inner / 2 + rows * inner + 2 * rows * outs,
                    lambda device, shape=(rows, outs, inner), path=chosen, unscaled=name in _UNSCALED: _linear_work(
                        *shape, path, unscaled, device
                    ),
                    2.0 * rows * outs * inner,
                    note=chosen.value,
                )


def _linear_work(rows: int, outs: int, inner: int, path: LinearPath, unscaled: bool, device: torch.device) -> Work:
    codes = random((rows, inner), torch.int8, device)
    if path is LinearPath.E4M3:
        codes = codes.to(torch.float8_e4m3fn)  # as the op ahead of the linear makes them
    weights = [random((outs, inner // 2), torch.uint8, device) for _ in range(rotation(outs * inner // 2, device))]
    x_scale, w_scale = torch.full((1,), SCALE, device=device), torch.full((outs,), SCALE, device=device)
    bias = random((outs,), torch.float32, device)

    def run(weight: Tensor) -> Tensor:
        accumulators = unscaled_linear(codes, x_scale, weight, w_scale, torch.bfloat16) if unscaled else None
        if accumulators is not None:
            return accumulators[0]
        return int_linear(codes, x_scale, weight, w_scale, bias, torch.bfloat16, act_bits=4)

    def forced(weight: Tensor) -> Tensor:
        with forced_path(path):
            return step(weight)

    # where a matrix product of PyTorch runs, Inductor fuses what follows, as it does in a model
    step = run if path in (LinearPath.DP4A, LinearPath.TILE) else compiled(run, device)
    exact = _equals_reference(int_accumulate(codes, weights[0], path, act_bits=4), codes.to(torch.int8), weights[0])
    launches = [lambda w=w: forced(w) for w in weights]
    return Work(launches, lambda: _linear_us(rows, outs, inner, device), exact)


def _equals_reference(sums: Tensor, codes: Tensor, packed: Tensor, most: int = 64) -> bool:
    """Whether int32 sums [M, N] are right, on `most` of their rows at most."""
    places = torch.linspace(0, len(codes) - 1, min(most, len(codes)), device=codes.device).long()
    # float64 holds every sum exactly, in any order
    weight = unpack_int4(packed, codes.shape[1])
    expected = torch.cat([codes[places].double() @ part.double().t() for part in weight.split(4096)], dim=1)
    return torch.equal(sums[places].double(), expected)


def head(sizes: Sizes, options: argparse.Namespace) -> Iterator[Case]:
    """The language-model head with INT8 weights and activations of 16 bits."""
    outs, inner = sizes.vocabulary, sizes.hidden

    def build(rows: int, device: torch.device) -> Work:
        x, scale = bf16((rows, inner), device), torch.full((outs,), SCALE, device=device)
        weights = [random((outs, inner), torch.int8, device) for _ in range(rotation(outs * inner, device))]
        step = compiled(lambda weight: int8_head(x, weight, scale), device)
        return Work([lambda w=w: step(w) for w in weights], lambda: _linear_us(rows, outs, inner, device))

    for rows in [m for m in options.tokens if m <= 128] or [min(options.tokens)]:
        nbytes = outs * inner + 2 * rows * (outs + inner)
        yield Case("head", "int8", {"m": rows, "n": outs, "k": inner}, nbytes, lambda d, m=rows: build(m, d))
