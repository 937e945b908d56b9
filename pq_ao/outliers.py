"""Outlier tokens: how much larger than the others a token is at the inputs of `down_proj`.

Looked at on the model as it was loaded: before R4, and R1 does not change it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from pq_ao.families import family_of

OUTLIER_THRESHOLD = 64.0  # the paper's eta1


@dataclass(frozen=True)
class OutlierStatistics:
    """What the rule counts.

    Attributes:
        counts: mean number of outlier tokens a sequence, by layer, position 0 included.
        frequencies: (token id, times it was an outlier at i > 0), most frequent first; one count a layer.
        sequences: sequences looked at.
        max_ratio: largest R_i over all layers and tokens.
    """

    counts: tuple[float, ...]
    frequencies: tuple[tuple[int, int], ...]
    sequences: int
    max_ratio: float


def token_ratios(model: PreTrainedModel, ids: Tensor, prefix_ids: Sequence[int] = ()) -> Tensor:
    """R_i = M_i / median(M) of every token at every layer, M_i its largest |activation| at the down_proj input.

    Args:
        model: floating-point decoder, as it was loaded; of a rotated one, the input behind R4 is looked at.
        ids: int64 [T], one sequence.
        prefix_ids: real tokens put in front; their own ratios are dropped.

    Returns:
        float32 [layers, T] on the CPU.

    Raises:
        ValueError: an activation is NaN or Inf.
    """
    return ratios_and_loss(model, ids, prefix_ids, 0)[0]


@torch.inference_mode()
def ratios_and_loss(
    model: PreTrainedModel, ids: Tensor, prefix_ids: Sequence[int], compared: int
) -> tuple[Tensor, float]:
    """See `token_ratios`; and the mean cross-entropy of the first `compared` tokens but one, in nats: 0 for none."""
    family = family_of(model)
    rows: list[Tensor] = []
    first = len(prefix_ids)

    def observe(module, args) -> None:
        rows.append(args[0][0, first:].abs().amax(dim=-1).float())

    layers = model.get_submodule(family.layers)
    hooks = [layer.get_submodule(family.down).register_forward_pre_hook(observe) for layer in layers]
    full = torch.cat((torch.tensor(prefix_ids, dtype=torch.int64), ids.cpu())).unsqueeze(0).to(model.device)
    targets = full[0, first + 1 : first + compared]
    loss = 0.0
    try:
        if len(targets):
            kept = torch.arange(first, first + len(targets), device=model.device)
            logits = model(full, use_cache=False, logits_to_keep=kept).logits[0]
            loss = float(torch.nn.functional.cross_entropy(logits.float(), targets))
        else:
            model.base_model(full, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    maxima = torch.stack(rows).cpu()
    bad = ~torch.isfinite(maxima).all(dim=1)
    if bad.any():
        layer = int(bad.nonzero()[0])
        raise ValueError(
            f"model: the down_proj input of layer {layer} is NaN or Inf on the calibration data; check the weights, "
            "or load the model in a wider dtype."
        )
    return maxima / maxima.median(dim=1, keepdim=True).values.clamp_min(1e-30), loss


def outlier_statistics(model: PreTrainedModel, windows: Tensor, progress: bool = False) -> OutlierStatistics:
    """Counts outlier tokens over calibration windows, int64 [N, T], one sequence at a time."""
    counts, frequencies, largest = [], Counter(), 0.0
    for ids in tqdm(windows, desc="finding outlier tokens", unit="sequence", disable=not progress):
        ratios = token_ratios(model, ids)
        outlier = ratios > OUTLIER_THRESHOLD
        counts.append(outlier.sum(dim=1).double())
        largest = max(largest, float(ratios.max()))
        _, positions = outlier[:, 1:].nonzero(as_tuple=True)
        frequencies.update(ids.cpu()[1:][positions].tolist())
    mean = torch.stack(counts).mean(dim=0)
    # equal counts in order of id, so that the choice does not hang on the order of the windows
    ordered = sorted(frequencies.items(), key=lambda item: (-item[1], item[0]))
    return OutlierStatistics(tuple(mean.tolist()), tuple(ordered), len(windows), largest)
