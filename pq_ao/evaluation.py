"""Perplexity by the protocol that published numbers of quantized models use."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pq_ao.context import warn_beyond_context
from pq_ao.data import TextSource, check_count, count_windows, load_text, token_ids

__all__ = ["PerplexityResult", "perplexity"]

# Rows of logits that are float32 at one time: with a vocabulary of 128k they take 131 MB, where a window of 2048
# would take 1 GB.
LOSS_ROWS = 256


@dataclass(frozen=True)
class PerplexityResult:
    """What `perplexity` measured."""

    ppl: float
    """exp of the mean cross entropy (nats a token)."""
    windows: int
    """Windows evaluated."""
    sequence_length: int
    """Tokens a window."""
    tokens: int
    """Tokens predicted: `windows * (sequence_length - 1)`, since the first one of a window has no context."""
    corpus: str
    """Name of the corpus, a file's name without its folder, or "texts" or "ids" for what was given ready."""
    seconds: float
    """Wall time of the model's passes and the loss, without loading and tokenizing the text."""


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    corpus: TextSource | Tensor = "wikitext2",
    *,
    split: str = "test",
    sequence_length: int = 2048,
    windows: int | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> PerplexityResult:
    """Measures perplexity: one token stream, consecutive windows without overlap, mean cross entropy, exp.

    The text is tokenized once, without special tokens; no window gets a BOS token; the last partial window is dropped.
    Logits are taken in the model's dtype, the loss in float32. The model runs in evaluation mode on its own device and
    gets back its modes.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer; unused (may be None) if `corpus` holds ids.
        corpus: what `data.load_text` takes, or token ids, an integer tensor [T] or [1, T].
        split: of a named corpus.
        sequence_length: tokens a window, at least 2.
        windows: evaluate the first so many; None for all.
        batch_size: windows at a time.
        progress: show a bar with the perplexity so far.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, a text shorter than one window, fewer windows
            than asked for, windows longer than the model's context, ids that the model's embedding does not have.
        FloatingPointError: the loss of a window is not finite; the window is named.
        RuntimeError: a named corpus could not be downloaded.

    Example:
        >>> perplexity(model, tokenizer, "wikitext2", windows=20).ppl
    """
    sequence_length = check_count("sequence_length", sequence_length, minimum=2)
    batch_size = check_count("batch_size", batch_size)
    if windows is not None:
        windows = check_count("windows", windows)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and sequence_length > context:
        raise ValueError(f"sequence_length={sequence_length} exceeds the model's context of {context} tokens; lower it")
    warn_beyond_context(model, "sequence_length", sequence_length)

    ids = (
        _flat_ids(corpus)
        if isinstance(corpus, Tensor)
        else token_ids(tokenizer, load_text(corpus, split, argument="corpus"))
    )
    available = count_windows(ids, sequence_length)
    if windows is None:
        windows = available
    elif windows > available:
        raise ValueError(
            f"windows={windows} were asked for, but the corpus has {available} of sequence_length={sequence_length} "
            f"tokens; lower windows, or give None for all"
        )
    batches = ids[: windows * sequence_length].view(windows, sequence_length)
    _check_range(batches, model)

    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        start = time.perf_counter()
        mean_loss = _mean_loss(model, batches, batch_size, progress)
        seconds = time.perf_counter() - start
    finally:
        for module in training:
            module.training = True
    return PerplexityResult(
        ppl=_exp(mean_loss),
        windows=windows,
        sequence_length=sequence_length,
        tokens=windows * (sequence_length - 1),
        corpus=_corpus_name(corpus),
        seconds=seconds,
    )


@torch.inference_mode()
def _mean_loss(model: nn.Module, windows: Tensor, batch_size: int, progress: bool) -> float:
    """Mean cross entropy in nats a token over `windows` [N, T]; all have the same length, so no weights are needed."""
    from tqdm.auto import tqdm

    total, done = 0.0, 0
    with tqdm(total=len(windows), desc="perplexity", unit="window", disable=not progress) as bar:
        for batch in windows.split(batch_size):
            batch = batch.to(model.device)
            losses = _window_losses(model(batch, use_cache=False).logits, batch)
            finite = losses.isfinite()
            if not finite.all():
                window = done + int(finite.logical_not().nonzero()[0])
                raise FloatingPointError(
                    f"the loss of window {window} (of {len(windows)}, counted from 0) is "
                    f"{losses[window - done].item()}; the model's logits are not finite there"
                )
            total += losses.sum().item()
            done += len(batch)
            bar.update(len(batch))
            bar.set_postfix(ppl=f"{_exp(total / done):.4f}", refresh=False)
    return total / done


def _window_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross entropy of each window: logits [B, T, vocabulary], ids [B, T] -> float64 [B]."""
    batch, length = ids.shape
    losses = torch.zeros(batch, dtype=torch.float64)
    step = max(1, LOSS_ROWS // batch)
    for start in range(0, length - 1, step):
        stop = min(start + step, length - 1)
        loss = F.cross_entropy(
            logits[:, start:stop].float().flatten(0, 1), ids[:, start + 1 : stop + 1].flatten(), reduction="none"
        )
        # float64 on the CPU: not every device has it.
        losses += loss.view(batch, -1).sum(dim=1).cpu().double()
    return losses / (length - 1)


def _exp(loss: float) -> float:
    return torch.tensor(loss, dtype=torch.float64).exp().item()  # inf where math.exp would raise


def _flat_ids(ids: Tensor) -> Tensor:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"corpus is a tensor of {ids.dtype}; token ids must be integers")
    if ids.dim() != 1 and not (ids.dim() == 2 and ids.shape[0] == 1):
        raise ValueError(f"corpus is a tensor of shape {tuple(ids.shape)}; token ids must be [T] or [1, T]")
    return ids.reshape(-1).long()


def _check_range(ids: Tensor, model: nn.Module) -> None:
    """On a GPU an id without an embedding row ends the process, so it is found here."""
    rows = model.get_input_embeddings().weight.shape[0]
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= rows:
        raise ValueError(
            f"corpus has token ids from {low} to {high}, but the model's embedding has rows 0 to {rows - 1}; give the "
            f"tokenizer that belongs to this model"
        )


def _corpus_name(corpus: TextSource | Tensor) -> str:
    if isinstance(corpus, Tensor):
        return "ids"
    # The name alone: results travel, folders of one machine should not.
    return Path(corpus).name if isinstance(corpus, (str, os.PathLike)) else "texts"
