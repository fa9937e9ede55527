"""Define the pruners that a sweep can name, with their options."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from engine.config.parsing import PositiveInt, StrictModel


class SuccessiveHalvingConfig(StrictModel):
    """Let the best 1/reduction_factor of the trials continue at each level.

    Level k, from 0, is rung min_rung * reduction_factor^(min_early_stopping_rate + k). This is
    asynchronous successive halving (Li et al., arXiv:1810.05934).
    """

    name: Literal["successive_halving"] = "successive_halving"
    min_rung: PositiveInt = 1
    reduction_factor: Annotated[int, Field(ge=2)] = 2
    min_early_stopping_rate: Annotated[int, Field(ge=0)] = 0


class HyperbandConfig(StrictModel):
    """Run brackets of successive halving with different first rungs.

    The source is Li et al., arXiv:1603.06560.
    """

    name: Literal["hyperband"] = "hyperband"
    min_rung: PositiveInt = 1
    reduction_factor: Annotated[int, Field(ge=2)] = 2


class MedianConfig(StrictModel):
    """Stop a trial that is worse than the median of complete trials at the same rung."""

    name: Literal["median"] = "median"
    num_startup_trials: Annotated[int, Field(ge=0)] = 4
    num_warmup_rungs: Annotated[int, Field(ge=0)] = 0


class PatientConfig(StrictModel):
    """Stop a trial whose own eval_loss has not improved by min_delta for `patience` rungs.

    `inner` must agree, unless it is none.
    """

    name: Literal["patient"] = "patient"
    patience: Annotated[int, Field(ge=0)] = 2
    min_delta: Annotated[float, Field(ge=0.0)] = 0.0
    inner: Literal["none", "median", "successive_halving"] = Field("none", description="none: patience alone decides")


class NoPrunerConfig(StrictModel):
    """Let every trial run to its end."""

    name: Literal["none"] = "none"


PrunerConfig = SuccessiveHalvingConfig | HyperbandConfig | MedianConfig | PatientConfig | NoPrunerConfig
PRUNERS = {model.model_fields["name"].default: model for model in get_args(PrunerConfig)}
