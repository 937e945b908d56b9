"""Six tasks of lm-eval over local jsonl files, for machines that cannot reach the hub.

Prompts, choices and metrics are those of lm-eval's own tasks; names end in `_local`, for the records are whatever the
folder holds: half of a split is not the published task. `local_task.py` has the tasks, `records.py` the formats.
"""

from pathlib import Path

__all__ = ["ALL_TASKS", "PAPER_TASKS", "TASKS_FOLDER"]

# where the yaml files stand: lm-eval's `include_path`
TASKS_FOLDER = Path(__file__).parent

# the five that quantization papers average
PAPER_TASKS = ("piqa_local", "arc_easy_local", "arc_challenge_local", "hellaswag_local", "winogrande_local")
ALL_TASKS = (*PAPER_TASKS, "lambada_openai_local")
