"""Two INT4 codes a byte: low nibble the first half of the last axis, high nibble the second, offset binary.

Half against half needs no interleaving when unpacked, and a nibble `code + 8` widens by a mask alone.
"""

import torch
from torch import Tensor

_OFFSET = 8  # nibble = code + 8, so the zero code is nibble 8


def pack_int4(codes: Tensor) -> Tensor:
    """Packs int8 codes in -8..7, shape [..., K], into uint8 [..., ceil(K / 2)]; odd K is padded with the zero code.

    Raises:
        TypeError: `codes` is not int8.
    """
    if codes.dtype != torch.int8:
        raise TypeError(f"pack_int4: codes have dtype {codes.dtype}; int8 codes in -8..7 are required.")
    half = (codes.shape[-1] + 1) // 2
    nibbles = (codes + _OFFSET).to(torch.uint8)
    if codes.shape[-1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1), value=_OFFSET)
    return nibbles[..., :half] | (nibbles[..., half:] << 4)


def unpack_int4(packed: Tensor, length: int) -> Tensor:
    """Inverse of `pack_int4`: uint8 [..., ceil(length / 2)] to int8 codes [..., length]."""
    low = (packed & 0x0F).to(torch.int8) - _OFFSET
    high = (packed >> 4).to(torch.int8) - _OFFSET
    codes = torch.cat((low, high), dim=-1)
    return codes[..., :length] if codes.shape[-1] != length else codes
