"""Select the trials of earlier sweeps that enter this one's study as finished trials.

A trial enters if it is a point of this sweep's space. Its params, put into this sweep's base, must
give the config that was trained, field by field. It may therefore come from a smaller, larger or
different space. The fields in sweep/space/unsearchable.py must be equal, because they decide whether
losses compare.

Of a sweep whose samples or base model differ from today's, losses do not compare. Only its best
points are taken, to be tried first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.errors import InputError
from sweep.config.sweep import SweepConfig
from sweep.space.coordinates import OUTSIDE, coordinate, plain
from sweep.space.space import Space, is_active, value_at
from sweep.space.unsearchable import INCOMPARABLE
from sweep.trials.objectives import objective_values
from sweep.trials.record import CONTENDERS, Outcome, TrialRecord

NUM_FIRST_POINTS = 4


@dataclass(frozen=True)
class EarlierTrial:
    """Hold a trial of another sweep, as it enters this one.

    source: where it comes from. params: in this sweep's space. rungs_judged: the pruner's notes of
    it, empty if this sweep's pruner is a different one.
    """

    source: str
    params: dict[str, Any]
    record: TrialRecord
    rungs_judged: dict[str, Any]


def check_comparable(name: str, here: SweepConfig, there: SweepConfig) -> None:
    """Raise InputError if losses of the two sweeps do not compare.

    name: the earlier sweep's folder.
    """
    for path, reason in INCOMPARABLE.items():
        if path in ("train.device", "train.report_at_tokens", "train.num_reports", "preference.eval_beta"):
            continue
        _check_equal(name, path, _at(here.base(), path), _at(there.base(), path), reason)
    betas = [one.base().preference.judged.beta for one in (here, there)]
    _check_equal(name, "preference.eval_beta", *betas, INCOMPARABLE["preference.eval_beta"])
    reason = INCOMPARABLE["train.report_at_tokens"]
    _check_equal(name, "train.report_at_tokens", here.train.report_grid(), there.train.report_grid(), reason)


def changed_part(here: Mapping[str, Any], there: Mapping[str, Any] | None) -> str | None:
    """Return the name of what has changed since the earlier sweep, samples or base model, or None.

    here, there: digests by part (engine/sources/identity.py); `there` is None for a sweep that
    wrote none.
    """
    for part, digest in (there or {}).items():
        if part in here and here[part] != digest:
            return f"{part} samples" if part in ("training", "evaluation") else part
    return None


def best_points(found: Iterable[tuple[str, dict[str, Any], TrialRecord]]) -> list[dict[str, Any]]:
    """Return the params of the trials with the lowest losses, at most NUM_FIRST_POINTS. Only those that could win count."""
    able = [(record.score, params) for _, params, record in found if record.outcome in CONTENDERS and record.keeps_limits]
    known = sorted((one for one in able if one[0] is not None), key=lambda one: one[0])
    return [params for _, params in known[:NUM_FIRST_POINTS]]


def entering(
    name: str, records: Iterable[TrialRecord], space: Space, config: SweepConfig
) -> list[tuple[str, dict[str, Any], TrialRecord]]:
    """Return (source, params, record) of each trial that enters. Raises InputError if none does."""
    base, names = config.base().model_dump(mode="json"), config.sweep.objectives
    ended = [record for record in records if record.source is None and record.warm is None and _is_known(record, names)]
    if not ended:
        raise InputError("sweep.warm_start", name, "must be a sweep with a trial that has ended and was measured")
    placed = [(record, params_in(space, base, record.config)) for record in ended]
    found = [(f"{name} trial {record.number}", params, record) for record, params in placed if params is not None]
    if not found:
        allowed = f"none of its {len(ended)} ended trials is a point of this space: {_why(space, base, ended[0])}"
        raise InputError("sweep.warm_start", name, allowed)
    return found


def _is_known(record: TrialRecord, objectives: tuple[str, ...]) -> bool:
    """Return whether the sampler can learn from how the trial ended.

    LOST and FAILED trials may go well this time. Whether memory is enough depends on the card.
    """
    if record.outcome is Outcome.COMPLETE:
        return objective_values(record, objectives) is not None
    unfinished = record.outcome in (Outcome.PRUNED, Outcome.PAUSED)
    return record.outcome is Outcome.DIVERGED or (unfinished and len(objectives) == 1)


def params_in(space: Space, base: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the point of the space that gives this config, or None if there is none."""
    params: dict[str, Any] = {}
    for dimension in space.dimensions:
        if is_active(dimension, params):
            value = coordinate(dimension, value_at(config, dimension.path))
            if value is OUTSIDE:
                return None
            params[dimension.path] = value
    try:
        same = space.apply(base, params).fingerprint() == parse(TrainConfig, config).fingerprint()
    except InputError:
        return None
    return params if same else None


def _why(space: Space, base: Mapping[str, Any], record: TrialRecord) -> str:
    """Return a text that names the first field by which a trial is no point of the space."""
    free = {dimension.path: dimension for dimension in space.dimensions}
    for section, values in parse(TrainConfig, record.config).model_dump(mode="json").items():
        for key, value in values.items():
            path = f"{section}.{key}"
            if path in free and coordinate(free[path], value) is OUTSIDE:
                return f"{path} is {value!r} in trial {record.number}, and {free[path].describe()} here"
            if path not in free and plain(base[section][key]) != plain(value) and _matters(base, section, key, value):
                return f"{path} is {value!r} in trial {record.number}, and {base[section][key]!r} here"
    return f"trial {record.number} was trained in a different way"


def _matters(base: Mapping[str, Any], section: str, key: str, value: Any) -> bool:
    """Return whether a config with this value trains another adapter; False for `auto` and its meaning."""
    try:
        changed = parse(TrainConfig, {**base, section: {**base[section], key: value}})
    except InputError:  # not with the other values here
        return True
    return changed.fingerprint() != parse(TrainConfig, base).fingerprint()


def _check_equal(name: str, path: str, here: Any, there: Any, reason: str) -> None:
    if plain(here) != plain(there):
        allowed = f"cannot be learnt from: {path} is {there!r} there and {here!r} here, and {reason}"
        raise InputError("sweep.warm_start", name, allowed)


def _at(config: TrainConfig, path: str) -> Any:
    section, key = path.split(".")
    return getattr(getattr(config, section), key)
