"""Read the sweeps that sweep.warm_start names.

Nothing in their folders is changed. An InputError says in one line what is wrong with one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.errors import InputError
from sweep.config.sweep import SweepConfig
from sweep.folder.sweep_folder import SweepFolder
from sweep.space.parse import parse_space
from sweep.space.space import Space
from sweep.study.begun_with import read_unedited_config
from sweep.study.journal import read_records, rungs_judged
from sweep.study.warm_start import EarlierTrial, best_points, changed_part, check_comparable, entering


@dataclass
class EarlierSweeps:
    """Hold what a new sweep takes over from earlier ones.

    trials: enter as ended, each config once. first_points: params to try first, from sweeps whose
    losses do not compare. notes: a line on each of those.
    """

    trials: list[EarlierTrial] = field(default_factory=list)
    first_points: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_earlier(config: SweepConfig, space: Space, data: Mapping[str, Any]) -> EarlierSweeps:
    """Return what is taken over, in the order of sweep.warm_start.

    data: digests of the samples, as far as known. With several objectives, pruned trials stay out,
    because Optuna can rank them by one value only. Raises InputError for a sweep that cannot be
    used.
    """
    found, known = EarlierSweeps(), set()
    for name in config.sweep.warm_start:
        for earlier in _of_folder(name, config, space, data, found):
            fingerprint = space.apply(config.base().model_dump(mode="json"), earlier.params).fingerprint()
            if fingerprint not in known:
                found.trials.append(earlier)
            known.add(fingerprint)
    return found


def _of_folder(
    name: str, config: SweepConfig, space: Space, data: Mapping[str, Any], found: EarlierSweeps
) -> list[EarlierTrial]:
    """Return the trials of a sweep that enter. Where none can, its best points are added to `found`."""
    folder = SweepFolder.open(name, "sweep.warm_start")
    try:
        there = read_unedited_config(folder)
    except InputError as error:
        raise InputError("sweep.warm_start", name, f"its sweep_config.json cannot be used: {error}") from None
    check_comparable(name, config, there)
    base, space_there = there.base().model_dump(mode="json"), parse_space(there.space)
    trials, records = read_records(folder, lambda params: space_there.merged(base, params))
    enter = entering(name, records, space, config)
    if changed := changed_part(data, folder.read_data()):
        points = best_points(enter)
        if not points:
            allowed = f"gives nothing to begin with: its {changed} differ from today's, and none of its trials could win"
            raise InputError("sweep.warm_start", name, allowed)
        found.first_points += points
        come = "its best point comes first" if len(points) == 1 else f"its best {len(points)} points come first"
        found.notes.append(f"{name}: its {changed} differ from today's, so its losses are left out; {come}")
        return []
    same_pruner = there.effective_pruner == config.effective_pruner
    return [
        EarlierTrial(source, params, record, rungs_judged(trials[record.number]) if same_pruner else {})
        for source, params, record in enter
    ]
