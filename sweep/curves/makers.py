"""Make the policy of a sweep with freeze and thaw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sweep.config.sampler_options import FreezeThawConfig
from sweep.curves.freeze_thaw import FreezeThaw
from sweep.curves.situation import FreezePolicy
from sweep.prior.rate_prior import RatePrior
from sweep.space.space import Space


def make_policy(
    config: FreezeThawConfig, space: Space, base: Mapping[str, Any], grid: Sequence[int], seed: int, rate: RatePrior | None = None
) -> FreezePolicy:
    """Return the policy.

    base: of every trial. grid: tokens seen at each rung, ascending. seed: sweep.seed. rate: what is
    known of the learning rate before the first trial.
    """
    return FreezeThaw(space, base, grid, seed, rate)
