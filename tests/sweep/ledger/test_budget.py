"""Budgets end a sweep before its last trial; running trials stop, and a resume continues them."""

from __future__ import annotations

import json
import re
import time

import pytest

from engine.errors import InputError
from sweep.config.resume_changes import apply_resume_changes, refuse_edits
from sweep.folder.sweep_folder import SweepFolder
from sweep.folder.timeline import Timeline
from sweep.ledger.ledger import Ledger, Next
from sweep.trials.record import Outcome
from sweep.trials.selection import Rule
from tests.support.fake_sweeps import fake_driver, results, rungs, start, sweep_folder
from tests.support.studies import WIDE, config_for, ledger_in, report, write_reports


class Clock:
    """A clock that moves only when told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def open_ledger(path, clock: Clock, num_slots: int = 2, num_trials: int = 8, **budget) -> Ledger:
    config = config_for(WIDE, pruner="none", num_trials=num_trials, budget=budget)
    ledger = ledger_in(path, config, num_slots, clock=clock)
    ledger.recover()
    return ledger


def outcomes(ledger: Ledger) -> list[str]:
    return [str(record.outcome) for record in ledger.records]


def say(ledger: Ledger, path, number: int, rung: int, loss: float) -> bool:
    """Act as an engine at a rung: write the file first, then send the report."""
    write_reports(path, number, [report(earlier, loss) for earlier in range(1, rung + 1)])
    return ledger.reported(number, report(rung, loss))


def test_gpu_hours_count_every_slot_and_running_trials_stop_at_their_next_report(tmp_path):
    clock = Clock()
    ledger = open_ledger(tmp_path, clock, gpu_hours=1.0)
    first, second = ledger.next_trial().number, ledger.next_trial().number
    clock.now_s += 1790.0
    assert not say(ledger, tmp_path, first, 1, 3.0)
    clock.now_s += 20.0  # two slots, 1,810 s each
    assert say(ledger, tmp_path, second, 1, 2.0)
    assert ledger.next_trial() is Next.WAIT
    assert say(ledger, tmp_path, first, 2, 2.5)
    assert ledger.next_trial() is Next.FINISHED
    assert outcomes(ledger) == ["STOPPED", "STOPPED"]
    assert Rule().best(ledger.records).number == second
    assert "sweep.budget.gpu_hours = 1 is spent (1.006 hours" in ledger.shortfall
    assert "2 of 8 trials were started, 2 stopped at a report" in ledger.shortfall
    result = json.loads((SweepFolder(tmp_path).trial(first) / "result.json").read_text())
    assert result["outcome"] == "STOPPED" and result["started_s"] <= result["ended_s"] <= time.time()  # by one clock


def test_without_a_limit_the_same_hours_stop_nothing(tmp_path):
    clock = Clock()
    ledger = open_ledger(tmp_path, clock)
    number = ledger.next_trial().number
    clock.now_s += 1e6
    assert not say(ledger, tmp_path, number, 1, 0.001)
    assert outcomes(ledger) == ["RUNNING"] and ledger.shortfall is None


def test_a_resume_with_a_larger_budget_goes_on_with_the_stopped_trials_and_with_what_they_cost(tmp_path):
    clock = Clock()
    ledger = open_ledger(tmp_path, clock, num_slots=1, gpu_hours=0.5)
    number = ledger.next_trial().number
    clock.now_s += 1801.0
    assert say(ledger, tmp_path, number, 1, 2.0)

    clock.now_s += 86400.0  # a night between the two costs nothing
    same = open_ledger(tmp_path, clock, num_slots=1, gpu_hours=0.5)
    assert not same.has_work() and outcomes(same) == ["STOPPED"]

    more = open_ledger(tmp_path, clock, num_slots=1, gpu_hours=1.0)
    assert more.has_work()
    assert more.next_trial().number == number
    assert outcomes(more) == ["RUNNING"]
    clock.now_s += 1700.0
    assert not say(more, tmp_path, number, 2, 1.9)
    clock.now_s += 100.0
    assert say(more, tmp_path, number, 3, 1.8)
    assert outcomes(more) == ["STOPPED"]
    assert [one.rung for one in more.records[0].reports] == [1, 2, 3]


def test_wall_clock_hours_count_while_the_sweep_runs_however_few_slots_are_held(tmp_path):
    clock = Clock()
    ledger = open_ledger(tmp_path, clock, wall_clock_hours=1.0)
    number = ledger.next_trial().number
    clock.now_s += 3599.0
    assert not say(ledger, tmp_path, number, 1, 3.0)
    clock.now_s += 1.0
    assert say(ledger, tmp_path, number, 2, 3.0)
    assert ledger.next_trial() is Next.FINISHED
    clock.now_s += 7200.0
    again = open_ledger(tmp_path, clock, wall_clock_hours=1.5)
    assert again.next_trial().number == number


def test_the_trial_that_reaches_the_target_loss_ends_the_sweep_and_wins(tmp_path):
    ledger = open_ledger(tmp_path, Clock(), target_loss=1.5)
    first, second = ledger.next_trial().number, ledger.next_trial().number
    assert not say(ledger, tmp_path, first, 1, 1.51)
    assert say(ledger, tmp_path, second, 1, 1.5)
    assert say(ledger, tmp_path, first, 2, 1.6)
    assert ledger.next_trial() is Next.FINISHED
    assert Rule().best(ledger.records).number == second
    stricter = open_ledger(tmp_path, Clock(), target_loss=1.0)
    assert {stricter.next_trial().number, stricter.next_trial().number} == {first, second}


def test_a_trial_whose_process_died_when_the_budget_was_spent_is_stopped_too(tmp_path):
    clock = Clock()
    ledger = open_ledger(tmp_path, clock, num_slots=1, gpu_hours=0.5)
    number = ledger.next_trial().number
    clock.now_s += 1801.0
    ledger.lost(number)
    assert ledger.next_trial() is Next.FINISHED
    assert outcomes(ledger) == ["STOPPED"]
    assert open_ledger(tmp_path, clock, num_slots=1, gpu_hours=1.0).next_trial().number == number


@pytest.mark.parametrize("kill", ["before the worker has reported", "after"])
def test_what_a_killed_session_held_counts_until_its_last_event(tmp_path, kill):
    file = tmp_path / "timeline.jsonl"
    timeline = Timeline(file)
    timeline.start_session(0.0)
    timeline.on_assigned(0, 0.0)
    timeline.on_assigned(1, 10.0)
    if kill == "after":
        timeline.on_reported(0, 60.0, {"slot": "a", "began_s": 1.0})
    with open(file, "a") as torn:
        torn.write('{"event": "rep')
    later = Timeline(file)
    expected = {"after": 60.0 + 50.0, "before the worker has reported": 10.0}[kill]
    assert later.occupied_s(9999.0) == expected
    assert later.elapsed_s(9999.0) == {"after": 60.0, "before the worker has reported": 10.0}[kill]
    later.start_session(10_000.0)
    assert (later.elapsed_s(10_005.0), later.occupied_s(10_005.0)) == (later.elapsed_s(10_000.0) + 5.0, expected)
    # the torn line is gone, and the next line is whole
    assert Timeline(file).occupied_s(20_000.0) == expected


def test_a_stopped_trial_is_no_worse_than_a_complete_one_with_a_higher_loss():
    from tests.support.records import trial

    stopped, complete, pruned = trial(0, 1.0, outcome=Outcome.STOPPED), trial(1, 1.2), trial(2, 0.9, outcome=Outcome.PRUNED)
    assert Rule().best([stopped, complete, pruned]) is stopped
    assert Rule().best([complete, pruned]) is complete


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ({"sweep.budget.gpu_hours": 0.5}, "must be at least 1 on resume, or null"),
        ({"sweep.budget.target_loss": 2.5}, "must be at most 2 on resume, or null"),
        ({"sweep.budget.gpu_hours": "many"}, "sweep.budget.gpu_hours"),
        ({"sweep.budget.gpu_hours": -1}, "sweep.budget.gpu_hours"),
        ({"sweep.budget": None}, "cannot be changed on resume"),
        ({"sweep.num_trials": 7}, "at least 8"),
    ],
)
def test_a_resume_may_only_spend_more(overrides, part):
    config = config_for(WIDE, budget={"gpu_hours": 1.0, "target_loss": 2.0})
    with pytest.raises(InputError, match=part):
        apply_resume_changes(config, overrides)


def test_a_resume_may_raise_every_limit_and_drop_it():
    config = config_for(WIDE, budget={"gpu_hours": 1.0, "target_loss": 2.0})
    more = {
        "sweep.budget.gpu_hours": 2,
        "sweep.budget.wall_clock_hours": 3.0,
        "sweep.budget.target_loss": 1.0,
        "sweep.num_trials": 9,
    }
    raised = apply_resume_changes(config, more).sweep.budget.model_dump()
    assert raised == {"gpu_hours": 2.0, "wall_clock_hours": 3.0, "target_loss": 1.0, "target_metric": None, "full_trials": None}
    assert apply_resume_changes(config, {"sweep.budget.gpu_hours": None}).sweep.budget.gpu_hours is None


@pytest.mark.parametrize(("begun", "given"), [(None, 1.5), (None, 1.0), (3.0, None), (3.0, 2.9)])
def test_a_sweep_that_pauses_trials_gets_no_fewer_tokens_on_resume_and_null_is_no_way_around(begun, given):
    config = config_for(WIDE, "freeze_thaw", num_trials=8, budget={"full_trials": begun})  # null means 2 here
    part = f"full_trials = {given}: must be at least {2 if begun is None else 3} on resume"
    with pytest.raises(InputError, match=re.escape(part)) as found:
        apply_resume_changes(config, {"sweep.budget.full_trials": given})
    assert "no limit" not in str(found.value)
    edited = config_for(WIDE, "freeze_thaw", num_trials=8, budget={"full_trials": given})
    with pytest.raises(InputError, match=re.escape(part)):
        refuse_edits(edited, config)


def test_a_sweep_that_pauses_trials_may_get_more_tokens():
    config = config_for(WIDE, "freeze_thaw", num_trials=8)
    assert apply_resume_changes(config, {"sweep.budget.full_trials": 2}).effective_budget.full_trials == 2
    assert apply_resume_changes(config, {"sweep.num_trials": 40}).effective_budget.full_trials == 10
    dropped = {"sweep.budget.full_trials": None, "sweep.num_trials": 40}
    assert apply_resume_changes(config_for(WIDE, "freeze_thaw", budget={"full_trials": 3}), dropped).sweep.num_trials == 40


@pytest.mark.parametrize("sampler", ["freeze_thaw", "tpe", "grid"])
def test_tokens_that_end_before_the_first_report_are_refused(sampler):
    for too_few in (1e-9, 0.01, 0.24):
        with pytest.raises(InputError, match=r"full_trials = .*: must be at least 0\.25, because a trial's first report"):
            config_for(WIDE, sampler, budget={"full_trials": too_few})
    assert config_for(WIDE, sampler, budget={"full_trials": 0.25}).sweep.budget.full_trials == 0.25


@pytest.mark.faults
def test_a_whole_sweep_ends_at_its_target_and_goes_on_from_there(tmp_path):
    # losses of rank 16: 2.06 + 0.5 / rung, and up to 0.006
    space = {"optim.learning_rate": {"low": 9e-4, "high": 1.1e-3}}
    process = start(
        tmp_path,
        optim={"eps": 0.1},
        space=space,
        sweep={"num_trials": 6, "budget": {"target_loss": 2.35}},
        pruner={"name": "none"},
    )
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    folder = sweep_folder(tmp_path)
    ended = results(folder)
    assert len(ended) <= 3 and {result["outcome"] for result in ended.values()} <= {"STOPPED", "COMPLETE"}
    stopped = [number for number, result in ended.items() if result["outcome"] == "STOPPED"]
    assert stopped and all(len(rungs(folder, number)) < 4 for number in stopped)
    assert "sweep.budget.target_loss = 2.35 is reached" in out
    assert (folder / "best" / "adapter_model.safetensors").is_file()
    assert all(result["slot"] for result in ended.values())

    resumed = fake_driver("resume", str(folder), json.dumps({"sweep.budget.target_loss": None}))
    out, err = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, err
    assert {result["outcome"] for result in results(folder).values()} == {"COMPLETE"} and len(results(folder)) == 6
    assert all(rungs(folder, number) == [1, 2, 3, 4] for number in range(6))
