"""Optuna samplers and pruners by name, built from their config in one visible step, and what a sampler gets to see."""

from __future__ import annotations

import importlib.util

import numpy
import optuna
from optuna.trial import FrozenTrial, TrialState

from engine.errors import InputError
from sweep.config.sampler_options import CmaEsConfig, GpConfig, Nsga2Config, SamplerConfig, TpeConfig

MEMORY = "memory_gib"  # the one constraint of a trial: GiB above what the card has, if positive


def make_sampler(config: SamplerConfig, seed: int) -> optuna.samplers.BaseSampler:
    """The sampler that proposes. Grid has none of its own: the study walks the points; random only breaks ties."""
    samplers = optuna.samplers
    if isinstance(config, TpeConfig):
        return samplers.TPESampler(
            n_startup_trials=config.num_startup_trials,
            n_ei_candidates=config.num_ei_candidates,
            multivariate=config.multivariate,
            group=config.multivariate,
            constant_liar=True,
            seed=seed,
        )
    if isinstance(config, CmaEsConfig):
        if importlib.util.find_spec("cmaes") is None:
            raise InputError("sampler.name", "cmaes", "needs the package cmaes (pip install cmaes)")
        return samplers.CmaEsSampler(
            n_startup_trials=config.num_startup_trials,
            popsize=config.population_size,
            seed=seed,
            warn_independent_sampling=False,
            consider_pruned_trials=True,
        )
    if isinstance(config, Nsga2Config):
        return samplers.NSGAIISampler(population_size=config.population_size, seed=seed)
    if isinstance(config, GpConfig):
        if importlib.util.find_spec("torch") is None:
            raise InputError("sampler.name", "gp", "needs the package torch on the driver")
        return samplers.GPSampler(n_startup_trials=config.num_startup_trials, seed=seed, warn_independent_sampling=False)
    return samplers.RandomSampler(seed=seed)


def proposal_seed(seed: int, number: int, stream: int = 0) -> int:
    """Seed of the proposal of trial `number` in a sweep with this seed, independent of every other's. A sampler that went on with
    its own random state would propose otherwise after a resume, which cannot bring that state back."""
    return int(numpy.random.SeedSequence((seed, number, stream)).generate_state(1)[0])


def as_seen(config: SamplerConfig, trials: list[FrozenTrial], num_objectives: int) -> list[FrozenTrial]:
    """The study's trials in the form in which this sampler learns from their constraints.

    TPE reads those of pruned trials, as they are in the journal; CMA-ES, random and grid read none. The Gaussian process reads
    those of complete trials only, and only where all have one: to it, what did not fit is complete, with the worst value.
    """
    if not isinstance(config, GpConfig):
        return trials
    known = [trial.values for trial in trials if trial.state is TrialState.COMPLETE]
    worst = [max(values) for values in zip(*known, strict=True)] or [0.0] * num_objectives
    constrained = any(map(_is_violated, trials))
    return [
        _complete(trial, worst, constrained) if trial.state is TrialState.COMPLETE or _is_violated(trial) else trial
        for trial in trials
    ]


def is_feasible(trial: FrozenTrial) -> bool:
    """Whether it violates no constraint, as far as known."""
    return all(value <= 0.0 for value in trial.constraints.values())


def _is_violated(trial: FrozenTrial) -> bool:
    return not is_feasible(trial)


def _complete(trial: FrozenTrial, worst: list[float], constrained: bool) -> FrozenTrial:
    return optuna.trial.create_trial(
        state=TrialState.COMPLETE,
        values=trial.values if trial.state is TrialState.COMPLETE else worst,
        params=trial.params,
        distributions=trial.distributions,
        constraints={MEMORY: trial.constraints.get(MEMORY, 0.0)} if constrained else None,
    )
