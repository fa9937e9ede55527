"""The pruners a sweep can name, with their options."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from engine.config.parsing import PositiveInt, StrictModel


class SuccessiveHalvingConfig(StrictModel):
    """Asynchronous successive halving (Li et al., arXiv:1810.05934): judges at rungs min_rung * reduction_factor^k."""

    name: Literal["successive_halving"] = "successive_halving"
    min_rung: PositiveInt = 1
    reduction_factor: Annotated[int, Field(ge=2)] = 2
    min_early_stopping_rate: Annotated[int, Field(ge=0)] = 0


class HyperbandConfig(StrictModel):
    """Brackets of successive halving with different first rungs (Li et al., arXiv:1603.06560)."""

    name: Literal["hyperband"] = "hyperband"
    min_rung: PositiveInt = 1
    reduction_factor: Annotated[int, Field(ge=2)] = 2


class MedianConfig(StrictModel):
    """Stops a trial worse than the median of finished trials at the same rung."""

    name: Literal["median"] = "median"
    num_startup_trials: Annotated[int, Field(ge=0)] = 4
    num_warmup_rungs: Annotated[int, Field(ge=0)] = 0


class PatientConfig(StrictModel):
    """Stops a trial whose own eval_loss has not improved by min_delta for `patience` rungs, if `inner` agrees."""

    name: Literal["patient"] = "patient"
    patience: Annotated[int, Field(ge=0)] = 2
    min_delta: Annotated[float, Field(ge=0.0)] = 0.0
    inner: Literal["none", "median", "successive_halving"] = Field("none", description="none: patience alone decides")


class NoPrunerConfig(StrictModel):
    """Every trial runs to the end."""

    name: Literal["none"] = "none"


PrunerConfig = SuccessiveHalvingConfig | HyperbandConfig | MedianConfig | PatientConfig | NoPrunerConfig
PRUNERS = {model.model_fields["name"].default: model for model in get_args(PrunerConfig)}
