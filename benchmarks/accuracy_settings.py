"""The rows of the accuracy table: how each is calibrated, on which path and for how many seeds it is measured.

All of them are the product's own switches. In the order of the paper's ablation (its Table 5), a step a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

from pq_ao.quantize import PrefixQuantConfig, prefixquant_config


@dataclass(frozen=True)
class Calibration:
    """Arguments of `prefixquant_config` and `calibrate` that rows differ in."""

    scheme: str = "w4a4kv4"
    mode: str = "static"
    prefix: bool = True
    rotation: bool = True
    balance: bool = True
    search: str = "tensor"
    rounding: str = "nearest"
    finetuned: bool = False
    end_to_end: bool = False

    def config(self) -> PrefixQuantConfig:
        """Its scheme."""
        return prefixquant_config(self.scheme, mode=self.mode, prefix=self.prefix, rotation=self.rotation)


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
        calibration: its name in `CALIBRATIONS`; None for the model as it was loaded.
        path: "integer", "reference" (both after `quantize_`) or None: floating point.
        seeds: how many of `--seeds` it is measured for.
    """

    calibration: str | None = None
    path: str | None = "integer"
    seeds: int = 1


@dataclass(frozen=True)
class Job:
    """What one calibration serves: rows that share it are measured on the same model.

    Attributes:
        calibration: its name in `CALIBRATIONS`; None for the model as it was loaded.
        seed: of the calibration.
        settings: the rows, by name.
    """

    calibration: str | None
    seed: int
    settings: dict[str, Setting]


UNTRAINED, HEADLINE = "w4a4kv4-static", "w4a4kv4-static-gptq-tuned-end-to-end"

CALIBRATIONS: dict[str, Calibration] = {
    "w4a4kv4-dynamic-rtn": Calibration(mode="dynamic", rotation=False, prefix=False, balance=False, search="none"),
    "w4a4kv4-dynamic-quarot": Calibration(mode="dynamic", prefix=False, balance=False, search="none"),
    "w4a4kv4-dynamic-no-prefix-no-balance": Calibration(mode="dynamic", prefix=False, balance=False),
    "w4a4kv4-dynamic-no-prefix": Calibration(mode="dynamic", prefix=False),
    "w4a4kv4-dynamic-no-prefix-gptq": Calibration(mode="dynamic", prefix=False, rounding="gptq"),
    "w4a4kv4-dynamic-no-prefix-gptq-tuned": Calibration(mode="dynamic", prefix=False, rounding="gptq", finetuned=True),
    "w4a4kv4-dynamic-no-prefix-gptq-tuned-end-to-end": Calibration(
        mode="dynamic", prefix=False, rounding="gptq", finetuned=True, end_to_end=True
    ),
    "w4a4kv4-dynamic": Calibration(mode="dynamic"),
    "w4a4kv4-dynamic-gptq": Calibration(mode="dynamic", rounding="gptq"),
    "w4a4kv4-dynamic-tuned": Calibration(mode="dynamic", finetuned=True),
    "w4a4kv4-dynamic-gptq-tuned": Calibration(mode="dynamic", rounding="gptq", finetuned=True),
    "w4a4kv4-dynamic-gptq-tuned-end-to-end": Calibration(
        mode="dynamic", rounding="gptq", finetuned=True, end_to_end=True
    ),
    "w4a4kv4-static-no-prefix": Calibration(prefix=False),
    "w4a4kv4-static-no-prefix-gptq": Calibration(prefix=False, rounding="gptq"),
    "w4a4kv4-static-no-balance": Calibration(balance=False),
    "w4a4kv4-static-search-none": Calibration(search="none"),
    UNTRAINED: Calibration(),
    "w4a4kv4-static-search-block": Calibration(search="block"),
    "w4a4kv4-static-gptq": Calibration(rounding="gptq"),
    "w4a4kv4-static-tuned": Calibration(finetuned=True),
    "w4a4kv4-static-gptq-tuned": Calibration(rounding="gptq", finetuned=True),
    HEADLINE: Calibration(rounding="gptq", finetuned=True, end_to_end=True),
    "w4a4kv16-static": Calibration("w4a4kv16"),
    "w4a8kv4-static": Calibration("w4a8kv4"),
    "w4a8kv4-static-gptq": Calibration("w4a8kv4", rounding="gptq"),
    "w4a8kv4-static-gptq-tuned": Calibration("w4a8kv4", rounding="gptq", finetuned=True),
    "w4a8kv4-static-gptq-tuned-end-to-end": Calibration("w4a8kv4", rounding="gptq", finetuned=True, end_to_end=True),
    # in the manner of SmoothQuant: what it smooths, the gains of the norms, is folded into the weights here
    "w8a8kv8-static-smooth": Calibration("w8a8kv8", rotation=False, prefix=False, balance=False),
    "w8a8kv8-static": Calibration("w8a8kv8"),
}


def _seeds(name: str, calibration: Calibration) -> int:
    if name == HEADLINE:
        return 2
    # a step of the ladder is judged by whether it is larger than what seeds do
    return 1 if calibration.finetuned else 3


SETTINGS: dict[str, Setting] = {
    "bf16": Setting(None, path=None),
    "bf16-prefix": Setting(UNTRAINED, path=None),
    **{name: Setting(name, seeds=_seeds(name, calibration)) for name, calibration in CALIBRATIONS.items()},
    f"{HEADLINE}-reference": Setting(HEADLINE, path="reference"),
}


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a row's name matches one of the glob patterns."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def jobs(patterns: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """What is to be done for the rows that match one of the glob `patterns`; the quick calibrations come first.

    Raises:
        ValueError: a pattern that matches nothing, or a seed that is named twice or negative.
    """
    if idle := [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in SETTINGS)]:
        raise ValueError(f"--rows {' '.join(idle)} matches none of the rows {', '.join(SETTINGS)}")
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"--seeds {' '.join(map(str, seeds))}: must be different numbers of at least 0")
    found: dict[tuple[str | None, int], Job] = {}
    for name, setting in SETTINGS.items():
        if matches(name, patterns):
            for seed in seeds[: setting.seeds]:
                key = (setting.calibration, seed)
                found.setdefault(key, Job(*key, {})).settings[name] = setting
    return sorted(found.values(), key=_effort)


def longest_first(jobs: Sequence[Job]) -> list[Job]:
    """The order for several processes: no long calibration is left when the others have ended."""
    return sorted(jobs, key=lambda job: (*(not part for part in _effort(job)), job.seed))


def _effort(job: Job) -> tuple[bool, bool]:
    calibration = CALIBRATIONS.get(job.calibration, Calibration())
    return calibration.finetuned, calibration.end_to_end
