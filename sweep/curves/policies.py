"""Make the policy of a sweep with freeze and thaw."""

from __future__ import annotations

from collections.abc import Sequence

from sweep.config.sampler_options import FreezeThawConfig
from sweep.curves.promotion import BestFirst
from sweep.curves.situation import Policy
from sweep.space.space import Space


def make_policy(config: FreezeThawConfig, space: Space, grid: Sequence[int], seed: int) -> Policy:
    """Return the policy. grid: tokens seen at each rung, ascending. seed: sweep.seed."""
    return BestFirst(grid)
