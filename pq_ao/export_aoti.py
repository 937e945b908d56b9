"""Packages of AOTInductor for the CPU: programs of `aten` alone, compiled to machine code.

Packages hold code only. The tensors are in one file beside them, so that prefill and decode share weights and cache.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from pq_ao.export_manifest import FILES
from pq_ao.exported import CACHE_PREFIX
from pq_ao.hadamard import hadamard_transform
from pq_ao.ops.attention import attend_plainly
from pq_ao.ops.int_linear import accumulate_plainly
from pq_ao.ops.silu_hadamard import silu_hadamard_plainly

_CONFIG = {
    "emulate_precision_casts": True,  # the bits of eager
    "aot_inductor.package_constants_in_so": False,
    "always_keep_tensor_constants": True,  # those of a few elements would become literals
    "joint_graph_constant_folding": False,  # torch 2.13 folds a buffer of no dimension that the program changes
}


# taken apart, these round otherwise than eager code does
_WHOLE = (torch.ops.aten.silu.default, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default)


def _hadamard(x: Tensor, base: Tensor) -> Tensor:
    return hadamard_transform(x, base).contiguous()


def decompositions() -> dict[torch._ops.OperatorBase, Callable]:
    """What `run_decompositions` takes for a program without our ops, traced on the unfused way of attention."""
    ops = torch.ops.pq_ao
    table = torch.export.default_decompositions()
    for whole in _WHOLE:
        table.pop(whole, None)
    table.update(
        {
            ops.hadamard.default: _hadamard,
            ops.prefix_attention.default: attend_plainly,
            ops.int_accumulate.default: accumulate_plainly,
            ops.silu_hadamard.default: silu_hadamard_plainly,
        }
    )
    return table


def compile_packages(prefill: ExportedProgram, decode: ExportedProgram, folder: Path) -> None:
    """Writes the files of `FILES["aoti"]` for programs that share their state."""
    for name, program in (("prefill", prefill), ("decode", decode)):
        path = folder / f"{name}{FILES['aoti'][name]}"
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=_CONFIG)
    save_state(prefill, folder)


def save_state(prefill: ExportedProgram, folder: Path) -> None:
    """Writes the tensors of both packages: any of a program with the same graph, for packages hold none."""
    tensors = {**prefill.state_dict, **prefill.constants}
    state = {name: _saved(name, tensor) for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    torch.save(state, folder / f"state{FILES['aoti']['state']}")


def _saved(name: str, tensor: Tensor) -> Tensor:
    """A tensor as it goes into the file: of the cache the shape alone, as one zero that stands everywhere."""
    if name.startswith(CACHE_PREFIX):
        return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
    return tensor.detach().clone()  # not the whole storage that it may be a view of
