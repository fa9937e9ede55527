"""Our pruners give Optuna's verdicts, one by one, for any reports in any order."""

from __future__ import annotations

import random

import optuna
import pytest
from optuna.trial import TrialState

from sweep.config import pruner_options
from sweep.config.pruner_options import HyperbandConfig, MedianConfig, NoPrunerConfig, PatientConfig, SuccessiveHalvingConfig
from sweep.config.sampler_options import SAMPLERS
from sweep.study.pruners import PRUNER_PAIRS, SuccessiveHalvingPruner, make_optuna_pruner, make_pruner
from sweep.study.samplers import SAMPLER_MAKERS

NUM_RUNGS, NUM_TRIALS = 9, 300
PRUNERS = [
    SuccessiveHalvingConfig(),
    SuccessiveHalvingConfig(min_rung=2, reduction_factor=3, min_early_stopping_rate=1),
    HyperbandConfig(),
    HyperbandConfig(min_rung=2, reduction_factor=3),
    MedianConfig(num_startup_trials=0),
    MedianConfig(num_startup_trials=5, num_warmup_rungs=3),
    PatientConfig(patience=1, min_delta=0.1),
    PatientConfig(patience=0, inner="median"),
    PatientConfig(patience=2, inner="successive_halving"),
    NoPrunerConfig(),
]


class Optunas:
    """Runs Optuna's pruner on a study in memory."""

    def __init__(self, config) -> None:
        self._pruner, self._storage = make_optuna_pruner(config, NUM_RUNGS), optuna.storages.InMemoryStorage()
        self._study = optuna.create_study(storage=self._storage, study_name="sweep", pruner=self._pruner)
        self._ids = []

    def begin(self) -> None:
        self._ids.append(self._storage.create_new_trial(self._study._study_id))

    def prunes(self, number: int, rung: int, value: float) -> bool:
        self._storage.set_trial_intermediate_value(self._ids[number], rung, value)
        return rung < NUM_RUNGS and self._pruner.prune(self._study, self._storage.get_trial(self._ids[number]))

    def ended(self, number: int, state: TrialState) -> None:
        self._storage.set_trial_state_values(self._ids[number], state, [1.0] if state is TrialState.COMPLETE else None)


def compare(config, seed: int, judge=None) -> dict[TrialState, int]:
    """Run a sweep of random curves with many ties on 16 slots; return each trial's outcome."""
    rng, theirs, ours = random.Random(seed), Optunas(config), judge or make_pruner(config, NUM_RUNGS, "sweep")
    live: dict[int, dict[int, float]] = {}
    ends = dict.fromkeys((TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL), 0)
    num_begun = 0
    while num_begun < NUM_TRIALS or live:
        while num_begun < NUM_TRIALS and len(live) < 16:
            theirs.begin()
            live[num_begun] = {}
            num_begun += 1
        number = rng.choice(list(live))
        curve = live[number]
        rung = len(curve) + 1
        curve[rung] = round(3.0 / rung**0.3 + rng.gauss(0.0, 0.3), 1)
        verdict = theirs.prunes(number, rung, curve[rung])
        if rung < NUM_RUNGS:
            assert ours.prunes(number, curve) == verdict, (number, curve)
        state = TrialState.PRUNED if verdict else TrialState.COMPLETE if rung == NUM_RUNGS else None
        state = state or (TrialState.FAIL if rng.random() < 0.02 else None)
        if state is not None:
            ends[state] += 1
            theirs.ended(number, state)
            ours.on_ended(number, live.pop(number), state is TrialState.COMPLETE)
    return ends


def test_every_pruner_and_sampler_that_a_config_can_name_is_in_the_table():
    assert set(PRUNER_PAIRS) == set(pruner_options.PRUNERS) == {config.name for config in PRUNERS}
    assert set(SAMPLER_MAKERS) == set(SAMPLERS)


@pytest.mark.parametrize("config", PRUNERS, ids=[f"{config.name}-{number}" for number, config in enumerate(PRUNERS)])
def test_every_verdict_is_optunas(config):
    ends = compare(config, seed=1)
    assert sum(ends.values()) == NUM_TRIALS and ends[TrialState.COMPLETE] > 0
    assert (ends[TrialState.PRUNED] > 0) == (config.name != "none")


def test_that_comparison_sees_a_judge_that_is_off_by_one():
    with pytest.raises(AssertionError):
        compare(SuccessiveHalvingConfig(), seed=1, judge=SuccessiveHalvingPruner(1, 2, 1))
