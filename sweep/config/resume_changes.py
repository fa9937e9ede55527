"""Apply the changes that a resume may make to a config.

A resume may change how much the sweep may spend, how its winner is chosen, where it runs and where its metrics are shown. It
may not change the trials themselves, because their losses would no longer compare.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from engine.errors import InputError
from sweep.config.confirmations import CONFIRMED, own_functions
from sweep.config.sweep import SweepConfig, parse_sweep_config

NUM_TRIALS, FULL_TRIALS = "sweep.num_trials", "sweep.budget.full_trials"
# 1: a larger value allows more; -1: a smaller one does
BUDGETS = {
    "sweep.budget.gpu_hours": 1, "sweep.budget.wall_clock_hours": 1, FULL_TRIALS: 1,
    "sweep.budget.target_loss": -1,
}  # fmt: skip
PLACE = (
    "cluster.address", "cluster.num_gpus", "cluster.wait_s", "cluster.card", "cluster.calibrate", "tracking.name",
    "tracking.metrics_port", "tracking.metrics_host", "tracking.tensorboard", "tracking.on_end",
)  # fmt: skip
CHOICE = ("sweep.tie_within", "sweep.final_seeds", "sweep.budget.target_metric")
AMENDABLE = (NUM_TRIALS, *BUDGETS, *CHOICE, *PLACE)


def parse_recorded_config(values: Any) -> SweepConfig:
    """Validate the config of a sweep that began, which may be an older version's. Raises InputError.

    Keys that it lacks mean what that version did: it did not count set-ups of trials.
    """
    sampler = values.get("sampler") if isinstance(values, dict) else None
    if isinstance(sampler, dict) and sampler.get("name") == "freeze_thaw":
        values = {**values, "sampler": {"setup_tokens": 0, **sampler}}
    return parse_sweep_config(values)


def apply_resume_changes(config: SweepConfig, overrides: dict[str, Any]) -> SweepConfig:
    """Return the config with the overrides (dotted path -> value) applied.

    Raises InputError for a field that may not change, and for fewer trials or a smaller budget.
    """
    values, functions = config.model_dump(mode="json"), own_functions(config)
    for key, value in overrides.items():
        if (key in CONFIRMED and value == _at(values, key)) or (key in functions and value == functions[key]):
            continue
        if key not in AMENDABLE:
            raise InputError(key, value, f"cannot be changed on resume; only {', '.join(AMENDABLE)} can")
        *sections, name = key.split(".")
        section = values
        for part in sections:
            section = section[part]
        if not _is_own_check(key, config):
            _check_more(key, section[name], value)
        section[name] = value
    changed = parse_sweep_config(values)
    _check_effective_tokens(changed, config)
    return changed


def refuse_edits(config: SweepConfig, recorded: SweepConfig) -> None:
    """Raise InputError for a field of sweep_config.json that someone edited and no resume may change.

    recorded: the config in the journal.
    """
    for key, value, before in _differences("", config.model_dump(mode="json"), recorded.model_dump(mode="json")):
        if key not in AMENDABLE:
            allowed = f"edited in sweep_config.json: the sweep began with {before!r}; put that back, or start a new sweep"
            raise InputError(key, value, allowed)
        if not _is_own_check(key, recorded):
            _check_more(key, before, value)
    _check_effective_tokens(config, recorded)


def _differences(key: str, now: Any, before: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield dotted path and both values of each leaf that differs. The order of keys counts."""
    if isinstance(now, dict) and isinstance(before, dict) and list(now) == list(before):
        for name in now:
            yield from _differences(f"{key}.{name}" if key else name, now[name], before[name])
    elif json.dumps(now) != json.dumps(before):  # 4.0 makes another range than 4, and true is not 1
        yield key, now, before


def _at(values: dict[str, Any], key: str) -> Any:
    section, name = key.split(".")
    return values[section][name]


def _check_more(key: str, before: Any, wanted: Any) -> None:
    if key == NUM_TRIALS:
        if not isinstance(wanted, int) or wanted < before:
            raise InputError(key, wanted, f"must be at least {before} on resume")
    elif key in BUDGETS and before is not None and isinstance(wanted, int | float) and BUDGETS[key] * (wanted - before) < 0:
        bound = "at least" if BUDGETS[key] > 0 else "at most"
        raise InputError(key, wanted, f"must be {bound} {before:g} on resume, or null for no limit")


def _is_own_check(key: str, config: SweepConfig) -> bool:
    """Return whether _check_effective_tokens judges this field: null is a limit too if the sampler pauses trials."""
    return key == FULL_TRIALS and config.pauses_trials


def _check_effective_tokens(config: SweepConfig, before: SweepConfig) -> None:
    """Refuse fewer tokens than the sweep had. Without a limit of its own, a sampler that pauses trials has one too."""
    least, wanted = before.effective_budget.full_trials, config.effective_budget.full_trials
    if before.pauses_trials and wanted < least:
        allowed = f"must be at least {least:g} on resume; null means a quarter of sweep.num_trials here, {wanted:g}"
        if config.sweep.budget.full_trials is not None:
            allowed = f"must be at least {least:g} on resume"
        raise InputError(FULL_TRIALS, config.sweep.budget.full_trials, allowed)
