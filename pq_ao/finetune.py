"""Block-wise fine-tuning (method section 5): a quantized block learns the output of the floating-point one.

The loss is the squared error of each token over the square of its own output: what comes next is a norm, and the few
tokens with outputs ten times as large (method section 3) would be most of a plain mean squared error.
"""

import math
import warnings
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pq_ao.rounding import RoundedWeight
from pq_ao.streams import Stream
from pq_ao.trained_block import BlockFrame, BlockTensors

_LOWEST_RATE = 0.1  # of the learning rate, where the cosine ends
_SMALLEST_POWER = 1e-20


class FinetuneWarning(UserWarning):
    """The fine-tuning of a block ended early."""


@dataclass(kw_only=True)
class FinetuneConfig:
    """How blocks are fine-tuned, an argument of `calibrate`.

    Args:
        epochs: passes over the calibration sequences.
        batch_size: sequences a step.
        learning_rate: of scales, clip factors and biases: their relative change a step.
        weight_learning_rate: of weights, in quantization steps.
        validation_sequences: further sequences of the same text, which choose the state that is kept.
        compile: compile the training step; None for yes on a GPU, no on a CPU.

    Raises:
        ValueError: a number that is out of range.
    """

    epochs: int = 20
    batch_size: int = 4
    learning_rate: float = 1e-3
    weight_learning_rate: float = 5e-3
    validation_sequences: int = 16
    compile: bool | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "validation_sequences"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"FinetuneConfig: {name}={value!r}; a whole number of at least 1 is required.")
        for name in ("learning_rate", "weight_learning_rate"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"FinetuneConfig: {name}={value!r}; a finite number of at least 0 is required.")
        if self.compile not in (None, True, False):
            raise ValueError(f"FinetuneConfig: compile={self.compile!r}; True, False or None is required.")


@dataclass
class BlockHistory:
    """How the fine-tuning of a block went. Errors are relative squared ones, the mean over tokens.

    Attributes:
        before: validation error of the block as it was rounded.
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


class Pairs(NamedTuple):
    """Inputs of a block on the quantized path, and what it should put out: the output of the floating-point path."""

    inputs: Stream
    targets: Stream

    def batch(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets [n, T, d] of the chosen sequences, int64 [n] on the CPU."""
        device = self.inputs.device
        return tuple(stream.hidden[chosen.to(stream.hidden.device)].to(device) for stream in self)


class Finetuner:
    """Fine-tunes the blocks of one decoder, one after the other.

    Args:
        block: one of them, with our modules in float32; it stays as it is.
        config: how to train.
        seed: draws the order of the sequences.
        progress: show a progress bar.
    """

    def __init__(self, block: nn.Module, config: FinetuneConfig, seed: int, progress: bool):
        self.config, self.seed, self.progress = config, seed, progress
        self.frame = BlockFrame(block)
        self.on_gpu = next(block.parameters()).device.type == "cuda"
        self.error = self._error
        if config.compile or (config.compile is None and self.on_gpu):
            self.error = torch.compile(self._error, dynamic=False)

    def _error(self, tensors: BlockTensors, batch: tuple[Tensor, Tensor], mask: Tensor, angles: tuple) -> Tensor:
        """Mean relative squared error of the tokens of a batch."""
        hidden, target = batch
        with torch.autocast("cuda", torch.bfloat16, enabled=self.on_gpu):
            output = self.frame.outputs(tensors, hidden, mask, angles).float()
        power = target.square().mean(dim=-1).clamp_min(_SMALLEST_POWER)
        return ((output - target).square().mean(dim=-1) / power).mean()

    def train(
        self, block: nn.Module, index: int, rounded: dict[str, RoundedWeight], pairs: Pairs, validation: Pairs
    ) -> BlockHistory:
        """Gives a rounded block in float32 better codes, scales, clip factors and biases.

        Args:
            block: number `index` of the decoder.
            rounded: of each of its linears, by name.
            pairs: to train on.
            validation: others, which choose the state that is kept.

        Warns:
            FinetuneWarning: an error was not finite; the block keeps its best state until then.
        """
        tensors = self.frame.tensors(block, rounded)
        history = BlockHistory(self._mean_error(tensors, validation))
        best, lowest = _copies(tensors.trained), history.before
        optimizer, schedule = self._optimizer(tensors.trained, len(pairs.inputs.hidden))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        epochs = range(1, self.config.epochs + 1)
        with tqdm(epochs, f"fine-tuning block {index}", unit="epoch", leave=False, disable=not self.progress) as bar:
            for epoch in bar:
                history.training.append(self._epoch(tensors, pairs, optimizer, schedule, generator))
                history.validation.append(self._mean_error(tensors, validation))
                if not math.isfinite(history.training[-1] + history.validation[-1]):
                    history.stopped = f"the error was not finite in epoch {epoch}"
                    break
                if history.validation[-1] < lowest:
                    lowest, history.kept, best = history.validation[-1], epoch, _copies(tensors.trained)
                bar.set_postfix(before=f"{history.before:.2e}", now=f"{history.validation[-1]:.2e}")
        if history.stopped is not None:
            warnings.warn(
                f"block {index}: {history.stopped}; kept the state of epoch {history.kept}. Lower learning_rate or "
                "weight_learning_rate of FinetuneConfig.",
                FinetuneWarning,
                stacklevel=2,
            )
        self.frame.store(tensors._replace(trained=best), block)
        return history

    def _optimizer(self, trained: dict[str, Tensor], sequences: int):
        config = self.config
        weights = [tensor for name, tensor in trained.items() if name.endswith(".weight")]
        others = [tensor for name, tensor in trained.items() if not name.endswith(".weight")]
        groups = [
            {"params": weights, "lr": config.weight_learning_rate},
            {"params": others, "lr": config.learning_rate},
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=self.on_gpu)
        steps = config.epochs * max(1, sequences // config.batch_size)

        def rate(step: int) -> float:
            return _LOWEST_RATE + (1 - _LOWEST_RATE) * (1 + math.cos(math.pi * min(1.0, step / steps))) / 2

        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    @torch.enable_grad()
    def _epoch(self, tensors: BlockTensors, pairs: Pairs, optimizer, schedule, generator) -> float:
        """One pass over the sequences in random order; a rest smaller than a batch waits for another epoch."""
        count, size = len(pairs.inputs.hidden), self.config.batch_size
        order = torch.randperm(count, generator=generator)
        total = torch.zeros((), device=pairs.inputs.device)
        batches = order[: max(size, count - count % size)].split(size)
        for chosen in batches:
            error = self._of_batch(tensors, pairs, chosen)
            error.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += error.detach()
        return float(total) / len(batches)

    def _of_batch(self, tensors: BlockTensors, pairs: Pairs, chosen: Tensor) -> Tensor:
        return self.error(tensors, pairs.batch(chosen), pairs.inputs.mask, pairs.inputs.position_embeddings)

    @torch.no_grad()
    def _mean_error(self, tensors: BlockTensors, pairs: Pairs) -> float:
        count = len(pairs.inputs.hidden)
        total = torch.zeros((), device=pairs.inputs.device)
        for chosen in torch.arange(count).split(self.config.batch_size):
            total += self._of_batch(tensors, pairs, chosen) * len(chosen)
        return float(total) / count


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
