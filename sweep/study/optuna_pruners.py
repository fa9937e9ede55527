"""Optuna's own pruners, made from a sweep's config."""

from __future__ import annotations

import optuna

from sweep.config.pruner_options import HyperbandConfig, MedianConfig, PatientConfig, PrunerConfig, SuccessiveHalvingConfig


def make_optuna_pruner(config: PrunerConfig, num_rungs: int) -> optuna.pruners.BasePruner:
    """The pruner that judges. Its unit is the rung, from 1 to num_rungs, not the step."""
    pruners = optuna.pruners
    if isinstance(config, SuccessiveHalvingConfig):
        return pruners.SuccessiveHalvingPruner(
            min_resource=config.min_rung,
            reduction_factor=config.reduction_factor,
            min_early_stopping_rate=config.min_early_stopping_rate,
        )
    if isinstance(config, HyperbandConfig):
        return pruners.HyperbandPruner(
            min_resource=config.min_rung, max_resource=num_rungs, reduction_factor=config.reduction_factor
        )
    if isinstance(config, MedianConfig):
        return pruners.MedianPruner(n_startup_trials=config.num_startup_trials, n_warmup_steps=config.num_warmup_rungs)
    if isinstance(config, PatientConfig):
        inner = {"median": MedianConfig, "successive_halving": SuccessiveHalvingConfig}.get(config.inner)
        wrapped = make_optuna_pruner(inner(), num_rungs) if inner else None
        return pruners.PatientPruner(wrapped, patience=config.patience, min_delta=config.min_delta)
    return pruners.NopPruner()
