"""Block-wise fine-tuning: a quantized block learns the output of the floating-point one.

The loss is the squared error of each token over the square of its own output: what comes next is a norm, and the few
tokens with outputs ten times as large would be most of a plain mean squared error.
"""

import math
import warnings
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pq_ao.rounding import RoundedWeight
from pq_ao.streams import Sequences, Stream
from pq_ao.trained_block import BlockFrame, BlockTensors
from pq_ao.training import TrainingHistory, train

_SMALLEST_POWER = 1e-20


class FinetuneWarning(UserWarning):
    """The fine-tuning of a block ended early."""


@dataclass(kw_only=True)
class FinetuneConfig:
    """How blocks are fine-tuned, an argument of `calibrate`.

    The defaults suit some 64 sequences of 2,048 tokens, where far higher rates than the paper's were best.

    Args:
        epochs: passes over the calibration sequences.
        batch_size: sequences a step.
        learning_rate: of scales, clip factors and biases: their relative change a step.
        weight_learning_rate: of weights, in quantization steps.
        validation_sequences: further sequences of the same text, which choose the state that is kept.
        end_to_end_epochs: further passes, over all blocks together (see `pq_ao.end_to_end`); 0 for none.
        end_to_end_rate: learning rate there, of scales, clip factors and biases.
        end_to_end_weight_rate: learning rate there of weights, in quantization steps; 0 leaves all codes as they are
            and takes little memory, else the device holds five float32 copies of the weights.
        end_to_end_prefix_rate: learning rate there of the prefix's keys and values, in parts of the spread of other
            tokens'; 0 leaves them as the prefix's tokens gave them.
        compile: compile the training step; None for yes on a GPU, no on a CPU.

    Raises:
        ValueError: a number that is out of range.
    """

    epochs: int = 10
    batch_size: int = 2
    learning_rate: float = 3e-3
    weight_learning_rate: float = 3e-2
    validation_sequences: int = 8
    end_to_end_epochs: int = 0
    end_to_end_rate: float = 1e-3
    end_to_end_weight_rate: float = 0.0
    end_to_end_prefix_rate: float = 0.0
    compile: bool | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "validation_sequences", "end_to_end_epochs"):
            value, least = getattr(self, name), 0 if name == "end_to_end_epochs" else 1
            if type(value) is not int or value < least:
                raise ValueError(f"FinetuneConfig: {name}={value!r}; a whole number of at least {least} is required.")
        for name in [field.name for field in fields(self) if field.name.endswith("rate")]:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"FinetuneConfig: {name}={value!r}; a finite number of at least 0 is required.")
        if self.compile not in (None, True, False):
            raise ValueError(f"FinetuneConfig: compile={self.compile!r}; True, False or None is required.")


class Pairs(NamedTuple):
    """Inputs of a block on the quantized path, and what it should put out: the output of the floating-point path."""

    inputs: Stream
    targets: Stream

    def batch(self, chosen: Tensor) -> tuple[Sequences, Tensor]:
        """Inputs and targets [n, T, d] of the chosen sequences, int64 [n] on the CPU."""
        return self.inputs.sequences(chosen), self.targets.sequences(chosen).hidden


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

    def _error(self, tensors: BlockTensors, batch: tuple[Sequences, Tensor]) -> Tensor:
        """Mean relative squared error of the tokens of a batch."""
        (hidden, angles), target = batch
        with torch.autocast("cuda", torch.bfloat16, enabled=self.on_gpu):
            output = self.frame.outputs(tensors, hidden, angles).float()
        power = target.square().mean(dim=-1).clamp_min(_SMALLEST_POWER)
        return ((output - target).square().mean(dim=-1) / power).mean()

    def train(
        self, block: nn.Module, index: int, rounded: dict[str, RoundedWeight], pairs: Pairs, validation: Pairs
    ) -> TrainingHistory:
        """Gives a rounded block in float32 better codes, scales, clip factors and biases.

        Args:
            block: number `index` of the decoder.
            rounded: of each of its linears, by name.
            pairs: to train on.
            validation: others, which choose the state that is kept.

        Warns:
            FinetuneWarning: an error was not finite; the block keeps its best state until then.
        """
        tensors, config = self.frame.tensors(block, rounded), self.config
        history, best = train(
            tensors.trained,
            lambda chosen: self._of_batch(tensors, pairs, chosen),
            lambda chosen: self._of_batch(tensors, validation, chosen),
            (len(pairs.inputs.hidden), len(validation.inputs.hidden)),
            epochs=config.epochs,
            batch_size=config.batch_size,
            rate=lambda name: config.weight_learning_rate if name.endswith(".weight") else config.learning_rate,
            seed=(self.seed * 1_000_003 + index) % 2**63,  # torch takes no larger one
            title=f"fine-tuning block {index}",
            progress=self.progress,
        )
        if history.stopped is not None:
            warnings.warn(
                f"block {index}: {history.stopped}; kept the state of epoch {history.kept}. Lower learning_rate or "
                "weight_learning_rate of FinetuneConfig.",
                FinetuneWarning,
                stacklevel=2,
            )
        self.frame.store(tensors._replace(trained=best), block)
        return history

    def _of_batch(self, tensors: BlockTensors, pairs: Pairs, chosen: Tensor) -> Tensor:
        return self.error(tensors, pairs.batch(chosen))
