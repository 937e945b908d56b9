"""Time and memory of calibration and fine-tuning: `python -m benchmarks.calibration`, `--help` for the options.

A few decoder blocks of a model's shape with random weights are calibrated as `calibrate` does it, and their median is
taken for all blocks of the whole model. The first block is left out of the median where there are more: it compiles and
warms up. Fine-tuning is timed over a few epochs and extrapolated to all.
"""

import argparse
import gc
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import pq_ao
from benchmarks.command import command_line, described, positive
from benchmarks.results_file import RESULTS, Results, ResultsFile, Row
from pq_ao.data import load_text

BENCHMARK = "calibration"

_LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
_BLOCKS = 32  # of the whole model
_REPEATS = 4  # of the text, for the paper's fine-tuning takes more than a small file has; time does not depend on it
STEPS = ("nearest", "gptq", "finetune")


class CalibrationRun:
    """Measures the steps one by one and writes each row as it comes."""

    def __init__(self, options: argparse.Namespace, command: str):
        self.options = options
        self.failures = 0
        self.text = load_text(options.calibration, "train")
        self.tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
        self.file = ResultsFile(Results.begin(BENCHMARK, command, options.device), options.output)

    def run(self) -> None:
        """All steps; what fails is recorded and does not stop the rest."""
        for step in tqdm(self.options.steps, desc="steps", unit="step", disable=not sys.stderr.isatty()):
            row = self._row(step)
            try:
                row |= self._measured(step)
            except Exception as error:  # the other steps do not depend on it
                row["error"] = described(error)
                self.failures += 1
            self.file.append(row)
            tqdm.write(_line(row), file=sys.stdout)
            sys.stdout.flush()
            gc.collect()
            torch.cuda.empty_cache()

    def _row(self, step: str) -> Row:
        options = self.options
        trained = step == "finetune"
        return {
            "model": "llama-3-8b",
            "scheme": "w4a4kv4",
            "step": step,
            "layers": options.layers,
            "blocks": _BLOCKS,
            "sequences": options.finetune_sequences if trained else options.num_sequences,
            "seqlen": options.finetune_length if trained else options.calibration_length,
            "epochs": options.epochs if trained else None,
            "measured_epochs": options.measured_epochs if trained else None,
            "seconds_per_block": None,
            "minutes": None,
            "peak_gib": None,
        }

    def _measured(self, step: str) -> Row:
        options, on_gpu = self.options, torch.device(self.options.device).type == "cuda"
        row = self._row(step)
        model = self._model()
        finetune = None
        if step == "finetune":
            finetune = pq_ao.FinetuneConfig(
                epochs=options.measured_epochs,
                batch_size=options.batch_size,
                validation_sequences=options.validation_sequences,
            )
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        record = pq_ao.calibrate(
            model,
            self.tokenizer,
            pq_ao.prefixquant_config(),
            data=[self.text] * _REPEATS,
            num_sequences=row["sequences"],
            sequence_length=row["seqlen"],
            rounding="gptq" if step == "gptq" else "nearest",
            finetune=finetune,
            prefix_ids=(0,),
            storage=options.storage,
            progress=sys.stderr.isatty(),
        )
        steady = 1 if options.layers > 1 else 0
        seconds = statistics.median(record.block_seconds[steady:])
        if finetune is not None:
            training = statistics.median(record.finetuning_seconds[steady:])
            seconds += training * (options.epochs / options.measured_epochs - 1)
        found: Row = {"seconds_per_block": seconds, "minutes": seconds * _BLOCKS / 60}
        if on_gpu:
            found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        return found

    def _model(self):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(self.tokenizer), num_hidden_layers=self.options.layers, bos_token_id=0, **_LLAMA_3_8B
        )
        with torch.device(self.options.device):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def _line(row: Row) -> str:
    if "error" in row:
        return f"{row['step']}: failed: {row['error']}"
    memory = "" if row["peak_gib"] is None else f", peak {row['peak_gib']:.1f} GiB"
    return f"{row['step']}: {row['seconds_per_block']:.2f} s a block, {row['minutes']:.1f} min for all{memory}"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line; the defaults of fine-tuning are the paper's."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibration",
        description=__doc__.split(": `")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", nargs="+", default=list(STEPS), choices=STEPS, help="what to measure")
    add("--layers", type=positive, default=3, help="blocks that are calibrated")
    add("--tokenizer", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or hub id; cuts the text")
    add("--calibration", default="wikitext2", help="name (its training part) or file of the text")
    add("--num-sequences", type=positive, default=16, help="calibration sequences")
    add("--calibration-length", type=positive, default=2048, help="tokens of each")
    add("--finetune-sequences", type=positive, default=512, help="sequences to fine-tune on")
    add("--finetune-length", type=positive, default=1024, help="tokens of each")
    add("--validation-sequences", type=positive, default=64, help="further ones, which choose the state that is kept")
    add("--batch-size", type=positive, default=4, help="sequences a step")
    add("--epochs", type=positive, default=20, help="epochs that are meant")
    add("--measured-epochs", type=positive, default=1, help="epochs that are run")
    add("--storage", default="device", choices=("device", "host", "disk"), help="where hidden states lie")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    add("--output", type=Path, default=RESULTS, help="folder of results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0, or 1 if a step failed."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    run = CalibrationRun(parse(arguments), command_line("benchmarks.calibration", arguments))
    run.run()
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
