"""Codes by their place in their set, for tests of kernels that may choose the next one."""

import torch
from torch import Tensor

from pq_ao.ops.quantize import OUTER_CODES


def place_of(codes: Tensor, code_set: str) -> Tensor:
    """int64, the place of each code among its set, so that next ones differ by 1; fails on a code that is not in it."""
    codes = codes.float().long()
    if code_set == "even":
        return codes
    even, *outer = OUTER_CODES[code_set]
    upper = (*range(even + 1), *outer)
    known = torch.tensor([*(-1 - code for code in reversed(upper)), *upper], device=codes.device)
    assert torch.isin(codes, known).all()
    return torch.searchsorted(known, codes.contiguous())
