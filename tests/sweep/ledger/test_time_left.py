"""How long a sweep still needs: nothing is said before the first report, and then what its trials took."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sweep.config.budget_limits import BudgetConfig
from sweep.folder.timeline import Timeline
from sweep.ledger.limits import Limits
from sweep.ledger.time_left import TimeLeft
from sweep.trials.record import Outcome, TrialRecord
from tests.support.reports import make_report

GRID = (1000, 2000, 4000)  # ten seconds for each 1000 tokens in `Sweep`


class Sweep:
    """A sweep whose trials report when the test says so."""

    def __init__(self, tmp_path, num_trials: int = 4, num_slots: int = 1, num_points: int | None = None, **budget) -> None:
        self.now_s, self.timeline = 0.0, Timeline(tmp_path / "timeline.jsonl")
        limits = Limits(num_trials=num_trials, num_rungs=3, num_slots=num_slots, max_retries=0, budget=BudgetConfig(**budget))
        self.left = TimeLeft(limits, GRID, num_points)
        self.left.begin(self.timeline, lambda: self.now_s)
        self.timeline.start_session(0.0, num_slots)

    def trial(self, number: int, num_reports: int, outcome: Outcome = Outcome.RUNNING, **changes) -> None:
        if number not in self.left._seen:
            self.timeline.on_assigned(number, self.now_s)
        values = {"train_s": 10.0, "recording_s": 0.0, "eval_s": 0.0, "save_s": 0.0, **changes}
        rungs = range(1, num_reports + 1)
        reports = [make_report(rung, tokens_seen=GRID[rung - 1], **self._scaled(values, rung)) for rung in rungs]
        self.left.on_trial_updated(TrialRecord(number, {}, {}, outcome, "", reports))

    @staticmethod
    def _scaled(values: dict, rung: int) -> dict:
        seconds = values["train_s"]
        return {**values, "train_s": None if seconds is None else seconds * (2.0 if rung == 3 else 1.0)}


def test_before_the_first_report_nothing_is_said(tmp_path):
    sweep = Sweep(tmp_path)
    assert sweep.left.text() == "0 of 4 trials ended, time left: -" and sweep.left.seconds() is None
    sweep.trial(0, 0)
    sweep.trial(1, 0, Outcome.FAILED)
    assert sweep.left.text() == "1 of 4 trials ended, time left: -"


def test_a_trial_that_waits_has_not_ended_so_the_count_never_falls(tmp_path):
    sweep = Sweep(tmp_path, num_trials=2)
    said = []
    for outcome in (Outcome.RUNNING, Outcome.PAUSED, Outcome.RUNNING, Outcome.STOPPED, Outcome.RUNNING, Outcome.COMPLETE):
        sweep.trial(0, 1, outcome)
        said.append(sweep.left.text().split(" of ")[0])
    assert said == ["0", "0", "0", "0", "0", "1"]


def test_with_several_slots_their_hours_are_said_too(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    several, alone = Sweep(tmp_path / "a", num_trials=91, num_slots=2), Sweep(tmp_path / "b", num_trials=91)
    for sweep in (several, alone):
        sweep.trial(0, 1)
    # 30 s are left of this one, and 90 trials of 40 s
    assert several.left.text() == "0 of 91 trials ended, time left: about 30 min, 1 slot hours"
    assert alone.left.text() == "0 of 91 trials ended, time left: about 60 min"


def test_all_rungs_of_all_trials_are_left_while_none_was_pruned(tmp_path):
    sweep = Sweep(tmp_path)
    sweep.trial(0, 1)
    assert sweep.left.seconds() == pytest.approx(30.0 + 3 * 40.0)
    sweep.now_s = 4.0  # four seconds of the rung that runs
    assert sweep.left.seconds() == pytest.approx(26.0 + 3 * 40.0)
    sweep.now_s = 1000.0  # late: it cannot have done more than that rung
    assert sweep.left.seconds() == pytest.approx(20.0 + 3 * 40.0)
    sweep.trial(0, 3, Outcome.COMPLETE)
    assert sweep.left.text() == "1 of 4 trials ended, time left: about 2 min"


def test_what_was_pruned_so_far_is_expected_of_the_trials_to_come(tmp_path):
    sweep = Sweep(tmp_path, num_trials=5)
    for number, outcome in enumerate((Outcome.PRUNED, Outcome.PRUNED, Outcome.PRUNED)):
        sweep.trial(number, 1, outcome)
    sweep.trial(3, 3, Outcome.COMPLETE)
    # one of four goes on after the first rung, all after the second
    assert sweep.left.seconds() == pytest.approx(10.0 + 0.25 * 30.0)
    sweep.trial(4, 1)  # it has passed its first verdict
    assert sweep.left.seconds() == pytest.approx(30.0)
    sweep.trial(4, 1, Outcome.PRUNED)
    assert sweep.left.seconds() == 0.0 and sweep.left.text() == "5 of 5 trials ended"


def test_who_still_runs_has_gone_on_and_who_was_stopped_says_nothing_of_its_rung(tmp_path):
    sweep = Sweep(tmp_path, num_trials=5)
    for number in range(3):
        sweep.trial(number, 1, Outcome.PRUNED)
    sweep.trial(3, 1)
    assert sweep.left.seconds() == pytest.approx(30.0 + 10.0 + 0.25 * 30.0)
    stopped = Sweep(tmp_path, num_trials=3)
    stopped.trial(0, 3, Outcome.COMPLETE)
    stopped.trial(1, 1, Outcome.STOPPED)  # it goes on, too
    assert stopped.left.seconds() == pytest.approx(30.0 + 40.0)


def test_trials_that_fail_before_they_report_take_no_time(tmp_path):
    sweep = Sweep(tmp_path, num_trials=6)
    sweep.trial(0, 3, Outcome.COMPLETE)
    sweep.trial(1, 0, Outcome.OUT_OF_MEMORY)
    assert sweep.left.seconds() == pytest.approx(4 * 0.5 * 40.0)


def test_a_trial_begins_with_dead_time_and_recordings_and_each_rung_is_evaluated(tmp_path):
    sweep = Sweep(tmp_path, num_trials=2)
    sweep.trial(0, 3, Outcome.COMPLETE, recording_s=2.0, eval_s=1.0, save_s=0.5)
    sweep.timeline.on_assigned(1, 50.0)
    sweep.timeline.on_reported(1, 60.0, {"slot": "a", "began_s": 50.0, "dead_time_s": 3.0})
    assert sweep.left.seconds() == pytest.approx(40.0 + 3 * 1.5 + 3 * 2.0 + 3.0)


def test_a_running_trial_has_its_own_speed_and_slots_share_the_work(tmp_path):
    sweep = Sweep(tmp_path, num_trials=2, num_slots=2)
    sweep.trial(0, 1, train_s=10.0)
    sweep.trial(1, 1, train_s=30.0)
    assert sweep.left.seconds() == pytest.approx(90.0)  # the slower one, not 120 s / 2
    many = Sweep(tmp_path, num_trials=21, num_slots=4)
    many.trial(0, 3, Outcome.COMPLETE)
    assert many.left.seconds() == pytest.approx(20 * 40.0 / 4)


def test_reports_of_an_older_version_tell_their_speed(tmp_path):
    sweep = Sweep(tmp_path, num_trials=2)
    sweep.trial(0, 3, Outcome.COMPLETE, train_s=None, recording_s=None, eval_s=None, save_s=None, tokens_per_second=100.0)
    assert sweep.left.seconds() == pytest.approx(40.0)


@pytest.mark.parametrize(("field", "spent_s"), [("gpu_hours", (1800.0, 0.0)), ("wall_clock_hours", (0.0, 1800.0))])
def test_what_finalists_took_counts_against_the_budget_here_too(tmp_path, field, spent_s):
    sweep = Sweep(tmp_path, num_trials=1000, **{field: 1.0})
    sweep.left.take_limits(replace(sweep.left._limits, elsewhere_s=spent_s))
    sweep.trial(0, 1)
    assert sweep.left.seconds() == pytest.approx(1800.0)


def test_a_budget_ends_the_sweep_earlier_and_a_target_may(tmp_path):
    sweep = Sweep(tmp_path, num_trials=100, num_slots=2, gpu_hours=0.02)
    for number in range(2):
        sweep.trial(number, 1)
    sweep.now_s = 26.0  # two slots: 72 s of slots are 36 s
    assert sweep.left.text() == "0 of 100 trials ended, time left: about 10 s (sweep.budget.gpu_hours)"
    clock = Sweep(tmp_path, num_trials=100, wall_clock_hours=1.0)
    clock.trial(0, 1)
    clock.now_s = 600.0
    assert clock.left.text() == "0 of 100 trials ended, time left: about 50 min (sweep.budget.wall_clock_hours)"
    target = Sweep(tmp_path, num_trials=10_000, target_loss=1.0)
    target.trial(0, 1)
    assert target.left.text() == "0 of 10,000 trials ended, time left: at most 111.1 h"
    metric = Sweep(tmp_path, num_trials=10_000, target_metric=0.9)
    metric.trial(0, 1)
    assert "left: at most 111.1 h" in metric.left.text()
    ample = Sweep(tmp_path, gpu_hours=1000.0)  # the twin: the trials end before their budget
    ample.trial(0, 1)
    assert "budget" not in ample.left.text()


def test_a_small_space_and_proposals_that_do_not_fit_are_no_work(tmp_path):
    sweep = Sweep(tmp_path, num_trials=50, num_points=4)
    sweep.trial(0, 3, Outcome.COMPLETE)
    assert sweep.left.seconds() == pytest.approx(3 * 40.0)
    sweep.trial(1, 0, Outcome.INFEASIBLE)
    sweep.left.on_trial_updated(TrialRecord(2, {}, {}, Outcome.COMPLETE, "", [make_report()], source="earlier"))
    assert sweep.left.seconds() == pytest.approx(2 * 40.0)


def test_a_trial_that_a_smaller_budget_stopped_goes_on(tmp_path):
    sweep = Sweep(tmp_path, num_trials=1)
    sweep.trial(0, 2, Outcome.STOPPED)
    assert sweep.left.seconds() == pytest.approx(20.0)


def test_a_budget_of_tokens_is_shared_by_all_trials_paused_or_not(tmp_path):
    sweep = Sweep(tmp_path, num_trials=100, num_slots=2, full_trials=3.0)  # 12,000 tokens, 10 ms each
    sweep.trial(0, 2, Outcome.PAUSED)
    sweep.trial(1, 1)
    assert sweep.left.text() == "0.75 of 3 full trials spent, time left: about 45 s"
    sweep.now_s = 4.0  # four seconds of the rung that runs
    assert sweep.left.seconds() == pytest.approx((90.0 - 4.0) / 2)
    sweep.trial(1, 3, Outcome.COMPLETE)
    for number in range(2, 8):
        sweep.trial(number, 1, Outcome.PAUSED)
    assert sweep.left.text() == "3 of 3 full trials spent"
    small = Sweep(tmp_path, num_trials=2, full_trials=100.0)  # the twin: all trials end before
    small.trial(0, 2, Outcome.PAUSED)
    assert small.left.seconds() == pytest.approx(20.0 + 40.0)
