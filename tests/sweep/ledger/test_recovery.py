"""A resume keeps the killed sweep's proposals, verdicts, files, deaths and paths (no Ray)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sweep.execution.interruption import Interruption
from sweep.folder.notes import note_terminated
from sweep.folder.sweep_folder import SweepFolder
from sweep.ledger.ledger import Ledger, Next
from sweep.ledger.limits import Limits
from sweep.plan.feasibility import Fit
from sweep.space.parse import parse_space
from sweep.study.study import Study
from sweep.trials.record import Outcome
from tests.support.studies import WIDE, config_for, ledger_in, report, study_in, write_reports


def propose(path: Path, sampler: str, reopen: bool) -> list[dict]:
    """Return the params of 8 trials, each told before the next is asked for.

    reopen: use a new study object for every trial.
    """
    path.mkdir()
    config = config_for(WIDE, sampler, "none")
    study, params = study_in(path, config), []
    for _ in range(8):
        proposal = study.ask()
        params.append(proposal.params)
        study.report(proposal.number, 1, 2.0 + 100 * proposal.config.optim.learning_rate)
        study.tell(proposal.number, Outcome.COMPLETE)
        study = study_in(path, config) if reopen else study
    return params


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes", pytest.param("gp", marks=pytest.mark.faults)])
def test_a_study_reopened_before_every_trial_proposes_what_one_left_open_proposes(tmp_path, sampler):
    assert propose(tmp_path / "open", sampler, False) == propose(tmp_path / "reopened", sampler, True)


def test_proposals_of_different_numbers_and_seeds_are_independent(tmp_path):
    params = propose(tmp_path / "a", "random", True)
    assert len({json.dumps(each) for each in params}) == len(params)


def test_the_trial_whose_report_spent_the_budget_is_stopped_and_not_pruned_after_a_kill(tmp_path):
    config, outcomes = config_for(WIDE, budget={"full_trials": 1.25}), []
    for is_killed in (False, True):
        path = tmp_path / str(is_killed)
        path.mkdir()
        ledger = ledger_in(path, config, num_slots=1)
        good = ledger.next_trial().number
        for rung in range(1, 5):
            write_reports(path, good, [report(one, 2.0) for one in range(1, rung + 1)])
            ledger.reported(good, report(rung, 2.0))
        ledger.ended(good, Outcome.COMPLETE)
        bad = ledger.next_trial().number
        write_reports(path, bad, [report(1, 9.0)])
        if is_killed:
            ledger._study.report(bad, 1, 9.0)
            ledger = ledger_in(path, config, num_slots=1)
            assert ledger.recover() == []
        else:
            assert ledger.reported(bad, report(1, 9.0))
        outcomes.append([record.outcome for record in ledger.records])
    assert outcomes == [[Outcome.COMPLETE, Outcome.STOPPED]] * 2


def test_a_verdict_lost_in_a_kill_is_given_again(tmp_path):
    config = config_for(WIDE)
    ledger = ledger_in(tmp_path, config)
    good, bad = ledger.next_trial(), ledger.next_trial()
    for number, loss in ((good.number, 2.0), (bad.number, 9.0)):
        write_reports(tmp_path, number, [report(1, loss)])
    ledger.reported(good.number, report(1, 2.0))
    ledger._study.report(bad.number, 1, 9.0)  # here the driver is killed
    resumed = ledger_in(tmp_path, config)
    assert resumed.recover() == [good.number]
    assert resumed.records[bad.number].outcome is Outcome.PRUNED


def test_results_that_a_kill_kept_from_the_folder_are_written_on_resume(tmp_path):
    """For a refused trial and for one that ended; an existing result is not touched."""
    config = config_for(WIDE, num_trials=2)
    refuse = Fit(None, "needs 30 GiB", 30.0, 6.0)
    folder = SweepFolder(tmp_path)
    refused = Study(folder, config, parse_space(config.space), lambda config: refuse).ask()
    study = study_in(tmp_path, config)
    ended, written = study.ask(), study.ask()
    study.tell(ended.number, Outcome.FAILED, "why")
    study.tell(written.number, Outcome.FAILED, "why")
    folder.write_result(written.number, {"outcome": "as it was"})
    (folder.trial(refused.number) / "train_config.json").unlink()

    ledger_in(tmp_path, config).recover()
    results = [json.loads((folder.trial(n) / "result.json").read_text()) for n in range(3)]
    assert [result["outcome"] for result in results] == ["INFEASIBLE", "FAILED", "as it was"]
    assert (results[0]["error"], results[0]["predicted_peak_gib"]) == ("needs 30 GiB", 30.0)
    assert (folder.trial(refused.number) / "train_config.json").is_file()


def test_deaths_are_counted_across_resumes_and_forgiven_by_a_new_report(tmp_path):
    config = config_for(WIDE, num_trials=1)
    first = ledger_in(tmp_path, config, max_retries=1)
    number = first.next_trial().number
    first.lost(number, "its node was lost")
    first.next_trial()
    first.reported(number, report(1, 2.0))
    first.lost(number, "its node was lost")
    second = ledger_in(tmp_path, config, max_retries=1)
    assert second.recover() == [number]
    second.next_trial()
    second.lost(number, "its node was lost")
    (record,) = second.records
    assert record.outcome is Outcome.LOST
    assert record.error == "lost 2 times in a row without a new report; the last time, its node was lost"


def test_a_trial_whose_process_was_asked_to_end_goes_on_and_nothing_is_held_against_it(tmp_path):
    config = config_for(WIDE, pruner="none")
    ledger = ledger_in(tmp_path, config, max_retries=0)
    number = ledger.next_trial().number
    for _ in range(3):
        note_terminated(SweepFolder(tmp_path).trial(number))
        ledger.lost(number)
        assert ledger.next_trial().number == number
    ledger.released(number)  # as a worker that lives on reports it
    assert ledger.next_trial().number == number
    ledger.lost(number)  # the twin: without the note it is a death, and one exceeds the limit here
    assert ledger.records[number].outcome is Outcome.LOST


def test_a_sweep_that_winds_down_starts_nothing_and_a_resume_goes_on_with_what_ran(tmp_path):
    config = config_for(WIDE, pruner="none")
    ledger = ledger_in(tmp_path, config)
    numbers = [ledger.next_trial().number for _ in range(2)]
    ledger.wind_down()
    assert not ledger.reported(numbers[0], report(1, 2.0))  # a late report still counts
    for number in numbers:
        ledger.released(number, {"slot": f"gpu{number}", "parts": {"train": 1e-9}})
    assert [span.slot for span in ledger.timeline.spans] == [f"gpu{number}" for number in numbers]
    assert all(span.parts["train"] > 0.0 for span in ledger.timeline.spans)  # what they did since their reports is known
    assert not ledger.live and ledger.next_trial() is Next.WAIT
    assert ledger_in(tmp_path, config).recover() == numbers


def test_an_end_waits_only_for_trials_that_may_have_something_to_save(tmp_path):
    ledger = ledger_in(tmp_path, config_for(WIDE, pruner="none"))
    numbers = [ledger.next_trial().number for _ in range(2)]
    assert ledger.live.num_training(SweepFolder(tmp_path)) == 0  # both load their model
    with Interruption(lambda: None).training(SweepFolder(tmp_path).trial(numbers[1])):
        assert ledger.live.num_training(SweepFolder(tmp_path)) == 1
        ledger.released(numbers[1])
        assert ledger.live.num_training(SweepFolder(tmp_path)) == 0
    ledger.next_trial()
    assert ledger.live.num_training(SweepFolder(tmp_path)) == 0


def test_a_trial_is_silent_only_after_its_timeout_and_only_while_it_has_a_slot(tmp_path):
    config, now = config_for(WIDE, pruner="none"), [0.0]
    ledger = Ledger(
        study_in(tmp_path, config), SweepFolder(tmp_path),
        Limits(num_trials=2, num_rungs=4, num_slots=2, max_retries=1, report_timeout_s=10.0), monotonic=lambda: now[0],
    )  # fmt: skip
    number = ledger.next_trial().number
    now[0] = 9.0
    ledger.live.still_waits(number)
    now[0] = 18.0
    assert not ledger.live.is_silent(number)
    ledger.reported(number, report(1, 2.0))
    now[0] = 28.5
    assert ledger.live.is_silent(number)
    ledger.lost(number, "it had not reported")
    assert not ledger.live.is_silent(number)
