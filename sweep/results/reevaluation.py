"""Compare the winner, evaluated again from its files, with the loss that its trial reported."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from engine.command_answers import AdapterEvaluation
from engine.config.parsing import parse_dataclass

# float32 repeats itself; bfloat16 kernels may sum in another order
RELATIVE_TOLERANCE = {"cpu": 1e-3, "cuda": 1e-2}
LOSSES = ("base_eval_loss", "eval_loss")


@dataclass(frozen=True)
class Reevaluation:
    """Losses of base model and winner, in nats per target token; leaderboard.json keeps them.

    agrees: eval_loss is trial_eval_loss within relative_tolerance.
    """

    base_eval_loss: float
    eval_loss: float
    num_eval_target_tokens: int
    trial_eval_loss: float
    agrees: bool
    relative_tolerance: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Reevaluation:
        """Read plain data from JSON, which has null for a loss that is not finite."""
        lost = {name: math.nan for name in LOSSES if isinstance(values, dict) and values.get(name, 0.0) is None}
        return parse_dataclass(cls, {**values, **lost} if lost else values, "reevaluation")


def compare(measured: AdapterEvaluation, trial_eval_loss: float, device: str) -> Reevaluation:
    """Compare the second measurement with the trial's own report. device: cpu or cuda."""
    tolerance = RELATIVE_TOLERANCE[device]
    return Reevaluation(
        base_eval_loss=measured.base_eval_loss,
        eval_loss=measured.eval_loss,
        num_eval_target_tokens=measured.num_eval_target_tokens,
        trial_eval_loss=trial_eval_loss,
        agrees=math.isclose(measured.eval_loss, trial_eval_loss, rel_tol=tolerance),
        relative_tolerance=tolerance,
    )
