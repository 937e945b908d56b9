"""lm-eval for models of pq_ao: the model class `pq_ao`, its command line, and `evaluate_tasks`.

`python -m pq_ao.harness` is lm-eval's own command, which has no plugins, with the model `pq_ao` and the tasks of
`pq_ao.tasks` known to it:

    python -m pq_ao.harness --model pq_ao --model_args pretrained=meta-llama/Meta-Llama-3-8B,scheme=w4a4kv4,\
calibration=pile --tasks piqa,arc_easy --batch_size 16
    python -m pq_ao.harness --model pq_ao --model_args pretrained=FOLDER --tasks piqa_local --metadata data_folder=DATA

What the model sees of special tokens: multiple choice and generation take what the tokenizer adds, as lm-eval's `hf`
does, so that every scheme, and floating point, scores the same ids; papers on quantization often add none, which is
`add_bos_token=False`. A BOS behind a hidden prefix that has one is harmless: `calibrate` chose the prefix for it.
`loglikelihood_rolling`, and an empty context, put one token in front (`prefix_token_id`, by default BOS, else EOS), for
a first token must follow something; that token is not scored, and none is added to the text itself, whatever the
tokenizer does.
"""

import copy
import inspect
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torchao.quantization import quantize_
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pq_ao.cache import PrefixStaticCache
from pq_ao.calibration import calibrate
from pq_ao.data import check_count
from pq_ao.modules import PrefixAttention
from pq_ao.quantize import prefixquant_config
from pq_ao.tasks import TASKS_FOLDER

try:
    from lm_eval._cli import HarnessCLI
    from lm_eval.api.metrics import mean_stderr
    from lm_eval.api.registry import model_registry
    from lm_eval.api.task import Task
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import setup_logging
except ImportError as error:
    raise ImportError(f"pq_ao.harness needs lm-eval ({error}); run: pip install lm-eval accelerate") from error

__all__ = ["PrefixQuantLM", "evaluate_tasks"]

Row = dict[str, Any]


def _keywords(function: Any) -> frozenset[str]:
    parameters = inspect.signature(function).parameters.values()
    return frozenset(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)


_CONFIG_ARGUMENTS = _keywords(prefixquant_config)
# `data` is what tasks have too, so calibration's goes by the name of what it is for
_CALIBRATE_ARGUMENTS = _keywords(calibrate) - {"data", "progress"} | {"calibration"}

# by name, so that the copy of this module that `python -m` runs registers the same class as the one that is imported
model_registry.register("pq_ao", target="pq_ao.harness:PrefixQuantLM")


class PrefixQuantLM(HFLM):
    """A model of transformers for lm-eval: as it is, calibrated, or quantized.

    A calibrated model runs behind its prefix, which its attention holds; the tasks' tokens begin at position 0, and the
    context is as long as ever. Likelihoods need no cache, generation has a `PrefixStaticCache`.

    Args:
        pretrained: a live model, or a name or folder that transformers loads.
        tokenizer: its tokenizer, or a name or folder; None for that of `pretrained`. Not changed.
        scheme: of `prefixquant_config`: what to make of a model given by name. "none" evaluates it as it is.
        device: for a model given by name; None for CUDA where there is a GPU.
        softmax_dtype: of the log-softmax. lm-eval's own default, the model's dtype, rounds bfloat16 likelihoods to
            three digits, which decides between close choices by chance.
        progress: show bars of calibration and of likelihoods.
        options: with a scheme the other arguments of `prefixquant_config` and of `calibrate`, by the same names but
            `calibration` for `data`; the rest are those of lm-eval's `hf`, such as batch_size, dtype, max_length,
            add_bos_token, revision.

    Raises:
        ValueError: a scheme for a live model or a calibrated one, or arguments of calibration without a scheme; and
            what `prefixquant_config` and `calibrate` raise.

    Example::

        lm = pq_ao.PrefixQuantLM(model, tokenizer, batch_size=16)
        results = lm_eval.simple_evaluate(lm, tasks=["piqa"])
    """

    def __init__(
        self,
        pretrained: PreTrainedModel | str,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        *,
        scheme: str | None = "none",
        device: str | None = None,
        softmax_dtype: str | torch.dtype = "float32",
        progress: bool = True,
        **options,
    ):
        config_arguments = {name: options.pop(name) for name in _CONFIG_ARGUMENTS & options.keys()}
        calibrate_arguments = {name: options.pop(name) for name in _CALIBRATE_ARGUMENTS & options.keys()}
        config = None
        # lm-eval may read the word none on its command line as None
        if calibrate_arguments.get("search", "none") is None:
            calibrate_arguments["search"] = "none"
        if scheme in (None, "none"):
            if idle := sorted(config_arguments | calibrate_arguments):
                raise ValueError(
                    f"{', '.join(idle)}: without effect for scheme='none'; name a scheme, such as w4a4kv4."
                )
        elif isinstance(pretrained, str):
            config = prefixquant_config(scheme, **config_arguments)
        else:
            raise ValueError(
                f"scheme={scheme!r}: a live model is evaluated as it is; call pq_ao.calibrate and quantize_ on it "
                "first, or pass its name."
            )
        if not isinstance(tokenizer, str | None):
            tokenizer = copy.deepcopy(tokenizer)  # lm-eval may give it a padding token
        super().__init__(
            pretrained=pretrained,
            backend="causal",
            tokenizer=tokenizer,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            softmax_dtype=softmax_dtype,
            **options,
        )
        self.progress = progress
        if config is not None:
            if "calibration" in calibrate_arguments:
                calibrate_arguments["data"] = calibrate_arguments.pop("calibration")
            calibrate(self.model, self.tokenizer, config, progress=progress, **calibrate_arguments)
            quantize_(self.model, config)

    def get_model_info(self) -> dict:
        """What lm-eval writes into its results of the model; of a calibrated one also scheme and prefix."""
        info = super().get_model_info()
        record = getattr(self.model, "calibration_record", None)
        if record is not None:
            info |= {"prefixquant": asdict(record.config) | {"prefix_ids": list(record.prefix.prefix_ids)}}
        return info

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation behind its context, and whether it is the greedy one."""
        return super().loglikelihood(requests, disable_tqdm or not self.progress)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each behind one `prefix_token_id` that is not scored."""
        # A tokenizer that adds BOS would put a second one behind that token, and lm-eval would score it.
        chosen, self.add_bos_token = self.add_bos_token, False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm or not self.progress)
        finally:
            self.add_bos_token = chosen

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """[B, L] ids, padded on the right, to [B, L, V] logits.

        Padding comes later than every token that is scored, so no mask is needed. With the cache that the model would
        make for itself the integers would leave their fused path.
        """
        dtype = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            return self.model(inps, use_cache=False).logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs) -> Tensor:
        """[B, L] ids, padded on the left, to [B, up to max_length] ids."""
        if any(isinstance(module, PrefixAttention) for module in self.model.modules()):
            rows = context.shape[0] * generation_kwargs.get("num_beams", 1)
            generation_kwargs["past_key_values"] = PrefixStaticCache(self.model, rows, max_length)
            # each batch has its own length: compiled steps would be made anew for every one
            generation_kwargs["disable_compile"] = True
        return super()._model_generate(context, max_length, stop, **generation_kwargs)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Task],
    batch_size: int = 8,
    limit: int | None = None,
    progress: bool = True,
) -> list[Row]:
    """Accuracies of a model on tasks of lm-eval; runs no git and needs no network.

    Args:
        model: a causal language model: as loaded, calibrated or quantized. It is put into evaluation mode.
        tokenizer: its tokenizer.
        tasks: by name, from `local_tasks`, or `lm_eval.tasks.TaskManager().load(names)["tasks"]` (that may download).
        batch_size: requests at a time.
        limit: only the first so many records of each task; None for all.
        progress: show bars for the model's requests; those over tasks' records, seconds in all, are lm-eval's.

    Returns:
        A row for each task: `task`, `acc`, `acc_norm` (None for tasks without), `stderr`, `acc_norm_stderr` (standard
        errors of the two; None where there is no value, or a single record) and `records`, how many were scored.

    Raises:
        TypeError, ValueError: `tasks` is not a mapping of tasks, a task has no accuracy, or a number is out of range.

    Example::

        rows = pq_ao.evaluate_tasks(model, tokenizer, pq_ao.local_tasks("data"), batch_size=16)
    """
    batch_size = check_count("batch_size", batch_size)
    limit = None if limit is None else check_count("limit", limit)
    if not isinstance(tasks, Mapping) or not all(isinstance(task, Task) for task in tasks.values()):
        raise TypeError("tasks: must be tasks of lm-eval by name; make them by pq_ao.local_tasks(folder).")
    if without := [name for name, task in tasks.items() if "acc" not in task.aggregation()]:
        raise ValueError(f"tasks: {', '.join(without)}: no metric 'acc'; evaluate these with lm_eval.simple_evaluate.")
    if not tasks:
        raise ValueError("tasks: is empty; name at least one.")
    lm = PrefixQuantLM(model, tokenizer, batch_size=batch_size, progress=progress)
    # no bootstrap: means have a standard error without it, and it starts processes
    results = evaluate(lm, {"tasks": dict(tasks)}, limit=limit, bootstrap_iters=0)
    return [_row(name, results["samples"][name]) for name in tasks]


def _row(name: str, samples: list[dict[str, Any]]) -> Row:
    row: Row = {"task": name}
    for metric, stderr in (("acc", "stderr"), ("acc_norm", "acc_norm_stderr")):
        values = [float(sample[metric]) for sample in samples if metric in sample]
        row[metric] = statistics.fmean(values) if values else None
        row[stderr] = mean_stderr(values) if len(values) > 1 else None
    return row | {"records": len(samples)}


def main() -> None:
    """lm-eval's command line, with the model `pq_ao` and the local tasks in reach."""
    setup_logging()
    parser = HarnessCLI()
    arguments = parser.parse_args()
    # a configuration file may have an include_path of its own, which an argument would replace
    if hasattr(arguments, "include_path") and not getattr(arguments, "config", None):
        arguments.include_path = [str(TASKS_FOLDER), *filter(None, [arguments.include_path])]
    parser.execute(arguments)


if __name__ == "__main__":
    main()
