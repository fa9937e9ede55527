"""Build Optuna's samplers from their config, and prepare the trials that a sampler sees."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy
import optuna
from optuna.trial import FrozenTrial, TrialState

from engine.errors import InputError
from sweep.config.sampler_options import CmaEsConfig, GpConfig, Nsga2Config, SamplerConfig, TpeConfig

MEMORY = "memory_gib"  # a trial's constraint: GiB that it needs above what the card has
LIMITS = "eval_limits_nats"  # another: nats by which its losses are above data.eval_limits


def make_sampler(config: SamplerConfig, seed: int) -> optuna.samplers.BaseSampler:
    """Return the sampler that the config names."""
    return SAMPLER_MAKERS[config.name](config, seed)


def _tpe(config: TpeConfig, seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.TPESampler(
        n_startup_trials=config.num_startup_trials,
        n_ei_candidates=config.num_ei_candidates,
        multivariate=config.multivariate,
        group=config.multivariate,
        constant_liar=True,
        seed=seed,
    )


def _cmaes(config: CmaEsConfig, seed: int) -> optuna.samplers.BaseSampler:
    if importlib.util.find_spec("cmaes") is None:
        raise InputError("sampler.name", "cmaes", "needs the package cmaes (pip install cmaes)")
    return optuna.samplers.CmaEsSampler(
        n_startup_trials=config.num_startup_trials,
        popsize=config.population_size,
        seed=seed,
        warn_independent_sampling=False,
        consider_pruned_trials=True,
    )


def _gp(config: GpConfig, seed: int) -> optuna.samplers.BaseSampler:
    if importlib.util.find_spec("torch") is None:
        raise InputError("sampler.name", "gp", "needs the package torch on the driver")
    return optuna.samplers.GPSampler(n_startup_trials=config.num_startup_trials, seed=seed, warn_independent_sampling=False)


def _nsga2(config: Nsga2Config, seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.NSGAIISampler(population_size=config.population_size, seed=seed)


def _random(config: SamplerConfig, seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


SAMPLER_MAKERS: dict[str, Callable[[Any, int], optuna.samplers.BaseSampler]] = {
    "tpe": _tpe,
    "random": _random,
    "grid": _random,  # the study walks the points; the sampler only breaks ties
    "cmaes": _cmaes,
    "gp": _gp,
    "nsga2": _nsga2,
    "freeze_thaw": _random,  # sweep.curves chooses; the study enters what it chose
}
"""SAMPLER_MAKERS maps the name in a config to its sampler. Add a new sampler here."""


def proposal_seed(seed: int, number: int, stream: int = 0) -> int:
    """Return the seed of the proposal for trial `number`, independent of every other proposal's.

    A sampler that continued with its own random state would propose differently after a resume,
    which cannot restore that state.
    """
    return int(numpy.random.SeedSequence((seed, number, stream)).generate_state(1)[0])


def as_seen(config: SamplerConfig, trials: list[FrozenTrial], num_objectives: int) -> list[FrozenTrial]:
    """Return the study's trials in the form in which this sampler learns from their constraints.

    TPE reads the constraints of complete and pruned trials, as they are in the journal. CMA-ES, random
    and grid read none. The Gaussian process reads those of complete trials only, and only if all have one.
    For it, a trial that did not fit becomes complete, with the worst value.
    """
    if not isinstance(config, GpConfig):
        return trials
    known = [trial.values for trial in trials if trial.state is TrialState.COMPLETE]
    worst = [max(values) for values in zip(*known, strict=True)] or [0.0] * num_objectives
    names = sorted({name for trial in trials for name in trial.constraints})
    constrained = names if any(map(_is_violated, trials)) else []
    return [
        _complete(trial, worst, constrained) if trial.state is TrialState.COMPLETE or _is_violated(trial) else trial
        for trial in trials
    ]


def known_constraints(excess_gib: float | None, excess_nats: float | None) -> dict[str, float]:
    """Return the constraints of a trial by name, as far as they are known."""
    return {name: value for name, value in ((MEMORY, excess_gib), (LIMITS, excess_nats)) if value is not None}


def is_feasible(trial: FrozenTrial) -> bool:
    """Return whether the trial violates no constraint, as far as known."""
    return all(value <= 0.0 for value in trial.constraints.values())


def _is_violated(trial: FrozenTrial) -> bool:
    return not is_feasible(trial)


def _complete(trial: FrozenTrial, worst: list[float], constrained: list[str]) -> FrozenTrial:
    return optuna.trial.create_trial(
        state=TrialState.COMPLETE,
        values=trial.values if trial.state is TrialState.COMPLETE else worst,
        params=trial.params,
        distributions=trial.distributions,
        constraints={name: trial.constraints.get(name, 0.0) for name in constrained} or None,
    )
