"""Check a sweep before anything starts, and describe it. `dry_run=true` prints the description.

The hardware is an argument: the caller joins a cluster, if there is one, and says what it has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from engine.config.matmul import Matmul
from engine.config.preference_section import PREFERENCE
from engine.config.trial import TrainConfig
from engine.errors import InputError, printable
from engine.shape.model_shape import ModelShape
from engine.units import counted
from sweep.cluster.card_kinds import CardKind
from sweep.cluster.slots import Hardware, Slots, local_hardware, plan_slots
from sweep.config.budget_limits import describe_budget
from sweep.config.pruner_options import HyperbandConfig
from sweep.config.sweep import ClusterConfig, SweepConfig
from sweep.plan.rungs import check_rungs, least_way
from sweep.prior.beginning import Beginning, make_beginning
from sweep.prior.own_points import read_own_points
from sweep.space.parse import WEIGHT, check_weights, parse_space
from sweep.space.space import Space

TYING = ("lora.target_modules", "lora.start")
TIED = (
    "lora.rank", "lora.rank_pattern", "lora.alpha_pattern", "lora.lora_dropout", "lora.use_dora", "lora.start", "optim.name",
)  # fmt: skip
"""Fields whose values the model's layers may rule out together: experts take plain LoRA alone, a start has a largest
rank, and a pattern's keys must match targets."""


@dataclass(frozen=True)
class SweepPlan:
    """Hold a checked sweep: config, space and slots fit each other and this machine."""

    config: SweepConfig
    space: Space
    slots: Slots
    kinds: tuple[CardKind, ...] = ()  # the kinds of an existing cluster's cards
    beginning: Beginning = field(default_factory=Beginning)  # known once the model's shape is

    @property
    def has_mixed_cards(self) -> bool:
        return len(self.kinds) > 1

    @property
    def num_rungs(self) -> int:
        return len(self.config.train.report_grid())

    def base(self) -> dict[str, Any]:
        """Return the base config of every trial, as plain data."""
        return self.config.base().model_dump(mode="json")

    def probes(self) -> list[TrainConfig]:
        """Return the configs that prepare checks: the base, one per choice and end of range, and pairs that the model ties."""
        base = self.base()
        configs = [*self.space.single_changes(base), *self.space.pair_changes(base, TYING, TIED)]
        for ranks in (d for d in self.space.dimensions if d.path == "lora.rank" and not d.when):
            started = [config.model_dump(mode="json") for config in configs if config.lora.start != "default"]
            configs += [self.space.apply(config, {ranks.path: max(ranks.corners(), key=ranks.value)}) for config in started]
        return list({config.fingerprint(): config for config in configs}.values())

    def on_day(self, day: str | None) -> SweepPlan:
        """Return the plan with the day that chat templates print, on every trial and every resume."""
        data = self.config.data.model_copy(update={"date": day})
        return replace(self, config=self.config.model_copy(update={"data": data}))

    def with_matmul(self, mode: Matmul) -> SweepPlan:
        """Return the plan with this `train.matmul` on every trial and every resume."""
        train = self.config.train.model_copy(update={"matmul": mode.value})
        return replace(self, config=self.config.model_copy(update={"train": train}))

    def within_epochs(self, tokens_per_epoch: int) -> SweepPlan:
        """Return the plan whose trials end after `train.max_epochs`, if that is before `train.max_tokens`.

        Raises InputError if a trial could not reach its rungs then.
        """
        loop = self.config.train.within_epochs(tokens_per_epoch)
        config = self.config.model_copy(update={"train": loop})
        try:
            config.base()
            check_rungs(config, self.space)
        except InputError as error:
            allowed = f"gives {loop.max_tokens:,} tokens a trial, at {tokens_per_epoch:,} a pass, and {error}"
            raise InputError("train.max_epochs", loop.max_epochs, allowed) from None
        return replace(self, config=config)

    def for_model(self, shape: ModelShape | None) -> SweepPlan:
        """Return the plan with the trials that it begins with. shape: None if it is not known."""
        return replace(self, beginning=make_beginning(self.config, self.space, shape))

    def warnings(self) -> list[str]:
        """Return one line for each setting that is allowed but may mislead."""
        lines, section = [], self.config.sweep
        if "elapsed_s" in section.objectives and self.has_mixed_cards:
            lines.append("elapsed_s is compared over different cards: a trial on a faster card only seems faster")
        if len(section.first_trials) > section.num_trials and not section.only_most_demanding:
            points = f"{len(section.first_trials)} points of sweep.first_trials"
            lines.append(f"the sweep ends before all {points} are tried: sweep.num_trials = {section.num_trials}")
        varied = [dimension.path for dimension in self.space.dimensions if WEIGHT.fullmatch(dimension.path)]
        if varied and len(varied) == len(self.config.data.mixture):
            lines.append("the space varies the weight of every source, but only their ratios count: leave one of them out")
        full_trials, num_slots = self.config.effective_budget.full_trials, self.slots.num_slots
        if self.config.pauses_trials and full_trials < num_slots and not section.only_most_demanding:
            tokens = f"{num_slots} slots share the tokens of {counted(full_trials, 'full trial')}"
            lines.append(f"{tokens}, and the best trial takes one slot to its end: some slots will be idle. To use them, raise "
                         f"sweep.{'num_trials' if section.budget.full_trials is None else 'budget.full_trials'}")  # fmt: skip
        return lines

    def pinned(self, params: dict[str, Any]) -> SweepPlan:
        """Return the plan of a sweep that has this point of the space as its base, and no space.

        Rungs are moved apart where a step of that point is longer than the way between them.
        """
        trial = self.space.apply(self.base(), params)
        loop, step = trial.train, trial.longest_step
        if step > min(least_way(loop), loop.max_tokens):
            loop = loop.model_copy(update={"max_tokens": 2 * step, "report_at_tokens": (step, 2 * step)})
        sections = {"model": trial.model, "data": trial.data, "lora": trial.lora, "optim": trial.optim, "train": loop}
        sections["preference"] = trial.preference
        sections["sweep"] = self.config.sweep.model_copy(update={"first_trials": ()})
        return replace(self, config=self.config.model_copy(update={**sections, "space": {}}), space=Space(()))

    def describe(self) -> str:
        """Return the plan as text, one fact a line."""
        config, size = self.config, self.space.size()
        grid = ", ".join(f"{tokens:,}" for tokens in config.train.report_grid())
        points = "continuous" if size is None else counted(size, "point")
        lines = [
            f"sweep      {config.sweep.name}: {counted(config.sweep.num_trials, 'trial')}, seed {config.sweep.seed}, "
            f"output in {config.sweep.output_dir}/{config.sweep.name}-<date>-<time>/",
            f"model      {config.model.path} ({config.model.quantization})"
            + (", and its own code is run: model.trust_remote_code" if config.model.trust_remote_code else ""),
            f"data       {config.data.describe_train()}",
            *([f"evaluation {config.data.describe_eval()}"] if config.data.eval_sets else []),
            *([f"pairs      {config.preference.describe()}"] if config.data.format == PREFERENCE else []),
            f"budget     {config.train.max_tokens:,} tokens a trial{_epochs(config)}, at most {config.most_tokens:,} in all"
            + (f"; ends early at {limits}" if (limits := describe_budget(config.effective_budget)) else ""),
            f"rungs      {self.num_rungs}, at tokens seen: {grid}",
            f"slots      {self.slots.describe()}",
            *([f"cards      {', '.join(kind.describe() for kind in self.kinds)}"] if self.kinds else []),
            f"sampler    {_options(config.sampler.model_dump())}",
            f"pruner     {_pruner(config)}",
            *([f"objectives {', '.join(config.sweep.objectives)}"] if len(config.sweep.objectives) > 1 else []),
            f"tracking   {config.tracking.name}"
            + (
                f" at {config.tracking.public_uri or config.sweep.output_dir + '/mlflow.db'}"
                if config.tracking.name != "none"
                else ""
            ),
            f"space      {counted(len(self.space.dimensions), 'dimension')}, {points}",
        ]
        width = max((len(dimension.path) for dimension in self.space.dimensions), default=0)
        for dimension in self.space.dimensions:
            when = " and ".join(f"{path} in {', '.join(map(str, names))}" for path, names in dimension.when.items())
            lines.append(f"  {dimension.path:<{width}}  {dimension.describe()}" + (f"  when {when}" if when else ""))
        return "\n".join(map(printable, lines))


def _epochs(config: SweepConfig) -> str:
    passes = config.train.max_epochs
    return "" if passes is None else f" or {passes:g} pass{'' if passes == 1 else 'es'}, whichever ends first"


def make_sweep_plan(
    config: SweepConfig, find_hardware: Callable[[ClusterConfig], Hardware] = local_hardware, is_new: bool = True
) -> SweepPlan:
    """Check space, grid and hardware. Raises InputError. Writes nothing.

    find_hardware: returns the hardware for this cluster section. It may wait for nodes, so it is
    called only after space and grid have passed. is_new: False for a sweep that goes on, whose space
    cannot change: it is held to what it began with.
    """
    space = parse_space(config.space)
    if config.sampler.name == "grid":
        space.check_walkable()
    base = config.base().model_dump(mode="json")
    check_weights(space, base)
    space.single_changes(base)
    if is_new:
        space.check_pairs(base)
    read_own_points(config.sweep.first_trials, space, base)
    _check_pruner(config)
    found = find_hardware(config.cluster)
    slots = plan_slots(config.cluster, config.train.device, found.num_gpus, found.num_cpus)
    return SweepPlan(config, space, slots, found.kinds if slots.device == "cuda" else ())


def _check_pruner(config: SweepConfig) -> None:
    """Raise InputError if Hyperband's first rung comes after the last one, so that it has no bracket."""
    pruner, num_rungs = config.effective_pruner, len(config.train.report_grid())
    if isinstance(pruner, HyperbandConfig) and pruner.min_rung > num_rungs:
        raise InputError("pruner.min_rung", pruner.min_rung, f"must be at most {num_rungs}, the number of rungs")


def _pruner(config: SweepConfig) -> str:
    off = config.effective_pruner is not config.pruner and config.pruner.name != "none"
    reason = (
        f"sampler={config.sampler.name} pauses trials instead"
        if config.pauses_trials
        else "Optuna cannot prune with several objectives"
    )
    return f"none: {config.pruner.name} is off, because {reason}" if off else _options(config.effective_pruner.model_dump())


def _options(values: dict[str, Any]) -> str:
    """Return a sampler or pruner with its options, written as a config has them; those that are null are left out."""
    name, options = values["name"], {key: value for key, value in values.items() if key != "name" and value is not None}
    options = {key: str(value).lower() if isinstance(value, bool) else value for key, value in options.items()}
    return f"{name} ({', '.join(f'{key} {value}' for key, value in options.items())})" if options else name
