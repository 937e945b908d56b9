"""What tests must know of Inductor."""

import pytest
import torch

ROUNDS_AS_EAGER = pytest.mark.skipif(
    torch.__version__ < (2, 13),
    reason="Inductor of older PyTorch (seen with 2.11) leaves roundings to bfloat16 out on a CPU, whatever it is told",
)
