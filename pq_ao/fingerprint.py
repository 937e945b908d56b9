"""sha256 of tensors: tells whether two runs began from the same weights and the same calibration windows."""

import hashlib
import json
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order given; neither device nor strides count.

    One tensor at a time is copied, and only one that is not contiguous on the CPU.

    Args:
        tensors: such as `model.named_parameters()`; plain tensors of any dense dtype and device.

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError: a tensor subclass or a sparse tensor.
        ValueError: a tensor without data (device "meta").

    Example::

        facts = {"weights": fingerprint(model.named_parameters()), "windows": fingerprint([("windows", windows)])}
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        # the header says how many bytes follow, so no two lists of tensors run into the same stream
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        plain = plain_cpu(name, tensor)
        flat = plain.as_strided((plain.numel(),), (1,))  # a reshape leaves one element the stride that it had
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def plain_cpu(name: str, tensor: Tensor) -> Tensor:
    """`tensor` detached, contiguous and on the CPU, so that its memory is its bytes; a copy only where need be.

    Raises:
        TypeError: a tensor subclass or a sparse tensor.
        ValueError: a tensor without data (device "meta").
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        kind = type(tensor).__name__ if not isinstance(tensor, Tensor) else f"{type(tensor).__name__}, {tensor.layout}"
        raise TypeError(f"{name}: got {kind}; give plain dense tensors, of a subclass the ones that it is made of.")
    if tensor.device.type == "meta":
        raise ValueError(f"{name}: has no data (device meta); load the model without offloading.")
    # a negated or conjugated view is a flag on the memory of another tensor
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
