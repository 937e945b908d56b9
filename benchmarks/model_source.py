"""Which model a benchmark loads, and the name that its results give it."""

import json
from pathlib import Path


def model_folder(model: str | None) -> Path | str:
    """The folder or hub id to load from; SmolLM2-135M-Instruct where none is named."""
    if model is not None:
        return Path(model) if Path(model).is_dir() else model
    from recipes.smollm2 import smollm2_folder

    return smollm2_folder()


def model_name(folder: Path | str) -> str:
    """Hub id, or what `source.json` of a folder of ours says it is, or the folder's name."""
    if isinstance(folder, str):
        return folder
    source = folder / "source.json"
    if source.is_file():
        facts = json.loads(source.read_text(encoding="utf-8"))
        name = facts.get("hub_id") or Path(facts.get("file", "")).stem
        if name:
            return name
    return folder.resolve().name
