"""The loop of fine-tuning: AdamW with a cosine schedule over some leaves, the best validation state kept."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

_LOWEST_RATE = 0.1  # of the learning rate, where the cosine ends

# mean error of the chosen sequences, int64 [n] on the CPU
BatchError = Callable[[Tensor], Tensor]


@dataclass
class TrainingHistory:
    """How a training went.

    Attributes:
        before: validation error before the first step.
        training, validation: error in each epoch, and after it.
        kept: the epoch whose state was kept, from 1; 0 for that of before.
        stopped: why it ended early; None if it did not.
    """

    before: float
    training: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    kept: int = 0
    stopped: str | None = None

    def to_dict(self) -> dict:
        """Plain dictionary for JSON, None where an error was not finite."""
        courses = {
            name: [error if math.isfinite(error) else None for error in getattr(self, name)]
            for name in ("training", "validation")
        }
        return asdict(self) | courses


def train(
    leaves: dict[str, Tensor],
    error: BatchError,
    validation_error: BatchError,
    sequences: tuple[int, int],
    *,
    epochs: int,
    batch_size: int,
    rate: Callable[[str], float],
    seed: int,
    title: str,
    progress: bool,
) -> tuple[TrainingHistory, dict[str, Tensor]]:
    """Trains `leaves` in place.

    Args:
        leaves: by name.
        error, validation_error: of a batch; the mean over all sequences decides which state is kept.
        sequences: how many there are to train and to validate on.
        epochs: passes over the sequences, in random order; a rest smaller than a batch waits for another one.
        batch_size: sequences a step.
        rate: learning rate of the leaf of a name.
        seed: draws the orders.
        title: of the progress bar.
        progress: show it.

    Returns:
        how it went, and the best state; training ends with the first error that is not finite.
    """
    count, held_out = sequences
    whole = max(batch_size, count - count % batch_size)
    optimizer, schedule = _cosine_adamw(leaves, rate, epochs * math.ceil(min(count, whole) / batch_size))
    generator = torch.Generator().manual_seed(seed)

    def run_epoch() -> float:
        batches = torch.randperm(count, generator=generator)[:whole].split(batch_size)
        total = 0.0
        with torch.enable_grad():
            for chosen in batches:
                loss = error(chosen)
                loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                total = total + loss.detach()
        return float(total) / len(batches)

    @torch.no_grad()
    def validate() -> float:
        batches = torch.arange(held_out).split(batch_size)
        return float(sum(validation_error(chosen) * len(chosen) for chosen in batches)) / held_out

    history = TrainingHistory(validate())
    best, lowest = _copies(leaves), history.before
    with tqdm(range(1, epochs + 1), title, unit="epoch", leave=False, disable=not progress) as bar:
        for epoch in bar:
            history.training.append(run_epoch())
            history.validation.append(validate())
            if not math.isfinite(history.training[-1] + history.validation[-1]):
                history.stopped = f"the error was not finite in epoch {epoch}"
                break
            if history.validation[-1] < lowest:
                lowest, history.kept, best = history.validation[-1], epoch, _copies(leaves)
            bar.set_postfix(before=f"{history.before:.2e}", now=f"{history.validation[-1]:.2e}")
    return history, best


def _cosine_adamw(leaves: dict[str, Tensor], rate: Callable[[str], float], steps: int):
    groups: dict[float, list[Tensor]] = {}
    for name, tensor in leaves.items():
        groups.setdefault(rate(name), []).append(tensor)
    on_gpu = next(iter(leaves.values())).device.type == "cuda"
    optimizer = torch.optim.AdamW(
        [{"params": group, "lr": lr} for lr, group in groups.items()], weight_decay=0.0, fused=on_gpu
    )

    def part(step: int) -> float:
        return _LOWEST_RATE + (1 - _LOWEST_RATE) * (1 + math.cos(math.pi * min(1.0, step / steps))) / 2

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, part)


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
