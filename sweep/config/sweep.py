"""Describe one sweep as frozen, validated data.

The sections of TrainConfig (engine/config/trial.py) are the base of every trial. `space` says which
fields vary, and sweep/space/parse.py reads it. The other sections say how many trials run, which
sampler and pruner decide, and where the trials run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, field_validator

from engine.config.data_section import DataConfig
from engine.config.metrics_section import FINALISTS, PREFERENCE_ACCURACY, MetricsConfig, sign_of
from engine.config.optim_section import OptimConfig
from engine.config.parsing import MAX_SECONDS, ListAsTuple, StrictModel, parse
from engine.config.preference_section import PREFERENCE, PreferenceConfig
from engine.config.trial import LoopConfig, LoraConfig, ModelConfig, TrainConfig
from engine.errors import InputError
from engine.planning.cards import find_card
from sweep.config.budget_limits import MAX_TRIALS, BudgetConfig
from sweep.config.pruner_options import PRUNERS, NoPrunerConfig, PrunerConfig, SuccessiveHalvingConfig
from sweep.config.sampler_options import SAMPLERS, FreezeThawConfig, SamplerConfig, TpeConfig
from sweep.config.tracking_options import TrackingConfig
from sweep.space.parse import flattened
from sweep.trials.objectives import EVAL_LOSS, MEASURES
from sweep.trials.selection import Rule

MAX_SLOTS = 100_000
ONE_OBJECTIVE = UNLIMITED = ("cmaes", "freeze_thaw")


def _auto_or_at_least(minimum: int) -> PlainValidator:
    def check(value: Any) -> Any:
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= MAX_SLOTS):
            raise ValueError(f"must be auto, or a whole number from {minimum} to {MAX_SLOTS:,}")
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
MAX_FINAL_SEEDS, NUM_FINALISTS = 8, 2


class SweepSection(StrictModel):
    """Set the name, length and place of the sweep."""

    name: str = Field(
        "sweep", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100, description="letters, digits, dot, dash, underscore"
    )
    num_trials: Annotated[int, Field(ge=1, le=MAX_TRIALS)] = 16
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    output_dir: str = Field("sweeps", min_length=1, description="folder in which the sweep folder is created")
    budget: BudgetConfig = BudgetConfig()
    warm_start: Annotated[tuple[str, ...], ListAsTuple] = Field((), description="folders of earlier sweeps to learn from")
    first_trials: Annotated[tuple[dict[str, Any], ...], ListAsTuple] = Field(
        (), description="points of the space to try first; fields that a point lacks are completed"
    )
    prior: Literal["auto"] | bool = Field(
        "auto", description="true: begin with points that are known to be good for such models; auto: if the sampler can use it"
    )
    objectives: Annotated[tuple[str, ...], ListAsTuple] = Field((EVAL_LOSS,), description="measures that are optimised together")
    choose_within: Annotated[float, Field(ge=0.0)] = Field(
        0.0,
        description="nats of eval_loss, or units of the metric, that the best adapter may lose to be better in the others",
    )
    tie_within: Annotated[float, Field(ge=0.0)] = Field(
        0.005,
        description="nats of eval_loss that the best adapter may lose to be smaller, if the evaluation samples cannot tell it "
        "apart from the lowest; 0: the lowest loss wins",
    )
    final_seeds: Annotated[int, Field(ge=0, le=MAX_FINAL_SEEDS)] = Field(
        0, description="seeds with which the best two trials are trained in all, to see what a seed changes; 0 or 1: no more"
    )
    only_most_demanding: bool = Field(
        False, description="true: try nothing but the point of the space that is predicted to need most memory"
    )
    num_examples: Annotated[int, Field(ge=0, le=32)] = Field(
        4, description="evaluation samples that base model and best adapter answer at the end, for people to read; 0: none"
    )


class ClusterConfig(StrictModel):
    """Set where trials run: a slot holds one trial at a time.

    A slot is one GPU, or cpus_per_trial cores if there is no GPU.
    """

    num_gpus: AutoInt = Field("auto", description="GPUs to use; auto: all that are visible")
    num_cpu_slots: AutoPositive = Field("auto", description="number of slots without GPUs; auto: cores / cpus_per_trial")
    cpus_per_trial: Annotated[int, Field(ge=1, le=MAX_SLOTS)] = 1
    card: AutoCard = Field("auto", description="card whose memory and speed are predicted; auto: the card found")
    calibrate: bool = Field(
        True, description="measure a card that is new to a node, in about a minute before its first trial, for predictions"
    )
    max_concurrent: AutoPositive = Field("auto", description="most trials at once; auto: one per slot")
    address: str | None = Field(None, description="existing Ray cluster to join; null: start Ray on this machine")
    wait_s: Annotated[float, Field(ge=0.0, le=MAX_SECONDS)] = Field(
        0.0, description="seconds to wait until an existing cluster has num_gpus"
    )
    max_retries: Annotated[int, Field(ge=0, le=MAX_TRIALS)] = Field(
        2, description="times a trial continues after its worker died without a new report"
    )
    report_timeout_s: Annotated[float, Field(gt=0.0, le=MAX_SECONDS)] | None = Field(
        21_600.0,
        description="seconds without a report, after which the driver kills a trial's worker as hung; null: no limit",
    )


class SweepConfig(StrictModel):
    """Describe one whole sweep."""

    model: ModelConfig
    data: DataConfig
    lora: LoraConfig = LoraConfig()
    optim: OptimConfig = OptimConfig()
    train: LoopConfig
    metrics: MetricsConfig = MetricsConfig()
    preference: PreferenceConfig = PreferenceConfig()
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
        """Return the pruner that the sweep uses.

        It is none with several objectives, because Optuna has no pruner for them, and for a sampler
        that pauses trials itself.
        """
        return NoPrunerConfig() if len(self.sweep.objectives) > 1 or self.pauses_trials else self.pruner

    @property
    def pauses_trials(self) -> bool:
        """Return whether the sampler decides at each rung which trial goes on."""
        return isinstance(self.sampler, FreezeThawConfig)

    @property
    def effective_budget(self) -> BudgetConfig:
        """Return the limits that the sweep has. A sampler that pauses trials always has some tokens to plan with."""
        budget = self.sweep.budget
        if budget.full_trials is not None or not self.pauses_trials:
            return budget
        least = min(2.0, self.sweep.num_trials)
        return budget.model_copy(update={"full_trials": max(self.sweep.num_trials / 4, least)})

    @property
    def most_tokens(self) -> int:
        """Return the tokens that all trials together see at most, prompts included."""
        most, limit = self.sweep.num_trials, self.effective_budget.full_trials
        return round((most if limit is None else min(limit, most)) * self.train.max_tokens)

    @property
    def chosen_by(self) -> str:
        """Return the objective that decides which trial wins: the first that is eval_loss or a metric."""
        return next(name for name in self.sweep.objectives if name in self.deciding)

    @property
    def deciding(self) -> tuple[str, ...]:
        """Return the objectives that may decide: eval_loss, preference_accuracy if pairs are learnt, and the metrics."""
        pairs = (PREFERENCE_ACCURACY,) if self.data.format == PREFERENCE else ()
        return (EVAL_LOSS, *pairs, *self.metrics.names)

    @property
    def rule(self) -> Rule:
        """Return the rule by which the best adapter is chosen."""
        section, name = self.sweep, self.chosen_by
        sign = sign_of(self.metrics.model_dump(), name)
        within, limited = (section.choose_within, section.tie_within), bool(self.data.eval_limits)
        return Rule(section.objectives, *within, chosen_by=name, sign=sign, is_limited=limited)

    def base(self) -> TrainConfig:
        """Return the config that every trial starts from, before its sampled values are applied. Raises InputError."""
        metrics = parse(MetricsConfig, {**self.metrics.model_dump(), "choose_by": self.chosen_by}, "metrics")
        sections = {name: getattr(self, name) for name in ("model", "data", "lora", "optim", "train", "preference")}
        return parse(TrainConfig, {**sections, "metrics": metrics})


def parse_sweep_config(data: Any) -> SweepConfig:
    """Validate plain data. Raises InputError."""
    config = parse(SweepConfig, data)
    _check_objectives(config)
    config.base()
    if config.sampler.name in ONE_OBJECTIVE and len(config.sweep.objectives) > 1:
        allowed = "takes one objective; with several in sweep.objectives use sampler=tpe, gp, nsga2, random or grid"
        raise InputError("sampler.name", config.sampler.name, allowed)
    if config.sweep.choose_within and len(config.sweep.objectives) == 1:
        allowed = f"must be 0 if {config.chosen_by} is the only objective"
        raise InputError("sweep.choose_within", config.sweep.choose_within, allowed)
    varied = {path for key, leaf in config.space.items() for path, _ in flattened(key, leaf)}
    if config.sweep.final_seeds > 1 and any(path.startswith("train.seed.") for path in varied):
        raise InputError("sweep.final_seeds", config.sweep.final_seeds, "must be 0 if the space varies train.seed")
    if config.preference.eval_beta is None and any(path.startswith("preference.beta.") for path in varied):
        allowed = "must be a number, such as 0.1, if the space varies preference.beta: losses of different betas do not compare"
        raise InputError("preference.eval_beta", None, allowed)
    _check_first_report(config)
    return config


def _check_objectives(config: SweepConfig) -> None:
    """Raise InputError for objectives that nothing measures, or that the sampler or the budget cannot take."""
    names, known = config.sweep.objectives, dict.fromkeys((*MEASURES, *config.deciding))
    if len(set(names)) < len(names) or not set(names) <= set(known) or set(config.deciding).isdisjoint(names):
        allowed = f"must hold eval_loss or a metric, and may hold others of these, each once: {', '.join(known)}"
        raise InputError("sweep.objectives", list(names), f"{allowed}; metrics are named in the section metrics")
    chosen_by, given = config.chosen_by, config.metrics.choose_by
    if given not in (EVAL_LOSS, chosen_by):
        raise InputError("metrics.choose_by", given, f"a sweep takes it from sweep.objectives, whose first is {chosen_by}")
    if config.metrics.at == FINALISTS and not set(config.metrics.names).isdisjoint(names):
        raise InputError("metrics.at", FINALISTS, "must be last, every or rungs if a metric is in sweep.objectives")
    if chosen_by != EVAL_LOSS and config.pauses_trials:
        others = "sampler=tpe, gp, nsga2, cmaes, random or grid"
        allowed = f"predicts curves of eval_loss; with {chosen_by} in sweep.objectives use {others}"
        raise InputError("sampler.name", config.sampler.name, allowed)
    if config.data.eval_limits and config.sampler.name in UNLIMITED:
        allowed = "does not learn from data.eval_limits; use sampler=tpe, gp or nsga2, or random or grid, which learn nothing"
        raise InputError("sampler.name", config.sampler.name, allowed)
    if chosen_by == EVAL_LOSS and config.sweep.budget.target_metric is not None:
        allowed = "needs a metric in sweep.objectives; of eval_loss it is sweep.budget.target_loss"
        raise InputError("sweep.budget.target_metric", config.sweep.budget.target_metric, allowed)


def _check_first_report(config: SweepConfig) -> None:
    """Raise InputError for a budget of tokens that ends before any trial can report, so that none could win."""
    grid, wanted = config.train.report_grid(), config.sweep.budget.full_trials
    if wanted is not None and round(wanted * grid[-1]) < grid[0]:
        least = math.ceil(grid[0] / grid[-1] * 1e4) / 1e4
        allowed = f"must be at least {least:g}, because a trial's first report comes after {grid[0]:,} of its {grid[-1]:,} tokens"
        raise InputError("sweep.budget.full_trials", wanted, allowed)


def _pick(models: Mapping[str, type[StrictModel]], value: Any, where: str) -> Any:
    """Choose the section's model by its `name`, so that an error names only this model's keys."""
    if not isinstance(value, Mapping):
        return value
    name = value.get("name")
    if not isinstance(name, str) or name not in models:
        raise InputError(f"{where}.name", name, f"must be one of {', '.join(models)}")
    return parse(models[name], dict(value), where)
