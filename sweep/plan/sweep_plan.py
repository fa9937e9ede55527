"""The plan: everything that is settled before anything starts. It is what `dry_run=true` prints. No torch, no ray, no optuna.

The hardware is an argument: whoever has a cluster to join joins it, and says what there is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.config.trial import TrainConfig
from engine.errors import printable
from sweep.cluster.card_kinds import CardKind
from sweep.cluster.slots import Hardware, Slots, local_hardware, plan_slots
from sweep.config.sweep import ClusterConfig, SweepConfig, describe_budget
from sweep.space.parse import parse_space
from sweep.space.space import Space


@dataclass(frozen=True)
class SweepPlan:
    """A checked sweep: config, space and slots fit each other and this machine."""

    config: SweepConfig
    space: Space
    slots: Slots
    kinds: tuple[CardKind, ...] = ()  # of an existing cluster's cards

    @property
    def has_mixed_cards(self) -> bool:
        return len(self.kinds) > 1

    @property
    def num_rungs(self) -> int:
        return len(self.config.train.report_grid())

    def base(self) -> dict[str, Any]:
        """The base of every trial, as plain data."""
        return self.config.base().model_dump(mode="json")

    def probes(self) -> list[TrainConfig]:
        """The base, and one config per choice and end of range: what prepare checks."""
        return self.space.single_changes(self.base())

    def warnings(self) -> list[str]:
        """What is allowed and may mislead, one line each."""
        if "elapsed_s" in self.config.sweep.objectives and self.has_mixed_cards:
            return ["elapsed_s is compared over different cards: a trial is not faster for having had the faster card"]
        return []

    def describe(self) -> str:
        """The plan as text, one fact a line."""
        config, size, budget = self.config, self.space.size(), self.config.train.max_tokens
        grid = ", ".join(f"{tokens:,}" for tokens in config.train.report_grid())
        points = "continuous" if size is None else f"{size:,} points"
        lines = [
            f"sweep      {config.sweep.name}: {config.sweep.num_trials} trials, seed {config.sweep.seed}, "
            f"output in {config.sweep.output_dir}/{config.sweep.name}-<date>-<time>/",
            f"model      {config.model.path} ({config.model.quantization})"
            + (", and its own code is run: model.trust_remote_code" if config.model.trust_remote_code else ""),
            f"data       {config.data.train}",
            f"budget     {budget:,} tokens a trial, at most {config.sweep.num_trials * budget:,} in all"
            + (f"; ends before at {limits}" if (limits := describe_budget(config.sweep.budget)) else ""),
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
            f"space      {len(self.space.dimensions)} dimensions, {points}",
        ]
        width = max((len(dimension.path) for dimension in self.space.dimensions), default=0)
        for dimension in self.space.dimensions:
            when = " and ".join(f"{path} in {', '.join(map(str, names))}" for path, names in dimension.when.items())
            lines.append(f"  {dimension.path:<{width}}  {dimension.describe()}" + (f"  when {when}" if when else ""))
        return "\n".join(map(printable, lines))


def make_sweep_plan(config: SweepConfig, find_hardware: Callable[[ClusterConfig], Hardware] = local_hardware) -> SweepPlan:
    """Check space, grid and hardware; raises InputError. Writes nothing.

    find_hardware: says what there is for this cluster section; asked once space and grid are in order, since it may wait.
    """
    space = parse_space(config.space)
    if config.sampler.name == "grid":
        space.check_walkable()
    space.single_changes(config.base().model_dump(mode="json"))
    found = find_hardware(config.cluster)
    slots = plan_slots(config.cluster, config.train.device, found.num_gpus, found.num_cpus)
    return SweepPlan(config, space, slots, found.kinds if slots.device == "cuda" else ())


def _pruner(config: SweepConfig) -> str:
    off = config.effective_pruner is not config.pruner and config.pruner.name != "none"
    return (
        f"none: {config.pruner.name} is off, Optuna has no pruning of several objectives"
        if off
        else _options(config.effective_pruner.model_dump())
    )


def _options(values: dict[str, Any]) -> str:
    name, options = values["name"], {key: value for key, value in values.items() if key != "name"}
    return f"{name} ({', '.join(f'{key} {value}' for key, value in options.items())})" if options else name
