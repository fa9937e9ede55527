"""Hold an adapter to the limits on its evaluation sets, of which some follow the base model's losses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.config.data_section import DataConfig
from engine.sample_losses import SampleLosses


@dataclass(frozen=True)
class EvalLimits:
    """Hold the highest loss that each limited set may have, in nats per target token."""

    most: Mapping[str, float] = field(default_factory=dict)

    def excess(self, losses: SampleLosses) -> float | None:
        """Return by how many nats the worst set is above its limit, below 0 if all are within; None without limits."""
        means = losses.means
        above = [means[name] - limit for name, limit in self.most.items()]
        return math.inf if any(map(math.isnan, above)) else max(above, default=None)

    def order(self, losses: SampleLosses) -> tuple[float, float]:
        """Return what an adapter is chosen by, least first: what it exceeds its limits by, then its eval loss."""
        return max(self.excess(losses) or 0.0, 0.0), losses.mean


def eval_limits(config: DataConfig, base_losses: Mapping[str, float]) -> EvalLimits:
    """Return the limits of a trial. base_losses: the base model's loss on each set that needs it."""
    most = {}
    for name, limit in config.eval_limits.items():
        above = math.inf if limit.above_base is None else base_losses[name] + limit.above_base
        most[name] = min(above, math.inf if limit.at_most is None else limit.at_most)
    return EvalLimits(most)


def needs_base(config: DataConfig) -> bool:
    """Return whether a limit follows the base model's loss."""
    return any(limit.above_base is not None for limit in config.eval_limits.values())
