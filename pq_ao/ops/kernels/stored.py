"""How attention kernels look at stored keys and values: as words of several codes each."""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

LOG2E = math.log2(math.e)  # softmax by powers of two


def last_dim_dense(data: Tensor) -> Tensor:
    """`data`, copied only where its last dim has strides."""
    return data if data.stride(-1) == 1 else data.contiguous()


class Stored(NamedTuple):
    """bits of a number; planes, numbers a word holds; words of a head, and the tensor core's least multiple of them."""

    bits: int
    planes: int
    words: int
    words_padded: int

    def view(self, data: Tensor) -> Tensor:
        """`data` in these words."""
        return data.contiguous().view(torch.int32) if self.planes >= 4 else data.contiguous()


def stored_as(data: Tensor, head_dim: int) -> Stored:
    """The widest words that rows of `data` (uint8 packed INT4, int8 or floats, [..., D]) divide into."""
    width = data.shape[-1]
    if data.dtype == torch.uint8:
        bits, planes, words = (4, 8, width // 4) if width % 4 == 0 and head_dim % 2 == 0 else (4, 2, width)
    elif data.dtype == torch.int8:
        bits, planes, words = (8, 4, width // 4) if width % 4 == 0 else (8, 1, width)
    else:
        bits, planes, words = 16, 1, width
    return Stored(bits, planes, words, max(16, triton.next_power_of_2(words)))


def stored_as_bytes(codes: Tensor) -> Stored:
    """`codes` (uint8 packed INT4 or int8, [..., D]) byte by byte: planes are halves of a head, or all of it."""
    bits, planes = (4, 2) if codes.dtype == torch.uint8 else (8, 1)
    return Stored(bits, planes, codes.shape[-1], max(16, triton.next_power_of_2(codes.shape[-1])))
