"""Calibrates and measures the rows of the accuracy table; goes on where an interrupted run ended."""

import argparse
import copy
import gc
import logging
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from torch import nn
from torchao.quantization import quantize_
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import pq_ao
from benchmarks.accuracy_settings import CALIBRATIONS, Calibration, Job, Setting, matches
from benchmarks.accuracy_texts import refuse_overlap, text_name, text_names
from benchmarks.command import described
from benchmarks.model_source import model_folder, model_name
from benchmarks.results_file import ResultsFile, Row, SentResults
from pq_ao.calibration_record import CalibrationRecord
from pq_ao.data import BLANK_LINE, count_windows, load_text, token_ids

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """One row to be measured.

    Attributes:
        name: of its setting.
        setting: says on which path.
        facts: what is known before: what tells this row from all others.
    """

    name: str
    setting: Setting
    facts: Row


class AccuracyRun:
    """One model, one corpus: measures jobs and writes each row as it comes.

    Args:
        options: of the command line, see `benchmarks.accuracy.parse`.
        todo: the jobs.
        file: receives the rows.

    Raises:
        ValueError: corpus and calibration overlap, or an argument does not fit model or data.
        OSError, RuntimeError, ImportError: model, data or lm-eval cannot be had.
    """

    def __init__(self, options: argparse.Namespace, todo: list[Job], file: ResultsFile | SentResults):
        self.options, self.todo, self.file = options, todo, file
        self.failures = 0
        self.finetune = pq_ao.FinetuneConfig(
            epochs=options.epochs,
            batch_size=options.batch_size_training,
            learning_rate=options.learning_rate,
            weight_learning_rate=options.weight_learning_rate,
            validation_sequences=options.validation_sequences,
            end_to_end_rate=options.end_to_end_rate,
            end_to_end_weight_rate=options.end_to_end_weight_rate,
            end_to_end_prefix_rate=options.end_to_end_prefix_rate,
        )
        corpus = load_text(options.corpus, "test")
        self.calibration_texts = [load_text(source, "train") for source in options.calibration]
        for source, text in zip(options.calibration, self.calibration_texts, strict=True):
            refuse_overlap(corpus, text, text_name(source))
        self.tasks = {} if options.tasks is None else self._local_tasks()
        folder = model_folder(options.model)
        self.model_name = model_name(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.ids = token_ids(self.tokenizer, corpus)
        # kept on the CPU, so that the peak of GPU memory is that of the measured model alone
        self.base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.windows = self._windows()
        self._check_calibration_texts()

    def _local_tasks(self) -> dict:
        self._check_rows("--task-rows", self.options.task_rows)
        return pq_ao.local_tasks(self.options.tasks)

    def _check_rows(self, option: str, patterns: list[str]) -> None:
        names = list(dict.fromkeys(name for job in self.todo for name in job.settings))
        if not any(matches(name, patterns) for name in names):
            raise ValueError(f"{option} {' '.join(patterns)} matches none of the rows {', '.join(names)}")

    def _windows(self) -> dict[int, int]:
        """How many windows of each length to measure: --sequence-length, then --long-context."""
        options, short = self.options, self.options.sequence_length
        available = count_windows(self.ids, short)
        windows = {short: available if options.windows is None else options.windows}
        if not 1 <= windows[short] <= available:
            raise ValueError(f"--windows {options.windows}: the corpus has 1 to {available} at this --sequence-length")
        if options.long_context is not None:
            long, context = options.long_context, self.base.config.get_text_config().max_position_embeddings
            if not short < long <= context:
                raise ValueError(
                    f"--long-context {long}: must be above --sequence-length {short}, at most the model's {context}"
                )
            self._check_rows("--long-context-rows", options.long_context_rows)
            # of the same tokens
            windows[long] = min(count_windows(self.ids, long), max(1, windows[short] * short // long))
        return windows

    def _check_calibration_texts(self) -> None:
        """An hour into the run would be late to learn that a text is too short."""
        tokens = token_ids(self.tokenizer, BLANK_LINE.join(self.calibration_texts)).numel()
        for name in dict.fromkeys(job.calibration for job in self.todo if job.calibration is not None):
            finetuned = CALIBRATIONS[name].finetuned
            sequences, length = self._calibration_size(finetuned)
            wanted = sequences + (self.finetune.validation_sequences if finetuned else 0)
            if tokens // length < wanted:
                option = "--finetune-sequences and --validation-sequences" if finetuned else "--num-sequences"
                raise ValueError(
                    f"--calibration {text_names(self.options.calibration)}: has {tokens:,} tokens, {tokens // length} "
                    f"sequences of {length}; {wanted} are needed for {name}. Lower {option}, or name further texts."
                )

    def _calibration_size(self, finetuned: bool) -> tuple[int, int]:
        options = self.options
        if finetuned:
            return options.finetune_sequences, options.finetune_length
        return options.num_sequences, options.calibration_length

    @property
    def progress(self) -> bool:
        """Bars for people, not for log files."""
        return sys.stderr.isatty()

    def run(self) -> int:
        """Measures what the results do not hold yet; what fails is recorded and does not stop the rest.

        Returns:
            how many rows failed.
        """
        for job in tqdm(self.todo, desc="calibrations", unit="run", disable=not self.progress):
            self.run_job(job)
        return self.failures

    def run_job(self, job: Job) -> None:
        """Measures what of one job the results do not hold yet."""
        waiting = [measurement for measurement in self._measurements(job) if not self._is_held(measurement)]
        if not waiting:
            return
        failures = self.failures
        self._calibrate_and_measure(job, waiting)
        journal = self._journal(job)
        if journal is not None and journal.exists() and self.failures == failures:
            shutil.rmtree(journal)  # its rows are in the results: it would only take room
        gc.collect()
        torch.cuda.empty_cache()
        # each fine-tuning compiles its step: in one process they would reach the limit and run uncompiled
        torch.compiler.reset()

    def _calibrate_and_measure(self, job: Job, waiting: list[Measurement]) -> None:
        known: Row = {}
        quantized = False
        try:
            model = copy.deepcopy(self.base).to(self.options.device)
            if job.calibration is not None:
                known = self._calibrate(model, job)
            while waiting:
                if waiting[0].setting.path is not None and not quantized:
                    quantize_(model, CALIBRATIONS[job.calibration].config())
                    quantized = True
                self._measure(model, waiting.pop(0), known)
        except Exception as error:  # whatever it is: the other rows, hours of work perhaps, do not depend on it
            names = dict.fromkeys(measurement.name for measurement in waiting)
            logger.error("seed %d of %s failed", job.seed, ", ".join(names), exc_info=True)
            for measurement in waiting:
                self._keep(measurement, measurement.facts | {"error": self._described(error)})

    def _journal(self, job: Job) -> Path | None:
        """Folder of a job's journal; None without --resume."""
        if self.options.resume is None or job.calibration is None:
            return None
        return self.options.resume / f"{job.calibration}-seed{job.seed}"

    def _calibrate(self, model: nn.Module, job: Job) -> Row:
        """Calibrates; returns what rows say of it."""
        calibration, journal = CALIBRATIONS[job.calibration], self._journal(job)
        sequences, length = self._calibration_size(calibration.finetuned)
        restored = 0 if journal is None else len(list(journal.glob("block-*.safetensors")))
        if restored:
            print(f"{journal.name}: goes on behind block {restored - 1}", flush=True)
        self._reset_peak()
        record = pq_ao.calibrate(
            model,
            self.tokenizer,
            calibration.config(),
            data=self.calibration_texts,
            num_sequences=sequences,
            sequence_length=length,
            balance=calibration.balance,
            rounding=calibration.rounding,
            search=calibration.search,
            finetune=self._finetune(calibration),
            prefix_ids=self.options.prefix_ids if calibration.prefix else None,
            seed=job.seed,
            resume=journal,
            progress=self.progress,
        )
        at_once = {"calibrations_at_once": self.options.processes}
        return _what_was_found(record, restored) | {"calibration_peak_gib": self._peak()} | at_once

    def _finetune(self, calibration: Calibration) -> pq_ao.FinetuneConfig | None:
        if not calibration.finetuned:
            return None
        epochs = self.options.end_to_end_epochs if calibration.end_to_end else 0
        return replace(self.finetune, end_to_end_epochs=epochs)

    def _measure(self, model: nn.Module, measurement: Measurement, known: Row) -> None:
        row = measurement.facts | known
        self._reset_peak()
        try:
            started = time.perf_counter()
            if "task" in row:
                row |= self._accuracy(model, row["task"])
            elif row["path"] == "reference":
                row["integer_ppl"] = self._perplexity(model, row)
                started = time.perf_counter()
                with pq_ao.reference_path(model):
                    row["ppl"] = self._perplexity(model, row)
            else:
                row["ppl"] = self._perplexity(model, row)
            row |= {"evaluation_seconds": round(time.perf_counter() - started, 3), "peak_gib": self._peak()}
        except Exception as error:  # as in `_calibrate_and_measure`: the same model may still serve the next row
            logger.error("%s, seed %s, failed", measurement.name, row["seed"], exc_info=True)
            row["error"] = self._described(error)
        self._keep(measurement, row)

    def _perplexity(self, model: nn.Module, row: Row) -> float:
        options, length = self.options, row["seqlen"]
        return pq_ao.perplexity(
            model,
            self.tokenizer,
            self.ids,
            sequence_length=length,
            windows=row["windows"],
            batch_size=max(1, options.batch_size * options.sequence_length // length),
            progress=self.progress,
        ).ppl

    def _accuracy(self, model: nn.Module, task: str) -> Row:
        (row,) = pq_ao.evaluate_tasks(
            model, self.tokenizer, {task: self.tasks[task]}, self.options.task_batch_size, progress=self.progress
        )
        return row

    def _measurements(self, job: Job) -> list[Measurement]:
        """All rows of a job; those of the model in floating point first."""
        options, found = self.options, []
        for name, setting in sorted(job.settings.items(), key=lambda item: item[1].path is not None):
            facts = self._facts(setting, job)
            texts = list(self.windows.items())
            if setting.path == "reference":
                texts = [(length, min(windows, options.reference_windows)) for length, windows in texts[:1]]
            elif not matches(name, options.long_context_rows):
                texts = texts[:1]
            for length, windows in texts:
                text = {"corpus": text_name(options.corpus), "seqlen": length, "windows": windows}
                found.append(Measurement(name, setting, facts | text))
            # a further seed says less of a task than its few records leave open,
            # and the reference path is a check of perplexity alone
            if setting.path != "reference" and matches(name, options.task_rows) and job.seed == options.seeds[0]:
                found += [Measurement(name, setting, facts | {"task": task}) for task in self.tasks]
        return found

    def _facts(self, setting: Setting, job: Job) -> Row:
        """What all rows of a setting have; None where a key does not apply."""
        calibration = Calibration() if job.calibration is None else CALIBRATIONS[job.calibration]
        calibrated, quantized = job.calibration is not None, setting.path is not None
        finetuned = quantized and calibration.finetuned
        together = finetuned and calibration.end_to_end
        sequences, length = self._calibration_size(calibration.finetuned)
        training = self.finetune
        return {
            "model": self.model_name,
            "scheme": calibration.scheme if quantized else "bf16",
            "mode": calibration.mode if quantized else "none",
            "path": setting.path,
            "prefix": calibrated and calibration.prefix,
            "rotation": calibrated and calibration.rotation,
            "balance": calibration.balance if quantized else None,
            "act_codes": calibration.config().act_codes if quantized else None,
            "search": calibration.search if quantized else None,
            "rounding": calibration.rounding if quantized else None,
            "finetuned": finetuned,
            "seed": job.seed if calibrated else None,
            "calibration_corpus": text_names(self.options.calibration) if calibrated else None,
            "calibration_sequences": sequences if calibrated else None,
            "calibration_length": length if calibrated else None,
            "epochs": training.epochs if finetuned else None,
            "end_to_end_epochs": self.options.end_to_end_epochs if together else None,
            "end_to_end_rate": training.end_to_end_rate if together else None,
            "end_to_end_weight_rate": training.end_to_end_weight_rate if together else None,
            "end_to_end_prefix_rate": training.end_to_end_prefix_rate if together else None,
            "learning_rate": training.learning_rate if finetuned else None,
            "weight_learning_rate": training.weight_learning_rate if finetuned else None,
            "batch_size_training": training.batch_size if finetuned else None,
            "validation_sequences": training.validation_sequences if finetuned else None,
        }

    def _is_held(self, measurement: Measurement) -> bool:
        facts = measurement.facts
        return any(all(row.get(key) == value for key, value in facts.items()) for row in self.file.results.rows)

    def _keep(self, measurement: Measurement, row: Row) -> None:
        self.file.append(row)
        self.failures += "error" in row
        what = f", {row['task']}" if "task" in row else f", {row['windows']} x {row['seqlen']} tokens"
        seed = "" if row["seed"] is None else f", seed {row['seed']}"
        if "error" in row:
            outcome = f"failed: {row['error']}"
        elif "task" in row:
            outcome = f"{row['acc']:.4f}" + (f", {row['acc_norm']:.4f} norm" if row["acc_norm"] is not None else "")
        else:
            outcome = f"{row['ppl']:.4f}" + (f" (integers {row['integer_ppl']:.4f})" if "integer_ppl" in row else "")
        tqdm.write(f"{measurement.name}{seed}{what}: {outcome}", file=sys.stdout)
        sys.stdout.flush()  # so that an interrupted run's log is whole

    def _described(self, error: Exception) -> str:
        """Without the folder's path: results travel."""
        text = described(error)
        return text if self.options.resume is None else text.replace(str(self.options.resume), self.options.resume.name)

    def _reset_peak(self) -> None:
        if torch.device(self.options.device).type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.options.device)

    def _peak(self) -> float | None:
        """GiB since `_reset_peak`; None on a CPU."""
        if torch.device(self.options.device).type != "cuda":
            return None
        return round(torch.cuda.max_memory_allocated(self.options.device) / 2**30, 3)


def _what_was_found(record: CalibrationRecord, restored: int) -> Row:
    """What rows say of a calibration; of one that was interrupted, times as the last of its processes extrapolates."""
    layers, blocks = len(record.block_seconds), record.block_seconds[restored:]
    seconds = record.seconds
    if restored:
        seconds = record.prefix_seconds + layers * fmean(blocks) + record.end_to_end_seconds if blocks else None
    training = layers * fmean(record.finetuning_seconds) if record.finetuning_seconds else None
    return {
        "prefix_ids": list(record.prefix.prefix_ids),
        "calibration_context": record.context,
        "calibration_seconds": None if seconds is None else round(seconds, 3),
        "finetuning_seconds": None if training is None else round(training, 3),
        "end_to_end_seconds": round(record.end_to_end_seconds, 3) if record.end_to_end else None,
        "restored_blocks": restored,
        "stopped_blocks": [i for i, block in enumerate(record.finetuning) if block["stopped"] is not None],
    }
