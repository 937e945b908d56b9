"""Checks of the ids and masks that users give to `GenerationEngine` and `ExportedDecoder`. Needs torch alone.

Shape suffixes: B batch, L tokens.
"""

import torch
from torch import Tensor


def check_ids(ids: Tensor, batch_size: int, rows: int, taker: str, remedy: str) -> None:
    """Raises unless ids are integers [batch_size, L], L at least 1, from 0 to rows - 1.

    Args:
        rows: of the model's embedding.
        taker: who takes them, with its verb, for messages.
        remedy: for another batch.

    Raises:
        TypeError, ValueError: with what is wrong.
    """
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"input_ids: got {getattr(ids, 'dtype', type(ids).__name__)}; pass a tensor of integers.")
    if ids.ndim != 2 or ids.shape[0] != batch_size or ids.shape[1] == 0:
        raise ValueError(
            f"input_ids: got shape {tuple(ids.shape)}; {taker} [{batch_size}, L] with at least one token. For another "
            f"batch {remedy} with that batch_size."
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= rows:  # on a GPU this would end the process
        raise ValueError(f"input_ids: has ids from {low} to {high}, but the model's embedding has {rows} rows.")


def left_padding(mask: Tensor, ids: Tensor) -> Tensor:
    """The mask [B, L] as bool.

    Raises:
        ValueError: another shape than that of the ids, or zeros elsewhere than on the left.
    """
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask: got shape {tuple(mask.shape)}; it must be that of input_ids, {tuple(ids.shape)}."
        )
    mask = mask.bool()
    if not mask[:, -1].all() or (mask[:, :-1] & ~mask[:, 1:]).any():
        raise ValueError("attention_mask: zeros may stand on the left only; pass padding_side='left'.")
    return mask
