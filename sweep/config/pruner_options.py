"""Define the pruners that a sweep can name, with their options."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from engine.config.parsing import StrictModel
from engine.config.trial import MAX_REPORTS

Rung = Annotated[int, Field(ge=1, le=MAX_REPORTS)]
Rungs = Annotated[int, Field(ge=0, le=MAX_REPORTS)]
Factor = Annotated[int, Field(ge=2, le=MAX_REPORTS)]


class SuccessiveHalvingConfig(StrictModel):
    """Let the best 1/reduction_factor of the trials continue at each level.

    Level k, from 0, is rung min_rung * reduction_factor^(min_early_stopping_rate + k). This is
    asynchronous successive halving (Li et al., arXiv:1810.05934).
    """

    name: Literal["successive_halving"] = "successive_halving"
    min_rung: Rung = 1
    reduction_factor: Factor = 2
    min_early_stopping_rate: Annotated[int, Field(ge=0, le=64)] = 0


class HyperbandConfig(StrictModel):
    """Run brackets of successive halving with different first rungs.

    The source is Li et al., arXiv:1603.06560.
    """

    name: Literal["hyperband"] = "hyperband"
    min_rung: Rung = 1
    reduction_factor: Factor = 2


class MedianConfig(StrictModel):
    """Stop a trial that is worse than the median of complete trials at the same rung."""

    name: Literal["median"] = "median"
    num_startup_trials: Annotated[int, Field(ge=0, le=1_000_000)] = 4
    num_warmup_rungs: Rungs = 0


class PatientConfig(StrictModel):
    """Stop a trial whose own eval_loss has not improved by min_delta for `patience` rungs.

    `inner` must agree, unless it is none.
    """

    name: Literal["patient"] = "patient"
    patience: Rungs = 2
    min_delta: Annotated[float, Field(ge=0.0)] = 0.0
    inner: Literal["none", "median", "successive_halving"] = Field("none", description="none: patience alone decides")


class NoPrunerConfig(StrictModel):
    """Let every trial run to its end."""

    name: Literal["none"] = "none"


PrunerConfig = SuccessiveHalvingConfig | HyperbandConfig | MedianConfig | PatientConfig | NoPrunerConfig
PRUNERS = {model.model_fields["name"].default: model for model in get_args(PrunerConfig)}
