"""`calibrate`: the pipeline that decides every scale and every weight code, block by block on the quantized path."""

import json
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pq_ao import __version__
from pq_ao.balance import balance_block
from pq_ao.block_calibration import block_tensors, calibrate_block, cast_block, restore_block, store_prefix
from pq_ao.block_sites import BlockSites
from pq_ao.calibration_record import CalibrationRecord
from pq_ao.checkpoint.quantizer import attach
from pq_ao.config import PrefixQuantConfig, prefixquant_config
from pq_ao.data import TextSource, calibration_windows, check_count
from pq_ao.end_to_end import EndToEndFinetuner
from pq_ao.families import family_of
from pq_ao.finetune import FinetuneConfig, Finetuner, Pairs
from pq_ao.fingerprint import fingerprint
from pq_ao.journal import CalibrationJournal
from pq_ao.linears import CalibratedLinear
from pq_ao.modules import on_path, path_switches
from pq_ao.offload import computing_device, surroundings_on, visiting, visits_on_call
from pq_ao.outliers import outlier_statistics
from pq_ao.prefix import PrefixReport, find_prefix
from pq_ao.quantizers import Path
from pq_ao.rotation import begin_rotation, check_weights
from pq_ao.rounding import ROUNDINGS
from pq_ao.scale_search import Found
from pq_ao.streams import STORAGES, Storage, Stream

SEARCHES = ("none", "tensor", "block")

# of a configuration: what names a model, or who wrote the file, changes nothing that is computed
_NAMES_OF_A_MODEL = ("_name_or_path", "architectures", "transformers_version")

# where the context is not given: a position under fewer windows would be hit or miss
_WINDOWS_OVER_A_POSITION = 4


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PrefixQuantConfig | None = None,
    *,
    data: TextSource = "embedded",
    num_sequences: int = 16,
    sequence_length: int = 2048,
    context: int | None = None,
    balance: bool = True,
    rounding: str = "nearest",
    search: str = "tensor",
    finetune: FinetuneConfig | None = None,
    prefix_ids: Sequence[int] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    storage: Storage = "device",
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> CalibrationRecord:
    """Rotates the model, finds its prefix, searches the scales and rounds the weights; in place.

    Afterwards the model still computes in (rotated) floating point, behind its prefix; `quantize_(model, config)`
    puts the integers in place. On any error before the rotation the model is untouched.

    Args:
        model: a floating-point decoder of a known family.
        tokenizer: its tokenizer.
        config: the scheme, `prefixquant_config()` where None.
        data: corpus: "embedded", "wikitext2", "pile", "c4", a text or jsonl file, or a list of strings
            (see `pq_ao.data.load_text`).
        num_sequences, sequence_length: calibration windows and their tokens; long ones, for keys are searched at the
            distances that they are seen at. Scales, shifts and codes are chosen on the first 131,072 tokens of them,
            fine-tuning sees all.
        context: positions that the windows are spread over, for static keys fit the positions that they were
            calibrated at; None for as many as windows cover four times over, at most the model's
            `max_position_embeddings`: 8,192 by default.
        balance: scale the inner channels of each block against each other first (`pq_ao.balance`); free at run time.
        rounding: "nearest", or "gptq": error-compensating, more accurate and slower.
        search: objective for static scales and clip factors of activations: "tensor" (the activation's own squared
            error), "block" (that of the block's output) or "none" (min-max).
        finetune: trains each block after its rounding (see `FinetuneConfig`); None for not.
        prefix_ids: a prefix of your own instead of the rule's.
        seed: draws the rotation, the windows and the order of training.
        device: what computes, the model's own device where None. Blocks of a model that lies elsewhere come there one
            at a time: a GPU needs room for one of them, embedding, head and activations, while the model is on the CPU.
        storage: where the hidden states of the sequences lie: "device", "host" or "disk" (a memory-mapped temporary
            file).
        resume: a folder that keeps every finished block; the same call goes on from there after an interruption.
        progress: show progress bars.

    Returns:
        The record, also kept as `model.calibration_record`.

    Raises:
        ValueError: unsupported model or argument, too little text, NaN or Inf in weights or activations, or a `resume`
            folder that is damaged or belongs to another run.
        TypeError: an argument of another type.
        RuntimeError: a named corpus could not be downloaded, or another process has the `resume` folder.
        OSError: hidden states or a finished block could not be written, such as on a full disk.

    Example::

        pq_ao.calibrate(model, tokenizer, prefixquant_config())
        quantize_(model, prefixquant_config())
    """
    started = time.perf_counter()
    config = config or prefixquant_config()
    num_sequences = check_count("num_sequences", num_sequences)
    sequence_length = check_count("sequence_length", sequence_length)
    seed = check_count("seed", seed, minimum=0)
    context = _context(model, context, num_sequences, sequence_length)
    _check_arguments(model, config, balance, rounding, search, finetune, prefix_ids, storage)
    device = computing_device(device, model)
    if device != model.device and finetune is not None and finetune.end_to_end_epochs:
        raise ValueError(
            f"device={str(device)!r}: end_to_end_epochs={finetune.end_to_end_epochs} trains all blocks together, and "
            f"the model is on {str(model.device)!r}; load it on the device, or leave end_to_end_epochs at 0."
        )
    check_weights(model)
    held_out = 0 if finetune is None else finetune.validation_sequences
    windows = calibration_windows(tokenizer, data, num_sequences + held_out, sequence_length, seed)
    train, validation = windows[:num_sequences], windows[num_sequences:]
    with surroundings_on(model, device), visits_on_call(model.get_submodule(family_of(model).layers), device):
        if config.prefix:
            prefix = find_prefix(model, tokenizer, train, prefix_ids, progress)
        else:
            prefix = PrefixReport((), statistics=outlier_statistics(model, train, progress=progress))
    prefix_seconds = time.perf_counter() - started
    # the name alone: checkpoints hold the record and travel, folders of one machine should not
    described = os.path.basename(data) if isinstance(data, (str, os.PathLike)) else type(data).__name__
    record = CalibrationRecord(
        config, prefix, described, num_sequences, sequence_length, context, balance, rounding, search, finetune, seed
    )
    record.prefix_seconds = prefix_seconds
    facts = None if resume is None else _facts(model, record, windows, device)
    with (
        nullcontext() if facts is None else CalibrationJournal(resume, facts) as journal,
        surroundings_on(model, device),
    ):
        pipeline = _Pipeline(model, record, train, validation, storage, progress)
        pipeline.run(journal)
    if finetune is not None and finetune.end_to_end_epochs:
        before = time.perf_counter()
        finetuner = EndToEndFinetuner(model, family_of(model), finetune, seed, progress)
        record.end_to_end = finetuner.train(*pipeline.through_all_blocks()).to_dict()
        record.end_to_end_seconds = time.perf_counter() - before
    record.seconds = time.perf_counter() - started
    model.calibration_record = record
    attach(model)
    return record


class _Pipeline:
    """The blocks of one model, from first to last.

    Args:
        model: still untouched.
        record: says what to do, and receives what was found.
        train, validation: int64 [N, T] windows; no validation without fine-tuning.
        storage: of the hidden states.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        record: CalibrationRecord,
        train: Tensor,
        validation: Tensor,
        storage: Storage,
        progress: bool,
    ):
        self.record, self.progress, self.dtype, self.device = record, progress, model.dtype, model.device
        self.family = family_of(model)
        self.rotator = begin_rotation(model, record.config, seed=record.seed, block_dtype=torch.float32)
        self.layers = model.get_submodule(self.family.layers)
        prefix = torch.tensor([record.prefix.prefix_ids], dtype=torch.int64)
        self.head = Stream(model, self.family, prefix, first_position=-prefix.shape[1])
        self.train, self.held_out = train, validation
        self.begin = partial(Stream, model, self.family, storage=storage, context=record.context)
        # what each block is to learn; the quantized path itself is all that scales and codes are chosen on
        learns = record.finetune is not None
        self.body, *self.floats = (self.begin(train) for _ in range(1 + learns))
        self.validation = [self.begin(validation) for _ in range(2 * learns)]
        self.finetuner: Finetuner | None = None

    def run(self, journal: CalibrationJournal | None) -> None:
        """Calibrates all blocks; those that the journal holds are restored."""
        for index, layer in enumerate(tqdm(self.layers, "calibrating", unit="block", disable=not self.progress)):
            started = time.perf_counter()
            with visiting(layer, self.device):
                facts = self._run_block(layer, index, journal)
            self.record.scales.append(facts["scales"])
            if "finetuning" in facts:
                self.record.finetuning.append(facts["finetuning"])
            self.record.block_seconds.append(time.perf_counter() - started)

    def _run_block(self, layer: nn.Module, index: int, journal: CalibrationJournal | None) -> dict:
        """Calibrates one block, or restores it, and moves all hidden states through it."""
        self.rotator.replace(layer, index)  # in float32, one block at a time
        if self.record.prefix.prefix_ids:
            store_prefix(layer, self.family, self.head)
        sites = BlockSites(layer, self.family, self.body)
        found = balance_block(sites, self.rotator.rotation) if self.record.balance else {}
        if journal is not None and index < journal.finished:
            tensors, facts = journal.read(index)
            restore_block(layer, tensors)
            self._advance_floats(layer)
        else:
            facts = self._calibrate(sites, index, found)
            if journal is not None:
                journal.keep(index, block_tensors(layer), facts)
        with on_path(path_switches(layer), Path.REFERENCE):
            for stream in (self.body, *self.validation[:1]):
                stream.advance(layer)
        cast_block(layer, self.dtype)
        return facts

    def through_all_blocks(self) -> tuple[Pairs, Pairs]:
        """What enters the first block, and what leaves the last one in floating point: to train and to validate on."""
        self.body, self.validation[0] = self.begin(self.train), self.begin(self.held_out)
        return Pairs(self.body, *self.floats), Pairs(*self.validation)

    def _calibrate(self, sites: BlockSites, index: int, found: Found) -> dict:
        """One block; the quantized path is still in front of it afterwards, the other behind."""
        record, layer = self.record, sites.layer
        scales, rounded = calibrate_block(sites, record.config, record.rounding, record.search)
        scales = found | scales
        self._advance_floats(layer)
        if record.finetune is None:
            return {"scales": scales}
        self.finetuner = self.finetuner or Finetuner(layer, record.finetune, record.seed, self.progress)
        pairs = Pairs(self.body, *self.floats), Pairs(*self.validation)
        started = time.perf_counter()
        history = self.finetuner.train(layer, index, rounded, *pairs)
        record.finetuning_seconds.append(time.perf_counter() - started)
        return {"scales": scales, "finetuning": history.to_dict()}

    def _advance_floats(self, layer: nn.Module) -> None:
        for stream in (*self.floats, *self.validation[1:]):
            stream.advance(layer)


def _facts(model: PreTrainedModel, record: CalibrationRecord, windows: Tensor, device: torch.device) -> dict:
    """What the blocks of a calibration depend on, for its journal: not what is done to all of them afterwards."""
    known = record.to_dict()
    if record.finetune is not None:
        known["finetune"] = {k: v for k, v in known["finetune"].items() if not k.startswith("end_to_end")}
    names = (
        "config",
        "num_sequences",
        "sequence_length",
        "context",
        "balance",
        "rounding",
        "search",
        "finetune",
        "seed",
    )
    architecture = json.loads(model.config.to_json_string(use_diff=False))
    return {name: known[name] for name in names} | {
        "model_config": {k: v for k, v in architecture.items() if k not in _NAMES_OF_A_MODEL},
        "prefix_ids": list(record.prefix.prefix_ids),
        "weights": fingerprint(model.named_parameters()),
        "windows": fingerprint([("windows", windows)]),
        "device": device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pq_ao": __version__,
    }


def _context(model: PreTrainedModel, context: int | None, num_sequences: int, sequence_length: int) -> int:
    if context is None:
        known = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sequence_length
        return max(sequence_length, min(known, num_sequences * sequence_length // _WINDOWS_OVER_A_POSITION))
    if type(context) is not int or context < sequence_length:
        raise ValueError(
            f"context={context!r}: a whole number of at least sequence_length={sequence_length} is needed."
        )
    return context


def _check_arguments(
    model: PreTrainedModel,
    config: PrefixQuantConfig,
    balance: bool,
    rounding: str,
    search: str,
    finetune: FinetuneConfig | None,
    prefix_ids: Sequence[int] | None,
    storage: str,
) -> None:
    if not isinstance(config, PrefixQuantConfig):
        raise TypeError(f"config: got {type(config).__name__}; pass a PrefixQuantConfig, from prefixquant_config().")
    if finetune is not None and not isinstance(finetune, FinetuneConfig):
        raise TypeError(f"finetune: got {type(finetune).__name__}; pass a pq_ao.FinetuneConfig, or None.")
    if not isinstance(balance, bool):
        raise TypeError(f"balance={balance!r} is a {type(balance).__name__}; pass True or False.")
    choices = (("rounding", rounding, tuple(ROUNDINGS)), ("search", search, SEARCHES), ("storage", storage, STORAGES))
    for name, value, allowed in choices:
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is unknown; use one of {allowed}.")
    if prefix_ids is not None and not config.prefix:
        raise ValueError("prefix_ids: given although config.prefix is False; leave one of the two out.")
    if any(isinstance(module, CalibratedLinear) for module in model.modules()):
        raise ValueError("model: is calibrated already; load the original model to calibrate again.")
    if not model.dtype.is_floating_point or model.dtype.itemsize < 2:
        raise ValueError(f"model: dtype {model.dtype} is not supported; load it with dtype=torch.bfloat16.")
    family_of(model)
