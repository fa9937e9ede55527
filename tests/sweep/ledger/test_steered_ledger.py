"""Commands steer the ledger without Ray: each is in the journal first, and what is refused is one line."""

from __future__ import annotations

import pytest

from sweep.folder.notes import LEAVE
from sweep.folder.sweep_folder import SweepFolder
from sweep.ledger.ledger import Next
from sweep.plan.feasibility import UNPREDICTED, Fit
from sweep.steering.command import parse_words
from sweep.steering.inbox import send
from sweep.study.kept_commands import read_commands
from sweep.trials.record import Outcome
from tests.support.steered import steered
from tests.support.studies import WIDE, config_for, report


def test_a_stopped_trial_leaves_once_it_has_saved_and_is_pruned(tmp_path):
    ledger, tell = steered(tmp_path)
    first = ledger.next_trial()
    note = SweepFolder(tmp_path).trial(first.number) / LEAVE
    assert tell("stop 0") is None and note.exists() and 0 in ledger.live
    assert ledger.next_trial() is Next.WAIT
    ledger.released(first.number)
    assert not note.exists() and ledger.records[0].outcome is Outcome.PRUNED
    assert ledger.records[0].error == "stopped by ann@box"
    assert ledger.next_trial().number == 1


@pytest.mark.parametrize("how", ["a report", "a death"])
def test_a_trial_that_was_told_to_stop_leaves_at_whatever_comes_first(tmp_path, how):
    ledger, tell = steered(tmp_path)
    ledger.next_trial()
    tell("stop 0")
    if how == "a report":
        assert ledger.reported(0, report(1, 2.0))
    else:
        ledger.lost(0)
    assert ledger.records[0].outcome is Outcome.PRUNED and not ledger.live


def test_a_paused_trial_waits_for_go_on_and_gives_its_slot_away(tmp_path):
    ledger, tell = steered(tmp_path)
    ledger.next_trial()
    assert not ledger.reported(0, report(1, 2.0))
    tell("pause 0")
    ledger.released(0)
    assert ledger.records[0].outcome is Outcome.PAUSED
    assert ledger.next_trial().number == 1
    assert tell("go-on 0") is None and ledger.next_trial() is Next.WAIT
    ledger.ended(1, Outcome.COMPLETE, report(4, 1.0))
    again = ledger.next_trial()
    assert (again.number, again.num_heard) == (0, 1)
    assert ledger.records[0].outcome is Outcome.RUNNING


def test_a_pause_that_is_taken_back_in_time_costs_nothing(tmp_path):
    ledger, tell = steered(tmp_path)
    ledger.next_trial()
    tell("pause 0")
    tell("go-on 0")
    assert not (SweepFolder(tmp_path).trial(0) / LEAVE).exists()
    ledger.released(0)  # its process had seen the note
    assert ledger.next_trial().number == 0


def test_a_paused_trial_does_not_keep_the_sweep_from_its_end_and_can_still_be_stopped(tmp_path):
    ledger, tell = steered(tmp_path, config_for(WIDE, pruner="none", num_trials=1))
    ledger.next_trial()
    tell("pause 0")
    ledger.released(0)
    assert ledger.next_trial() is Next.FINISHED and not ledger.has_work()
    assert ledger.shortfall == "1 trial paused by a command until `go-on`"
    assert tell("stop 0") is None and ledger.records[0].outcome is Outcome.PRUNED
    assert ledger.shortfall is None


def test_a_kept_trial_is_not_pruned(tmp_path):
    outcomes = {}
    for keep in (False, True):
        ledger, tell = steered(tmp_path / str(keep), config_for(WIDE, pruner="median", num_trials=9), num_slots=9)
        for _ in range(9):
            ledger.next_trial()
        for number in range(7):
            for rung in (1, 2, 3):
                ledger.reported(number, report(rung, 1.0))
            ledger.ended(number, Outcome.COMPLETE, report(4, 1.0))
        if keep:
            assert tell("keep 7") is None
        outcomes[keep] = [ledger.reported(7, report(rung, 9.0)) for rung in (1, 2)]
    assert outcomes[True] == [False, False] and True in outcomes[False]


def test_added_trials_follow_and_finish_ends_after_what_runs(tmp_path):
    limits = []
    ledger, tell = steered(tmp_path, config_for(WIDE, pruner="none", num_trials=1), on_limits=limits.append)
    ledger.next_trial()
    assert tell("add 2") is None and limits[-1].num_trials == 3
    ledger.ended(0, Outcome.COMPLETE, report(4, 2.0))
    assert ledger.next_trial().number == 1
    assert tell("finish") is None
    ledger.ended(1, Outcome.COMPLETE, report(4, 2.0))
    assert ledger.next_trial() is Next.FINISHED
    assert ledger.shortfall == "ann@box finished the sweep: 2 of 3 trials started; `add` goes on"
    assert tell("add 1") is None and ledger.next_trial().number == 2


def test_a_command_that_comes_as_the_sweep_ends_is_still_taken(tmp_path):
    ledger, _ = steered(tmp_path, config_for(WIDE, pruner="none", num_trials=1))
    ledger.next_trial()
    ledger.ended(0, Outcome.COMPLETE, report(4, 2.0))
    send(SweepFolder(tmp_path), parse_words(["add", "1"], "ann@box", 0.0, "1"))
    assert ledger.next_trial() is Next.WAIT
    assert ledger.next_trial().number == 1


def test_a_larger_budget_continues_what_the_old_one_stopped(tmp_path):
    config = config_for(WIDE, pruner="none", num_trials=2, budget={"full_trials": 0.5})
    ledger, tell = steered(tmp_path, config)
    ledger.next_trial()
    ledger.reported(0, report(1, 2.0))
    assert ledger.reported(0, report(2, 2.0)) and ledger.records[0].outcome is Outcome.STOPPED
    assert "is spent" in tell("add 1") and "`budget` allows more" in tell("try lora.rank=8")
    assert "must be at least 0.5" in tell("budget full_trials=0.25")
    assert tell("budget full_trials=2") is None
    assert ledger.next_trial().number == 0


def test_own_points_are_tried_next_once_they_fit(tmp_path):
    ledger, tell = steered(
        tmp_path, fit_check=lambda config: Fit(2.0, "needs 3 GiB", 1.0) if config.lora.rank == 2 else UNPREDICTED
    )
    ledger.next_trial()
    assert tell("try lora.rank=8 lora.use_rslora=true") is None
    assert tell("clone 1 optim.learning_rate=0.003") is None
    assert "does not fit the card: needs 3 GiB" in tell("clone 1 lora.rank=2")
    assert "another trial has that point already" in tell("clone 1 optim.learning_rate=0.003")
    ledger.ended(0, Outcome.COMPLETE, report(4, 2.0))
    second = ledger.next_trial()
    assert (second.number, second.config.lora.rank, second.config.lora.use_rslora, second.num_heard) == (1, 8, True, 0)
    ledger.ended(1, Outcome.COMPLETE, report(4, 2.0))
    third = ledger.next_trial()
    assert third.number == 2 and third.params == {**second.params, "optim.learning_rate": 0.003}
    ledger.ended(2, Outcome.COMPLETE, report(4, 2.0))
    assert ledger.next_trial().number == 3  # the trials asked for still come


def test_what_makes_no_sense_is_refused_in_one_line_and_kept_in_the_journal(tmp_path):
    ledger, tell = steered(tmp_path, num_slots=2)
    ledger.next_trial()
    ledger.next_trial()
    ledger.ended(0, Outcome.DIVERGED)
    refused = {
        "stop 7": "this sweep has no trial 7",
        "stop 0": "trial 0 is over: DIVERGED",
        "go-on 0": "trial 0 is over: DIVERGED; `clone 0 ...` begins another one like it",
        "go-on 1": "trial 1 is not paused: RUNNING",
        "try lora.rank=3": "lora.rank = 3 is outside the space: 2, 4, 8",
        "try lora.rnk=4": "lora.rnk is not varied",
        "clone 1 train.seed=4": "train.seed is not varied",
        "budget gpu_hours=-1": "sweep.budget.gpu_hours = -1",
    }
    for words, line in refused.items():
        found = tell(words)
        assert line in found and "\n" not in found
    tell("pause 1")
    assert "trial 1 does not run: PAUSED" in tell("pause 1")
    tell("stop 1")
    assert "trial 1 is about to stop: ann@box asked for that" in tell("keep 1")
    assert len(read_commands(SweepFolder(tmp_path))) == len(refused) + 4


def test_a_file_that_is_no_command_is_said_and_removed(tmp_path):
    notes = []
    ledger, tell = steered(tmp_path, note=notes.append)
    tell("finish")
    (SweepFolder(tmp_path).commands / "x.json").write_text("[]")
    ledger.take_commands()
    assert "x.json" in notes[-1] and list(SweepFolder(tmp_path).commands.iterdir()) == []


def test_the_folder_is_looked_at_twice_a_second_at_most(tmp_path):
    now = [0.0]
    ledger, _ = steered(tmp_path, monotonic=lambda: now[0])
    ledger.poll()
    send(SweepFolder(tmp_path), parse_words(["finish"], "ann@box", 0.0, "1"))
    now[0] = 0.4
    ledger.poll()
    assert not read_commands(SweepFolder(tmp_path))
    now[0] = 0.6
    ledger.poll()
    assert len(read_commands(SweepFolder(tmp_path))) == 1
