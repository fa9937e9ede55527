"""A driver killed at any write to disk loses nothing; its resume equals the undisturbed sweep.

The equality is bit for bit.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator

import pytest

from sweep.folder.sweep_folder import SweepFolder
from sweep.folder.timeline import Timeline
from sweep.ledger.ledger import Ledger
from sweep.study import proposals as drafts
from sweep.study import study

from .simulated import killed_at, litter, run, settings

EQUAL = [
    ("tpe", "successive_halving", 1),
    ("tpe", "hyperband", 1),
    ("cmaes", "median", 1),
    ("random", "patient", 2),
    ("grid", "none", 2),
    ("freeze_thaw", "none", 1),
]


def disturbed(tmp_path, values: dict, step: int) -> Iterator[tuple[int, str, dict]]:
    """Kill sweeps at every step-th write in every way, and resume them.

    Returns (write, how, what they found) for each.
    """
    for write in itertools.count(1, step):
        ways = [how for how in ("before", "after", "torn") if killed_at(tmp_path / f"{write}-{how}", values, write, how)]
        for how in ways:
            yield write, how, run(tmp_path / f"{write}-{how}", values)
        if len(ways) < 3:
            return


def folder_of(path, values: dict):
    """Return the folder of the sweeps, which do not make it themselves."""
    if values["sampler"]["name"] == "grid":
        values["space"] = {"lora.rank": {"choices": [2, 4, 8, 16]}, "lora.use_rslora": {"choices": [True, False]}}
    return path


@pytest.fixture(autouse=True)
def _folders(monkeypatch):
    """Make the journal's folder, as the driver does before it."""
    original = study.Study.__init__

    def make(self, folder, *arguments, **options):
        folder.path.mkdir(parents=True, exist_ok=True)
        original(self, folder, *arguments, **options)

    monkeypatch.setattr(study.Study, "__init__", make)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def _recovers_with(monkeypatch, part: str, method: str, answer) -> None:
    """Let a ledger get this answer from one of its parts, as long as it recovers."""
    original = Ledger.recover

    def recover(self):
        with monkeypatch.context() as patch:
            patch.setattr(getattr(self, part), method, answer)
            return original(self)

    monkeypatch.setattr(Ledger, "recover", recover)


def check(tmp_path, sampler: str, pruner: str, num_slots: int, step: int, num_trials: int = 7, **sweep) -> int:
    values = settings(sampler, pruner, num_slots, num_trials)
    values["sweep"] |= sweep
    folder_of(tmp_path, values)
    undisturbed = run(tmp_path / "undisturbed", values)
    outcomes = {outcome for _, outcome, _ in undisturbed.values()}
    num_stays = len(Timeline(tmp_path / "undisturbed" / "timeline.jsonl", mend=False).spans)
    if sampler == "freeze_thaw":  # some trials paused, and one of them went on
        assert outcomes == {"PAUSED", "COMPLETE"} and num_stays > len(undisturbed)
    else:
        assert len(undisturbed) == num_trials == num_stays
    num_kills = 0
    for write, how, trials in disturbed(tmp_path, values, step):
        assert trials == undisturbed, f"killed {how} write {write}"
        assert litter(SweepFolder(tmp_path / f"{write}-{how}"), trials) == [], f"killed {how} write {write}"
        num_kills += 1
    return num_kills


def test_a_kill_at_a_write_changes_nothing(tmp_path):
    assert check(tmp_path, "tpe", "successive_halving", 1, step=13, num_trials=5) > 9


def test_a_kill_enters_each_first_trial_once(tmp_path):
    """One point of the user's and four of the prior's, then one of the sampler's."""
    own = {"lora.rank": 2, "optim.learning_rate": 0.05}
    assert check(tmp_path, "random", "none", 1, step=37, num_trials=6, first_trials=[own], prior=True) > 5
    found = [params for params, _, _ in run(tmp_path / "1-before", settings("random", "none", 1, 6)).values()]
    rates = [params["optim.learning_rate"] for params in found]
    assert found[0] == own and rates[1:5] == [0.012, 0.053, 0.0029, 0.0074] and len(set(rates)) == 6


@pytest.mark.faults
def test_a_kill_at_every_write_changes_no_first_trial(tmp_path):
    assert check(tmp_path, "tpe", "successive_halving", 1, step=1, first_trials=[{"lora.rank": 2}], prior=True) > 150


def test_a_kill_at_a_write_changes_nothing_where_trials_pause_and_go_on(tmp_path):
    assert check(tmp_path, "freeze_thaw", "none", 1, step=13) > 9


@pytest.mark.faults
@pytest.mark.parametrize(("sampler", "pruner", "num_slots"), EQUAL)
def test_a_kill_at_every_write_changes_nothing(tmp_path, sampler, pruner, num_slots):
    least = 140 if sampler == "freeze_thaw" else 150  # it trains fewer rungs, so it writes less
    assert check(tmp_path, sampler, pruner, num_slots, step=1) > least


@pytest.mark.faults
def test_with_several_slots_a_kill_loses_no_rung_of_a_trial_that_pauses(tmp_path):
    values = settings("freeze_thaw", "none", 3, 12)
    num_kills, num_rungs = 0, 3 * 4  # three full trials
    for write, how, trials in disturbed(tmp_path, values, step=5):
        folder = SweepFolder(tmp_path / f"{write}-{how}")
        for number, (_, outcome, losses) in trials.items():
            reports = folder.reports(number)
            assert [report.rung for report in reports] == list(range(1, len(losses) + 1)), (write, how, number)
            assert (len(losses) == 4) == (outcome == "COMPLETE") and outcome in ("COMPLETE", "PAUSED", "STOPPED")
        # a budget may be overspent by the rungs that are in training: one a slot
        assert num_rungs <= sum(len(losses) for _, _, losses in trials.values()) < num_rungs + 3
        assert len({json.dumps(params) for params, _, _ in trials.values()}) == len(trials)
        assert any(outcome == "COMPLETE" for _, outcome, _ in trials.values())
        num_kills += 1
    assert num_kills > 40


def test_the_check_bites_where_a_resumed_sampler_draws_anew(tmp_path, monkeypatch):
    draws = itertools.count(1)
    monkeypatch.setattr(drafts, "proposal_seed", lambda seed, number, stream=0: next(draws))
    with pytest.raises(AssertionError, match="killed"):
        check(tmp_path, "tpe", "none", 1, step=11, num_trials=4)


def test_the_check_bites_where_a_result_is_not_mended(tmp_path, monkeypatch):
    monkeypatch.setattr("sweep.folder.sweep_folder.SweepFolder.has_result", lambda self, number: True)
    with pytest.raises(AssertionError, match="killed"):
        check(tmp_path, "random", "none", 1, step=1, num_trials=2)


def test_the_check_bites_where_the_freezer_is_not_asked_again(tmp_path, monkeypatch):
    _recovers_with(monkeypatch, "_freezer", "goes_on", lambda number: True)
    with pytest.raises(AssertionError, match="killed"):
        check(tmp_path, "freeze_thaw", "none", 1, step=3)


def test_the_check_bites_where_a_kill_leaves_a_checkpoint(tmp_path, monkeypatch):
    original = Ledger.recover

    def recover(self):
        with monkeypatch.context() as patch:
            patch.setattr("sweep.ledger.ledger.drop_if_ended", lambda record: None)
            return original(self)

    monkeypatch.setattr(Ledger, "recover", recover)
    with pytest.raises(AssertionError, match="killed"):
        check(tmp_path, "random", "none", 1, step=1, num_trials=2)


def test_the_check_bites_where_a_trial_that_may_go_on_loses_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("sweep.folder.litter.GOING_ON", ("RUNNING", "STOPPED"))
    with pytest.raises((AssertionError, KeyError)):
        check(tmp_path, "freeze_thaw", "none", 1, step=13)


@pytest.mark.faults
def test_the_check_bites_where_the_pruner_is_not_asked_again(tmp_path, monkeypatch):
    _recovers_with(monkeypatch, "_study", "should_prune", lambda number: False)
    with pytest.raises(AssertionError, match="killed"):
        check(tmp_path, "tpe", "successive_halving", 1, step=1, num_trials=3)
