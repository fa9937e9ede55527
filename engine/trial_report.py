"""What a trial reports at a rung, with units. Plain data, no torch; the driver reads it too."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TrialReport:
    """One point of a learning curve. Losses are mean nats per target token.

    rung: index on the tokens-seen grid, from 1. tokens_seen: tokens fed forward so far (at or just above the grid point).
    train_loss: over all target tokens since the previous report. eval_loss: on the fixed evaluation set.
    best_eval_loss: lowest so far; `adapter/` in the trial folder is the adapter of that rung.
    elapsed_s: seconds inside optimizer steps, evaluation left out, resumed parts counted in.
    step_time_ms: mean over the steps since the previous report. predicted_peak_gib: of the plan in force, 0 where none was made;
    peak_allocated_gib: measured. num_out_of_memory: times the plan was made leaner because memory ran out. micro_batch_size,
    activation_checkpointing: of the plan in force. setup_s: from the call of train() to its first step, in this process.
    """

    rung: int
    tokens_seen: int
    target_tokens_seen: int
    step: int
    epoch: float
    train_loss: float
    eval_loss: float
    best_eval_loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    step_time_ms: float
    peak_allocated_gib: float
    elapsed_s: float
    num_trainable: int
    predicted_peak_gib: float = 0.0
    num_out_of_memory: int = 0
    micro_batch_size: int = 1
    activation_checkpointing: str = "false"
    setup_s: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrialReport:
        return cls(**{name: values[name] for name in cls.__dataclass_fields__ if name in values})
