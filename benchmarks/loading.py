"""What loading a checkpoint costs, in a process of its own: `python -m benchmarks.loading FOLDER [DEVICE]` prints JSON.

It is loaded twice: once for time and memory, and once with every operation watched, for the sizes of all
floating-point tensors that it makes. Quantized weights in floating point would be among them.
"""

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

_STATUS = Path("/proc/self/status")
_MIB = 2**20


class FloatSizes(TorchDispatchMode):
    """Numbers of elements of all floating-point tensors with memory that operations gave."""

    def __init__(self):
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type != "meta":
                if tensor.is_floating_point():
                    self.sizes.add(tensor.numel())
        return out


def cost_of_loading(folder: Path, device: str = "cpu") -> dict[str, Any]:
    """What `measure` gives, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.loading", str(folder), device]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def measure(folder: Path, device: str) -> dict[str, Any]:
    """Loads a checkpoint twice.

    Returns:
        load_seconds: of the first time; Python's imports are not counted.
        peak_mib: by which the process grew at most, pages of the mapped file included; on a GPU, what was allocated
            there at most.
        model_mib: everything that the model holds in the end.
        quantized_bytes, bf16_bytes, ratio: what the folder holds of the decoder blocks, and their linears in bfloat16.
        float_copies: sizes of all floating-point tensors that loading made as large as the smallest quantized weight,
            embedding and head left out. Empty: no quantized weight was ever there in floating point.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    import pq_ao
    from pq_ao.checkpoint import record, skeleton  # noqa: F401  ahead of the clock
    from pq_ao.checkpoint.names import fused_linears
    from pq_ao.families import family_of

    with torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))  # imports its code
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.zeros(1, device=device)
    gc.collect()
    before, begun = _status_bytes("VmRSS"), time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    peak = torch.cuda.max_memory_allocated() if on_gpu else _status_bytes("VmHWM") - before

    family, layer = family_of(model), model.get_submodule(family_of(model).layers)[0]
    linears = fused_linears(family, model.config)
    smallest = min(min(fused.rows) * layer.get_submodule(fused.name).in_features for fused in linears)
    kept = {model.get_input_embeddings().weight.numel()}
    quantized, dense = _stored_bytes(folder, family.layers), pq_ao.memory(model).linear_bf16_bytes
    held = sum(pq_ao.live_bytes().values())
    del model, layer
    gc.collect()
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # all in this thread, which is watched
    with FloatSizes() as seen:
        AutoModelForCausalLM.from_pretrained(folder, device_map=device)
    return {
        "load_seconds": round(seconds, 2),
        "peak_mib": round(peak / _MIB, 1),
        "model_mib": round(held / _MIB, 1),
        "quantized_bytes": quantized,
        "bf16_bytes": dense,
        "ratio": round(quantized / dense, 4),
        "float_copies": sorted(size for size in seen.sizes - kept if size >= smallest),
    }


def _stored_bytes(folder: Path, layers: str) -> int:
    """Bytes of all tensors of the decoder blocks on disk."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys() if name.startswith(f"{layers}."))
    return total


def _status_bytes(key: str) -> int:
    """Of /proc, and 0 where there is none."""
    if not _STATUS.exists():
        return 0
    return 1024 * int(next(line for line in _STATUS.read_text().splitlines() if line.startswith(key)).split()[1])


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "cpu")))
