"""The frozen, validated description of one sweep. No torch, no ray, no optuna.

The sections of `engine.config.TrainConfig` sit at the top level as the base of every trial; `space` says what varies
(sweep/space_parse.py reads it); the rest says how many trials, who proposes, who judges and where they run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, field_validator

from engine.config.parsing import ListAsTuple, PositiveInt, StrictModel, parse
from engine.config.trial import DataConfig, LoopConfig, LoraConfig, ModelConfig, OptimConfig, TrainConfig
from engine.errors import InputError
from engine.planning.cards import find_card
from sweep.config.pruner_options import PRUNERS, NoPrunerConfig, PrunerConfig, SuccessiveHalvingConfig
from sweep.config.sampler_options import SAMPLERS, SamplerConfig, TpeConfig
from sweep.trials.objectives import EVAL_LOSS, MEASURES


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
PositiveFloat = Annotated[float, Field(gt=0.0)]


class BudgetConfig(StrictModel):
    """What a sweep may spend beside its trials. Once spent, no trial starts and running ones stop at their next report."""

    gpu_hours: PositiveFloat | None = Field(None, description="hours for which slots are held, all together; none: no limit")
    wall_clock_hours: PositiveFloat | None = Field(None, description="hours for which the sweep runs; none: no limit")
    target_loss: PositiveFloat | None = Field(None, description="an eval_loss that is good enough; none: there is no such")


class SweepSection(StrictModel):
    """Name, length and place of the sweep."""

    name: str = Field(
        "sweep", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100, description="letters, digits, dot, dash, underscore"
    )
    num_trials: PositiveInt = 16
    seed: Annotated[int, Field(ge=0)] = 0
    output_dir: str = Field("sweeps", min_length=1, description="the sweep folder is created in it")
    budget: BudgetConfig = BudgetConfig()
    warm_start: Annotated[tuple[str, ...], ListAsTuple] = Field((), description="folders of earlier sweeps to learn from")
    objectives: Annotated[tuple[str, ...], ListAsTuple] = Field((EVAL_LOSS,), description="what is minimised, all at once")
    choose_within: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="nats of eval_loss that the best adapter may cost to be better in the other objectives"
    )

    num_examples: Annotated[int, Field(ge=0, le=32)] = Field(
        4, description="evaluation samples that base model and best adapter answer at the end, for people to read; 0: none"
    )

    @field_validator("objectives")
    @classmethod
    def _known_objectives(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if EVAL_LOSS not in names or len(set(names)) < len(names) or not set(names) <= set(MEASURES):
            raise ValueError(f"must be eval_loss, alone or with others, each once: {', '.join(MEASURES)}")
        return names


class ClusterConfig(StrictModel):
    """Slots: one trial each. A slot is one GPU, or cpus_per_trial cores where there is no GPU."""

    num_gpus: AutoInt = Field("auto", description="auto: all that are visible")
    num_cpu_slots: AutoPositive = Field("auto", description="without GPUs; auto: cores / cpus_per_trial")
    cpus_per_trial: PositiveInt = 1
    card: AutoCard = Field("auto", description="whose memory and speed are predicted; auto: the card found")
    max_concurrent: AutoPositive = Field("auto", description="auto: as many trials as slots")
    address: str | None = Field(None, description="an existing Ray cluster; none: one of our own on this machine")
    wait_s: Annotated[float, Field(ge=0.0)] = Field(0.0, description="for the nodes of an existing cluster to bring num_gpus")
    max_retries: Annotated[int, Field(ge=0)] = Field(
        2, description="times a trial goes on after its worker died without a new report"
    )
    report_timeout_s: Annotated[float, Field(gt=0.0)] | None = Field(
        21_600.0, description="between two reports of a trial; then its worker is taken to hang, and is killed; none: never"
    )


class TrackingConfig(StrictModel):
    """Where the projection of the sweep goes."""

    name: Literal["mlflow", "none"] = "mlflow"
    uri: str | None = Field(None, description="none: sqlite:///<output_dir>/mlflow.db")
    metrics_port: Annotated[int, Field(ge=0, le=65_535)] | None = Field(
        None, description="of the driver's page for Prometheus; 0: any that is free; none: there is no such page"
    )
    metrics_host: str = Field("127.0.0.1", min_length=1, description="whose readers reach the page: this machine's alone")
    registered_model: str | None = Field(
        "auto",
        pattern=r"^[^/:]+$",
        max_length=200,
        description="text without / and :; the best adapter becomes a version of it; auto: the sweep's name; none: of nothing",
    )

    @field_validator("uri")
    @classmethod
    def _no_password(cls, uri: str | None) -> str | None:
        """It would stand in sweep_config.json, and in every copy of the sweep folder."""
        found = re.search(r"//([^/\s]*)@", uri or "")
        if found and ":" in found[1]:
            shown = re.sub(r"//[^/\s]*@", "//...@", uri)
            allowed = "must hold no password; give it as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
            raise InputError("tracking.uri", shown, f"{allowed} (of a database: in its own password file)")
        return uri

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

    @property
    def effective_pruner(self) -> PrunerConfig:
        """The pruner that is used: none with several objectives, for which Optuna has none."""
        return self.pruner if len(self.sweep.objectives) == 1 else NoPrunerConfig()

    def base(self) -> TrainConfig:
        """The config every trial starts from, before its sampled values are put in."""
        return TrainConfig(model=self.model, data=self.data, lora=self.lora, optim=self.optim, train=self.train)


def parse_sweep_config(data: Any) -> SweepConfig:
    """Validate plain data; raises InputError."""
    config = parse(SweepConfig, data)
    config.base()
    if config.sampler.name == "cmaes" and len(config.sweep.objectives) > 1:
        allowed = "takes one objective; with several in sweep.objectives: tpe, gp, nsga2, random or grid"
        raise InputError("sampler.name", "cmaes", allowed)
    if config.sweep.choose_within and len(config.sweep.objectives) == 1:
        raise InputError("sweep.choose_within", config.sweep.choose_within, "must be 0 with eval_loss as the only objective")
    return config


def _pick(models: Mapping[str, type[StrictModel]], value: Any, where: str) -> Any:
    """Choose the section's model by its `name`, so that an error names the keys of that one and not of all of them."""
    if not isinstance(value, Mapping):
        return value
    name = value.get("name")
    if not isinstance(name, str) or name not in models:
        raise InputError(f"{where}.name", name, f"must be one of {', '.join(models)}")
    return parse(models[name], dict(value), where)


def describe_budget(limits: BudgetConfig) -> str:
    """The limits that are set, for the plan: `4 GPU hours, eval loss 1.2`; empty where none is."""
    parts = [
        f"{limits.gpu_hours:g} GPU hours" if limits.gpu_hours is not None else "",
        f"{limits.wall_clock_hours:g} hours" if limits.wall_clock_hours is not None else "",
        f"an eval loss of {limits.target_loss:g}" if limits.target_loss is not None else "",
    ]
    return ", ".join(filter(None, parts))
