"""One rule chooses the winner and orders the rest."""

import math

import pytest

from sweep.trials.record import Outcome
from sweep.trials.selection import Rule
from tests.support.records import trial


def numbers(records):
    return [record.number for record in records]


def test_the_lowest_loss_over_all_reports_wins_not_the_last_one():
    assert Rule().best([trial(0, 2.0, 1.0, 1.9), trial(1, 1.5, 1.4)]).number == 0


def test_a_pruned_trial_cannot_win_however_low_its_loss():
    assert Rule().best([trial(0, 2.0), trial(1, 0.5, outcome=Outcome.PRUNED)]).number == 0


def test_a_tie_goes_to_the_smaller_adapter_then_to_the_lower_number():
    assert Rule().best([trial(0, 1.00000, num_trainable=200), trial(1, 1.00009, num_trainable=100)]).number == 1
    assert Rule().best([trial(0, 1.00000, num_trainable=200), trial(1, 1.00020, num_trainable=100)]).number == 0
    assert Rule().best([trial(5, 1.0), trial(3, 1.0)]).number == 3


@pytest.mark.parametrize("records", [[], [trial(0)], [trial(0, math.nan)], [trial(0, 1.0, outcome=Outcome.DIVERGED)]])
def test_without_a_complete_trial_that_was_measured_nobody_wins(records):
    assert Rule().best(records) is None


def test_complete_trials_come_first_then_pruned_then_the_rest_by_number():
    records = [
        trial(0, outcome=Outcome.FAILED),
        trial(1, 0.1, outcome=Outcome.PRUNED),
        trial(2, 3.0),
        trial(3, 2.0),
        trial(4, outcome=Outcome.PRUNED),
        trial(5, 0.0, outcome=Outcome.OUT_OF_MEMORY),
    ]
    assert numbers(Rule().rank(records)) == [3, 2, 1, 4, 0, 5]


def test_the_first_of_the_ranking_is_the_winner_also_in_a_tie():
    records = [trial(0, 1.0, num_trainable=200), trial(1, 1.00005, num_trainable=100), trial(2, 1.00001, num_trainable=300)]
    assert Rule().rank(records)[0] is Rule().best(records)
    assert numbers(Rule().rank(records)) == [1, 0, 2]
