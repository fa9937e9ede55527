"""The frozen, validated description of one sweep. No torch, no ray, no optuna.

The sections of `engine.config.TrainConfig` sit at the top level as the base of every trial; `space` says what varies
(sweep/space_parse.py reads it); the rest says how many trials, who proposes, who judges and where they run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, field_validator

from engine.cards import card as find_card
from engine.config import (
    DataConfig,
    LoopConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    PositiveInt,
    StrictModel,
    TrainConfig,
    parse,
)
from engine.errors import InputError


def _auto_or_at_least(minimum: int) -> PlainValidator:
    def check(value: Any) -> Any:
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < minimum):
            raise ValueError(f"must be auto, or a whole number from {minimum}")
        return value

    return PlainValidator(check)


def _auto_or_card(value: Any) -> Any:
    if value != "auto":
        try:
            find_card(str(value))
        except InputError as error:
            raise ValueError(f"must be auto, or a card's name: {error.allowed}") from None
    return value


AutoInt = Annotated[int | Literal["auto"], _auto_or_at_least(0)]
AutoPositive = Annotated[int | Literal["auto"], _auto_or_at_least(1)]
AutoCard = Annotated[str, PlainValidator(_auto_or_card)]


class SweepSection(StrictModel):
    """Name, length and place of the sweep."""

    name: str = Field(
        "sweep", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100, description="letters, digits, dot, dash, underscore"
    )
    num_trials: PositiveInt = 16
    seed: Annotated[int, Field(ge=0)] = 0
    output_dir: str = Field("sweeps", min_length=1, description="the sweep folder is created in it")


class TpeConfig(StrictModel):
    """Tree-structured Parzen estimator (Bergstra et al., 2011)."""

    name: Literal["tpe"] = "tpe"
    num_startup_trials: PositiveInt = Field(5, description="random trials before the model speaks")
    num_ei_candidates: PositiveInt = 24
    multivariate: bool = Field(True, description="model the parameters jointly")


class RandomConfig(StrictModel):
    """Independent draws."""

    name: Literal["random"] = "random"


class GridConfig(StrictModel):
    """Every point of the space once, in an order shuffled by sweep.seed."""

    name: Literal["grid"] = "grid"


class CmaEsConfig(StrictModel):
    """CMA-ES (Hansen, 2001) over the numeric parameters; choices are drawn at random."""

    name: Literal["cmaes"] = "cmaes"
    num_startup_trials: PositiveInt = 5
    population_size: Annotated[int, Field(ge=2)] | None = None


class GpConfig(StrictModel):
    """Gaussian process with expected improvement. Optuna fits it with torch, so the driver imports torch for this one."""

    name: Literal["gp"] = "gp"
    num_startup_trials: PositiveInt = 5


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


class NoPruner(StrictModel):
    """Every trial runs to the end."""

    name: Literal["none"] = "none"


SAMPLERS = {model.model_fields["name"].default: model for model in (TpeConfig, RandomConfig, GridConfig, CmaEsConfig, GpConfig)}
PRUNERS = {
    model.model_fields["name"].default: model
    for model in (SuccessiveHalvingConfig, HyperbandConfig, MedianConfig, PatientConfig, NoPruner)
}
SamplerConfig = TpeConfig | RandomConfig | GridConfig | CmaEsConfig | GpConfig
PrunerConfig = SuccessiveHalvingConfig | HyperbandConfig | MedianConfig | PatientConfig | NoPruner


class ClusterConfig(StrictModel):
    """Slots: one trial each. A slot is one GPU, or cpus_per_trial cores where there is no GPU."""

    num_gpus: AutoInt = Field("auto", description="auto: all that are visible")
    num_cpu_slots: AutoPositive = Field("auto", description="without GPUs; auto: cores / cpus_per_trial")
    cpus_per_trial: PositiveInt = 1
    card: AutoCard = Field("auto", description="whose memory and speed are predicted; auto: the card found")
    max_concurrent: AutoPositive = Field("auto", description="auto: as many trials as slots")
    address: str | None = Field(None, description="an existing Ray cluster; none: one of our own on this machine")
    max_retries: Annotated[int, Field(ge=0)] = Field(2, description="times a trial is resumed after its worker process died")


class TrackingConfig(StrictModel):
    """Where the projection of the sweep goes."""

    name: Literal["mlflow", "none"] = "mlflow"
    uri: str | None = Field(None, description="none: sqlite:///<output_dir>/mlflow.db")

    @property
    def public_uri(self) -> str | None:
        """Without the user and password that may stand in it."""
        return None if self.uri is None else re.sub(r"//[^/\s]*@", "//", self.uri)


class SweepConfig(StrictModel):
    """One sweep, whole."""

    model: ModelConfig
    data: DataConfig
    lora: LoraConfig = LoraConfig()
    optim: OptimConfig = OptimConfig()
    train: LoopConfig
    space: dict[str, Any] = Field(default_factory=dict)
    sweep: SweepSection = SweepSection()
    sampler: SamplerConfig = TpeConfig()
    pruner: PrunerConfig = SuccessiveHalvingConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("sampler", mode="before")
    @classmethod
    def _pick_sampler(cls, value: Any) -> Any:
        return _pick(SAMPLERS, value, "sampler")

    @field_validator("pruner", mode="before")
    @classmethod
    def _pick_pruner(cls, value: Any) -> Any:
        return _pick(PRUNERS, value, "pruner")

    def base(self) -> TrainConfig:
        """The config every trial starts from, before its sampled values are put in."""
        return TrainConfig(model=self.model, data=self.data, lora=self.lora, optim=self.optim, train=self.train)


def parse_sweep_config(data: Any) -> SweepConfig:
    """Validate plain data; raises InputError."""
    config = parse(SweepConfig, data)
    config.base()
    return config


def _pick(models: Mapping[str, type[StrictModel]], value: Any, where: str) -> Any:
    """Choose the section's model by its `name`, so that an error names the keys of that one and not of all of them."""
    if not isinstance(value, Mapping):
        return value
    name = value.get("name")
    if not isinstance(name, str) or name not in models:
        raise InputError(f"{where}.name", name, f"must be one of {', '.join(models)}")
    return parse(models[name], dict(value), where)
