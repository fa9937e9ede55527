"""Compare the winner, evaluated again from its files, with the loss that its trial reported."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from engine.command_answers import AdapterEvaluation
from engine.config.metrics_section import PREFERENCE_ACCURACY
from engine.config.parsing import parse_dataclass
from engine.sample_losses import SampleLosses
from engine.units import counted
from sweep.text import number
from sweep.trials.paired import LEVEL, LEVEL_TEXT, are_comparable, paired_difference

# float32 repeats itself; bfloat16 kernels may sum in another order
RELATIVE_TOLERANCE = {"cpu": 1e-3, "cuda": 1e-2}
LOSSES = ("base_eval_loss", "eval_loss")


@dataclass(frozen=True)
class Gain:
    """Hold what the winner gains over the base model, in nats per target token, with an interval.

    low, high: of a level of 95 % that holds for the best of num_contenders, as they were compared on
    these samples: Student's quantile at 0.05 / (2 num_contenders), times the paired standard error.
    """

    nats: float
    low: float
    high: float
    num_samples: int
    num_contenders: int
    unit: str = "nats per target token"

    @property
    def text(self) -> str:
        samples = counted(self.num_samples, "evaluation sample")
        chosen = f", chosen among {counted(self.num_contenders, 'trial')}" if self.num_contenders > 1 else ""
        return f"{self.nats:.4f} {self.unit} ({LEVEL_TEXT}: {self.low:.4f} to {self.high:.4f}, {samples}{chosen})"


@dataclass(frozen=True)
class Reevaluation:
    """Losses of base model and winner, in nats per target token; leaderboard.json keeps them.

    agrees: eval_loss is trial_eval_loss within relative_tolerance. gain: None if the losses are not
    known by sample, or there is one sample only. base_metrics, metrics: what base model and adapter
    scored by the task metrics. base_eval_losses, eval_losses: the same of each evaluation set, if
    there are several.
    """

    base_eval_loss: float
    eval_loss: float
    num_eval_target_tokens: int
    trial_eval_loss: float
    agrees: bool
    relative_tolerance: float
    gain: Gain | None = None
    base_metrics: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    base_eval_losses: dict[str, float] = field(default_factory=dict)
    eval_losses: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        optional = ("gain", "base_metrics", "metrics", "base_eval_losses", "eval_losses")
        return {name: value for name, value in asdict(self).items() if name not in optional or value not in (None, {})}

    @property
    def is_of_pairs(self) -> bool:
        """Return whether the losses are means over pairs of answers, which have no perplexity."""
        return PREFERENCE_ACCURACY in self.metrics

    @property
    def metrics_text(self) -> str:
        """Return `; exact_match: base model 0.1000, adapter 0.7500` for each evaluation set and task metric."""
        known = [name for name in self.metrics if name in self.base_metrics]
        texts = [f"{name}: base model {self.base_metrics[name]:.4f}, adapter {self.metrics[name]:.4f}" for name in known]
        texts[:0] = [
            f"{name}: base model {number(self.base_eval_losses[name], '.4f')}, adapter {number(loss, '.4f')}"
            for name, loss in self.eval_losses.items()
        ]
        return "".join(f"; {text}" for text in texts)

    @classmethod
    def from_dict(cls, values: Any) -> Reevaluation:
        """Read plain data from JSON, which has null for a loss that is not finite."""
        lost = {name: math.nan for name in LOSSES if isinstance(values, dict) and values.get(name, 0.0) is None}
        return parse_dataclass(cls, {**values, **lost} if lost else values, "reevaluation")


def compare(measured: AdapterEvaluation, trial_eval_loss: float, device: str, num_contenders: int = 1) -> Reevaluation:
    """Compare the second measurement with the trial's own report. device: cpu or cuda.

    num_contenders: trials among which this one was chosen.
    """
    tolerance = RELATIVE_TOLERANCE[device]
    return Reevaluation(
        base_eval_loss=measured.base_eval_loss,
        eval_loss=measured.eval_loss,
        num_eval_target_tokens=measured.num_eval_target_tokens,
        trial_eval_loss=trial_eval_loss,
        agrees=math.isclose(measured.eval_loss, trial_eval_loss, rel_tol=tolerance),
        relative_tolerance=tolerance,
        base_metrics=measured.base_metrics or {},
        metrics=measured.metrics or {},
        base_eval_losses=measured.base_sample_losses.means if measured.base_sample_losses else {},
        eval_losses=measured.sample_losses.means if measured.sample_losses else {},
        gain=_gain(measured.base_sample_losses, measured.sample_losses, num_contenders),
    )


def _gain(base: SampleLosses | None, tuned: SampleLosses | None, num_contenders: int) -> Gain | None:
    if base is None or tuned is None or not are_comparable(base, tuned):
        return None
    found = paired_difference(base, tuned)
    margin = found.margin((1.0 - LEVEL) / (2.0 * max(1, num_contenders)))
    if not math.isfinite(found.nats) or not math.isfinite(margin):
        return None
    low, high = found.nats - margin, found.nats + margin
    return Gain(found.nats, low, high, found.num_samples, num_contenders, **({"unit": "nats a pair"} if tuned.margins else {}))
