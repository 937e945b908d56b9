"""PyTorch's floating-point types by Triton's names, as constants of a kernel."""

import torch
import triton.language as tl

TRITON_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
