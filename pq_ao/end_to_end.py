"""Fine-tuning of all blocks together, behind block-wise fine-tuning: the decoder learns its own floating-point logits.

A block that learns its own output cannot know which of its errors the following blocks amplify. Here the loss is the
Kullback-Leibler divergence of the next token's distribution from that of the floating-point decoder with the same
prefix. Scales, clip factors and biases are trained, a few numbers a channel, so that memory holds little more than the
decoder itself; weights and the prefix's keys and values only where `FinetuneConfig` has a rate for them.
"""

import copy
import warnings

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pq_ao.block_calibration import cast_block
from pq_ao.families import DecoderFamily
from pq_ao.finetune import FinetuneConfig, FinetuneWarning, Pairs
from pq_ao.modules import on_path, path_switches
from pq_ao.quantizers import Path
from pq_ao.streams import Sequences, Stream
from pq_ao.trained_block import BlockFrame, BlockTensors, linears_of, prefix_of
from pq_ao.training import TrainingHistory, train

_PREFIX = ("prefix_k", "prefix_v")


class EndToEndFinetuner:
    """Fine-tunes a decoder whose blocks are all calibrated, and in floating point still.

    Args:
        model: on the device to train on.
        family: where its parts are.
        config: how to train.
        seed: draws the order of the sequences.
        progress: show a progress bar.
    """

    def __init__(
        self, model: PreTrainedModel, family: DecoderFamily, config: FinetuneConfig, seed: int, progress: bool
    ):
        self.config, self.seed, self.progress = config, seed, progress
        self.layers = model.get_submodule(family.layers)
        self.attention = family.attention
        self.final_norm, self.head = model.get_submodule(family.final_norm), model.get_submodule(family.head)
        self.dtype, self.on_gpu = model.dtype, model.device.type == "cuda"
        block = copy.deepcopy(self.layers[0])
        cast_block(block, torch.float32)
        self.frame = BlockFrame(block)
        self.block_outputs = self.frame.outputs
        if config.compile or (config.compile is None and self.on_gpu):
            self.block_outputs = torch.compile(self.frame.outputs, dynamic=False)

    def train(self, pairs: Pairs, validation: Pairs) -> TrainingHistory:
        """Gives all blocks better scales, clip factors and biases, and codes and prefix if their rates are above 0.

        Args:
            pairs: to train on: in front of the first block, and behind the last one in floating point.
            validation: others, which choose the state that is kept.

        Returns:
            how it went; its errors are divergences in nats a token.

        Warns:
            FinetuneWarning: a divergence was not finite; the blocks keep their best state until then.
        """
        blocks, config = self._tensors(pairs.inputs), self.config
        history, best = train(
            {f"{i}.{name}": tensor for i, block in enumerate(blocks) for name, tensor in block.trained.items()},
            lambda chosen: self._error(blocks, pairs, chosen),
            lambda chosen: self._error(blocks, validation, chosen),
            (len(pairs.inputs.hidden), len(validation.inputs.hidden)),
            epochs=config.end_to_end_epochs,
            batch_size=config.batch_size,
            rate=self._rate,
            seed=self.seed,
            title="fine-tuning all blocks together",
            progress=self.progress,
        )
        if history.stopped is not None:
            warnings.warn(
                f"all blocks together: {history.stopped}; kept the state of epoch {history.kept}. Lower "
                "end_to_end_rate, end_to_end_weight_rate or end_to_end_prefix_rate of FinetuneConfig.",
                FinetuneWarning,
                stacklevel=2,
            )
        for i, (layer, block) in enumerate(zip(self.layers, blocks, strict=True)):
            kept = {name: best[f"{i}.{name}"] for name in block.trained}
            self.frame.store(block._replace(trained=kept), layer)
        return history

    def _rate(self, leaf: str) -> float:
        if leaf.endswith(".weight"):
            return self.config.end_to_end_weight_rate
        return self.config.end_to_end_prefix_rate if leaf.endswith(_PREFIX) else self.config.end_to_end_rate

    @torch.no_grad()
    def _tensors(self, stream: Stream) -> list[BlockTensors]:
        """What is trained of each block.

        The unit of a bias is the spread of what its linear puts out, that of the prefix the spread of other tokens'
        keys or values in the same head.
        """
        hidden, angles = stream.sequences(slice(self.config.batch_size))
        hidden = hidden.to(self.dtype)
        blocks = []
        for layer in self.layers:
            units: dict[str, Tensor] = {}
            prefix_units: dict[str, Tensor] = {}
            hooks = [
                linear.register_forward_hook(_unit_into(units, name)) for name, linear in linears_of(layer).items()
            ]
            attention = layer.get_submodule(self.attention)
            if self.config.end_to_end_prefix_rate > 0 and attention.prefix_k.shape[1] > 0:
                into = _units_of_heads_into(prefix_units, prefix_of(layer))
                hooks.append(attention.kv.register_forward_pre_hook(into))
            with on_path(path_switches(layer), Path.REFERENCE):
                hidden = stream.run(layer, Sequences(hidden, angles))
            for hook in hooks:
                hook.remove()
            blocks.append(
                self.frame.tensors_of_codes(layer, units, prefix_units, self.config.end_to_end_weight_rate > 0)
            )
        return blocks

    def _error(self, blocks: list[BlockTensors], pairs: Pairs, chosen: Tensor) -> Tensor:
        """Mean divergence over the tokens of the chosen sequences."""
        (hidden, angles), exact = pairs.batch(chosen)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.on_gpu):
            for block in blocks:
                hidden = self._recomputed(self.block_outputs, block, hidden, angles)
            # a sequence at a time: logits of all would be most of the memory
            parts = [self._recomputed(self._divergence, *pair) for pair in zip(hidden, exact, strict=True)]
        return torch.stack(parts).mean()

    def _recomputed(self, function, *arguments):
        """Calls a function whose inner values the backward pass computes again."""
        return (
            checkpoint(function, *arguments, use_reentrant=False) if torch.is_grad_enabled() else function(*arguments)
        )

    def _divergence(self, hidden: Tensor, exact: Tensor) -> Tensor:
        """Mean over the tokens of one sequence, hidden states [T, d] behind the last block."""
        ours, theirs = (torch.log_softmax(self._logits(x), dim=-1) for x in (hidden, exact))
        return torch.nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True) / len(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.head(self.final_norm(hidden.to(self.dtype))).float()


def _unit_into(units: dict[str, Tensor], name: str):
    def hook(linear: nn.Module, inputs: tuple, output: Tensor) -> None:
        units[name] = output.float().flatten(0, -2).std(dim=0).clamp_min(torch.finfo(torch.float32).tiny)

    return hook


def _units_of_heads_into(units: dict[str, Tensor], names: list[str]):
    def hook(kv: nn.Module, inputs: tuple[Tensor, Tensor, torch.dtype]) -> None:
        for name, x_BGLD in zip(names, inputs[:2], strict=True):
            spread = x_BGLD.float().std(dim=(0, 2)).square().mean(dim=-1).sqrt()
            units[name] = spread[:, None, None]

    return hook
