"""Which steps the tokens allow, and which rungs a score looks ahead to."""

import numpy as np
import pytest

from sweep.curves.acquisition import Options, affordable, best_option, expected_improvement, expected_winner, rungs_ahead

GRID = np.array([1, 2, 4, 8, 16])


def options(rungs, running=(), new=0):
    """Return the options of begun trials that have reached `rungs`, then `new` candidates; a full trial costs 16."""
    count = len(rungs) + new
    rung = np.array([*rungs, *[0] * new])
    seen = np.array([0, *GRID])[rung]
    price = np.array([0, *GRID])[np.minimum(rung + 1, 5)] - seen
    is_running = np.isin(np.arange(count), running)
    has_begun = np.arange(count) < len(rungs)
    to_finish = 16 - seen - is_running * price
    return Options(
        rung, seen, price, to_finish, ~is_running & (rung < 5), has_begun, has_begun, is_running, np.zeros(count, np.int64)
    )


def allowed(known, overtakes, tokens_left):
    return affordable(known, 0, np.array(overtakes), tokens_left).tolist()


def test_the_tokens_that_finish_the_winner_stay():
    known = options([3, 3], new=1)  # 12 tokens finish the winner, a step of another costs 4, a new one 1
    assert allowed(known, [0.5, 0.3, 0.1], 40) == [True, True, True]
    assert allowed(known, [0.5, 0.3, 0.1], 15) == [True, False, False]  # 15 - 4 < 12, and a new one needs 16 to its end
    assert allowed(known, [0.5, 0.3, 0.1], 16) == [True, True, True]
    assert allowed(known, [0.5, 0.3, 0.1], 11) == [False, False, False]


@pytest.mark.parametrize(("chance", "kept"), [(0.5, 8), (0.25, 4), (0.0, 0)])
def test_a_running_rival_keeps_what_its_chance_to_win_is_worth(chance, kept):
    """Trial 1 runs to rung 4, and 8 tokens finish it then. The winner needs 12, and trial 2 takes a step of 4."""
    known = options([3, 3, 3], running=[1])
    least = 12 + 4 + kept
    assert allowed(known, [0.5, chance, 0.1], least)[2]
    assert not allowed(known, [0.5, chance, 0.1], least - 1)[2]


def test_the_more_rivals_run_the_fewer_begin():
    one, two = options([3, 3, 3, 3], running=[1]), options([3, 3, 3, 3], running=[1, 2])
    assert allowed(one, [0.5] * 4, 24)[3] and not allowed(two, [0.5] * 4, 24)[3]
    assert allowed(two, [0.5] * 4, 32)[3]


def test_a_running_trial_that_cannot_win_keeps_nothing():
    known = options([3, 3, 3], running=[1])
    lost = Options(**{**vars(known), "may_win": np.array([True, False, True])})
    assert allowed(lost, [0.5, 0.5, 0.1], 16)[2]


class Told:
    """Predictions: how far each option lies behind, by half a unit of deviation, and a last rung alone that tells of it."""

    def __init__(self, *mean):
        self.mean = np.array(mean)

    def spread(self, one):
        return np.where(np.arange(len(self.mean)) == one, 1e-5, 0.5)

    open_spread = spread

    def told(self, options, rungs, other):
        return np.where(rungs == len(GRID) - 1, 0.45, 1e-6)


def test_no_rival_passes_the_winner_while_the_tokens_finish_both():
    """The winner, trial 0, needs 15 tokens. Trial 1 needs 12, so it tells as much for fewer, and scores higher."""
    assert [best_option(Told(0.0, 0.1), options([1, 3]), GRID, 0, left) for left in (27, 26)] == [0, 1]
    assert best_option(Told(0.0, -0.3), options([4, 3]), GRID, 0, 40) == 1  # not as far yet
    assert best_option(Told(0.0, 0.1), options([5, 3]), GRID, 0, 40) == 1  # the winner has ended
    assert best_option(Told(0.0, 0.1), options([1, 3], running=[0]), GRID, 0, 60) == 1  # or is running
    assert best_option(Told(0.0, 0.1, -0.4), options([1, 3], new=1), GRID, 0, 40) == 2  # a new one passes nobody


def test_what_can_be_finished_and_is_lowest_is_the_winner():
    known, mean = options([1, 3, 5]), np.array([1.0, 2.0, 3.0])
    assert [expected_winner(known, mean, left) for left in (15, 14, 11)] == [0, 1, 2]
    assert expected_winner(options([], new=2), mean[:2], 99) is None


def test_rungs_ahead_are_the_next_those_of_four_times_the_tokens_and_the_last():
    known = options([1, 0, 5, 4])
    place, rung = rungs_ahead(known, GRID, np.arange(4))
    assert list(zip(place.tolist(), rung.tolist())) == [(0, 1), (0, 3), (0, 4), (1, 0), (1, 2), (1, 4), (3, 4)]


def test_expected_improvement_is_the_mean_of_what_lies_below():
    draws = np.random.default_rng(0).normal(0.3, 0.8, 400_000)
    found = expected_improvement(np.array([0.3]), np.array([0.8]))[0]
    assert found == pytest.approx(np.maximum(-draws, 0.0).mean(), rel=0.01)
