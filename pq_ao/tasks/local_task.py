"""The tasks of this folder's yaml files, and `local_tasks`, which makes them for a folder of records."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pq_ao.tasks import ALL_TASKS, PAPER_TASKS, TASKS_FOLDER
from pq_ao.tasks.records import Record, find_file, read_docs

try:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask, Task
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ImportError(f"pq_ao.tasks needs lm-eval ({error}); run: pip install lm-eval accelerate") from error


class LocalTask(ConfigurableTask):
    """A task of lm-eval whose records come from a jsonl file of the folder `metadata["data_folder"]`."""

    def __init__(self, config: dict[str, Any]):
        # the factory leaves the key that names this class among the settings
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs) -> None:
        """Reads the records; nothing is downloaded, and no copy is left in a cache.

        Raises:
            ValueError: no folder is named, or see `find_file` and `read_docs`.
        """
        folder = (self.config.metadata or {}).get("data_folder")
        if folder is None:
            raise ValueError(
                f"task {self.config.task!r}: no data_folder is named; make the task by pq_ao.local_tasks(folder), or "
                "add --metadata data_folder=FOLDER to the command."
            )
        to_doc: Callable[[Record], Record] = dataset_kwargs["to_doc"]
        docs = read_docs(find_file(folder, dataset_kwargs["name"]), to_doc)
        self.dataset = {self.config.test_split: Dataset.from_list(docs)}


def local_tasks(folder: str | os.PathLike[str], names: Sequence[str] = PAPER_TASKS) -> dict[str, Task]:
    """Tasks of lm-eval over the jsonl files of a folder, for `evaluate_tasks`; zero-shot, without a network.

    The files are `<task>.jsonl` or `<task>/<any name>.jsonl` (`.gz` too), where <task> is the name without "_local".
    `pq_ao.tasks.records` describes the fields. Give scores with the number of records: they are those of this folder.

    Args:
        folder: of the records.
        names: of "piqa_local", "arc_easy_local", "arc_challenge_local", "hellaswag_local", "winogrande_local" (all of
            these by default) and "lambada_openai_local".

    Returns:
        The tasks by name, in the order of `names`.

    Raises:
        ValueError: an unknown name, a missing file, or a record that does not fit; names file, line and field.

    Example::

        rows = pq_ao.evaluate_tasks(model, tokenizer, pq_ao.local_tasks("data"), batch_size=16)
    """
    if isinstance(names, str):
        names = (names,)
    unknown = [name for name in names if name not in ALL_TASKS]
    if unknown or not names:
        raise ValueError(f"names={list(names)!r}: must be some of {', '.join(ALL_TASKS)}.")
    folder = Path(folder).expanduser().resolve()
    manager = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False, metadata={"data_folder": str(folder)})
    return manager.load(list(names))["tasks"]
