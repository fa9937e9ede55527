"""Read the sweeps that sweep.warm_start names.

Nothing in their folders is changed. An InputError says in one line what is wrong with one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import InputError
from sweep.config.sweep import SweepConfig
from sweep.folder.sweep_folder import SweepFolder
from sweep.space.parse import parse_space
from sweep.space.space import Space
from sweep.study.begun_with import read_unedited_config
from sweep.study.journal import read_trials, record_of, rungs_judged
from sweep.study.warm_start import EarlierTrial, check_comparable, check_same_data, entering


def read_earlier(config: SweepConfig, space: Space, data: Mapping[str, Any]) -> list[EarlierTrial]:
    """Return the trials that enter, in the order of sweep.warm_start, each config once.

    data: digests of the samples, as far as known. With several objectives, pruned trials stay out,
    because Optuna can rank them by one value only. Raises InputError for a sweep that cannot be
    used.
    """
    found: dict[str, EarlierTrial] = {}
    for name in config.sweep.warm_start:
        for earlier in _of_folder(name, config, space, data):
            fingerprint = space.apply(config.base().model_dump(mode="json"), earlier.params).fingerprint()
            found.setdefault(fingerprint, earlier)
    return list(found.values())


def _of_folder(name: str, config: SweepConfig, space: Space, data: Mapping[str, Any]) -> list[EarlierTrial]:
    folder = SweepFolder.open(name, "sweep.warm_start")
    try:
        there = read_unedited_config(folder)
    except InputError as error:
        raise InputError("sweep.warm_start", name, f"its sweep_config.json cannot be used: {error}") from None
    check_comparable(name, config, there)
    check_same_data(name, data, folder.read_data())
    base, space_there = there.base().model_dump(mode="json"), parse_space(there.space)
    trials = read_trials(folder)
    records = [record_of(t, folder, lambda params: space_there.apply(base, params).model_dump(mode="json")) for t in trials]
    same_pruner = there.effective_pruner == config.effective_pruner
    return [
        EarlierTrial(source, params, record, rungs_judged(trials[record.number]) if same_pruner else {})
        for source, params, record in entering(name, records, space, config)
    ]
