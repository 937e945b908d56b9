"""Computing on a device that has no room for the whole model: its blocks visit one at a time.

The model stays where it was loaded, in the memory of the host as a rule. What stands around the blocks (embedding,
rotary embedding, final norm and head) goes to the device for as long as it is computed there.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pq_ao.families import family_of


def computing_device(device: str | torch.device | None, model: PreTrainedModel) -> torch.device:
    """The device that `device` names, with its index; the model's own where it is None.

    Raises:
        ValueError: it is neither the CPU nor a CUDA GPU that is here.
    """
    if device is None:
        return model.device
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r}: is no device; pass 'cuda', 'cuda:1' or 'cpu'.") from error
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r}: calibration runs on 'cuda' or 'cpu'.")
    if found.type == "cuda":
        if (found.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device={device!r}: {torch.cuda.device_count()} CUDA GPUs are here; pass another device.")
        return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)
    return found


@contextmanager
def surroundings_on(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Has all but the blocks on `device`, and takes it (or what was put in its place) back home afterwards."""
    family, home = family_of(model), model.device
    names = (family.embedding, family.rotary, family.final_norm, family.head)
    try:
        for name in names:
            model.get_submodule(name).to(device)
        yield
    finally:
        for name in names:
            model.get_submodule(name).to(home)


@contextmanager
def visiting(block: nn.Module, device: torch.device) -> Iterator[None]:
    """Has a block on `device`, and takes it home afterwards with all that it has become."""
    home = next(block.parameters()).device
    try:
        block.to(device)
        yield
    finally:
        block.to(home)


@contextmanager
def visits_on_call(blocks: nn.ModuleList, device: torch.device) -> Iterator[None]:
    """Has each block on `device` while it computes. It must not change there, for nothing is copied back."""
    at_home: list[tuple[nn.Module, str, Tensor]] = []

    @torch.inference_mode(False)
    def fetch(block: nn.Module, args: tuple) -> None:
        send_home()
        for module in block.modules():
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if tensor.device != device:
                    at_home.append((module, name, tensor))
                    guest = tensor.detach().to(device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    setattr(module, name, nn.Parameter(guest, requires_grad=False) if is_parameter else guest)

    def send_home(*args) -> None:
        while at_home:
            setattr(*at_home.pop())

    hooks = [block.register_forward_pre_hook(fetch) for block in blocks]
    hooks += [block.register_forward_hook(send_home) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        send_home()
