"""What the compile test compiles for absent GPUs: each module lists its kernels with their types and constants."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Specimen:
    """One kernel as a launcher would specialise it.

    Attributes:
        name: tells specimens apart in messages.
        kernel: the `@triton.jit` function.
        types: of its arguments that are not constants, such as {"x_ptr": "*i8", "rows": "i32"}.
        constants: its constexpr arguments.
        options: num_warps, num_stages and other launch options.
        minimum_arch: compiled only for this compute capability (80, 90, 100) and newer.
        aligned: pointers and sizes that are multiples of 16.
        everywhere: compiled for every architecture though it is not the first of its kernel: it wants much of one.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    minimum_arch: int = 80
    aligned: tuple[str, ...] = ()
    everywhere: bool = False
