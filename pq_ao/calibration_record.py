"""What calibration was asked for, what it found, and how long it took."""

from dataclasses import asdict, dataclass, field

from pq_ao.config import PrefixQuantConfig
from pq_ao.finetune import FinetuneConfig
from pq_ao.prefix import PrefixReport
from pq_ao.scale_search import Found


@dataclass
class CalibrationRecord:
    """How a model was calibrated; kept as `model.calibration_record`.

    Attributes:
        config: the scheme.
        prefix: the prefix and how well it holds.
        data: name of the corpus, a file's without its folder, or "list".
        num_sequences, sequence_length, context, balance, rounding, search, finetune, seed: arguments of `calibrate`.
        scales: by layer, each static scale or clip factor as the search found it, before any fine-tuning, the factor on
            the absmax scale as "<name>_factor", and how channels were balanced as "<name>_balance" (`pq_ao.balance`).
        finetuning: by layer, how it went (`pq_ao.training.TrainingHistory`); empty without.
        end_to_end: how the fine-tuning of all blocks together went, likewise; None without.
        seconds: wall time of everything.
        prefix_seconds: of which to find the prefix.
        block_seconds: by layer; a block that a journal held takes little.
        finetuning_seconds: of which to fine-tune, without the blocks that a journal held.
        end_to_end_seconds: of which to fine-tune all blocks together.
    """

    config: PrefixQuantConfig
    prefix: PrefixReport
    data: str
    num_sequences: int
    sequence_length: int
    context: int
    balance: bool
    rounding: str
    search: str
    finetune: FinetuneConfig | None
    seed: int
    scales: list[Found] = field(default_factory=list)
    finetuning: list[dict] = field(default_factory=list)
    end_to_end: dict | None = None
    seconds: float = 0.0
    prefix_seconds: float = 0.0
    block_seconds: list[float] = field(default_factory=list)
    finetuning_seconds: list[float] = field(default_factory=list)
    end_to_end_seconds: float = 0.0

    def to_dict(self) -> dict:
        """Plain dictionary for JSON."""
        return asdict(self)
