"""The ledger, without Ray, fills its slots, and a death or a kill loses nothing."""

from __future__ import annotations

import pytest

from sweep.ledger.ledger import Next
from sweep.trials.record import Outcome
from tests.support.studies import WIDE, config_for, ledger_in, report, write_reports


def test_the_ledger_fills_its_slots_and_finishes_when_nothing_runs(tmp_path):
    ledger = ledger_in(tmp_path, config_for(WIDE, pruner="none", num_trials=3))
    first, second = ledger.next_trial(), ledger.next_trial()
    assert ledger.next_trial() is Next.WAIT
    ledger.ended(first.number, Outcome.COMPLETE, report(1, 2.0))
    third = ledger.next_trial()
    ledger.ended(second.number, Outcome.FAILED, error="why")
    assert ledger.next_trial() is Next.WAIT
    ledger.ended(third.number, Outcome.COMPLETE, report(1, 3.0))
    assert ledger.next_trial() is Next.FINISHED
    assert [record.outcome for record in ledger.records] == [Outcome.COMPLETE, Outcome.FAILED, Outcome.COMPLETE]


def test_a_trial_whose_process_dies_goes_on_with_its_number_and_is_lost_in_the_end(tmp_path):
    ledger = ledger_in(tmp_path, config_for(WIDE, num_trials=1), max_retries=1)
    first = ledger.next_trial()
    ledger.lost(first.number)
    again = ledger.next_trial()
    assert (again.number, again.config) == (first.number, first.config)
    ledger.lost(first.number)
    assert ledger.next_trial() is Next.FINISHED
    assert ledger.records[0].outcome is Outcome.LOST


def test_after_a_kill_unheard_reports_are_reported_and_finished_trials_told(tmp_path):
    config = config_for(WIDE, pruner="none", num_trials=4)
    ledger = ledger_in(tmp_path, config, num_slots=3)
    running, finished, unheard = (ledger.next_trial() for _ in range(3))
    ledger.reported(finished.number, report(1, 3.0))
    write_reports(tmp_path, finished.number, [report(rung, 3.0 - rung / 10) for rung in range(1, 5)])
    write_reports(tmp_path, unheard.number, [report(1, 4.0)])

    resumed = ledger_in(tmp_path, config, num_slots=3)
    assert resumed.recover() == [running.number, unheard.number]
    assert resumed.records[finished.number].outcome is Outcome.COMPLETE
    assert resumed.records[finished.number].score == pytest.approx(2.6)
    assert [resumed.next_trial().number for _ in range(3)] == [running.number, unheard.number, 3]
