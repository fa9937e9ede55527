"""The plain policy promotes the best third of a rung, and always keeps the tokens to finish one trial."""

from __future__ import annotations

from typing import Any

from sweep.curves.promotion import BestFirst
from sweep.curves.situation import CurveState, GoOn, Situation, Stand, StartNew
from sweep.trials.record import Outcome

GRID = (100, 200, 300, 400)
OUTCOMES = {Stand.FREE: Outcome.PAUSED, Stand.RUNNING: Outcome.RUNNING, Stand.OVER: Outcome.COMPLETE}
NEW: dict[str, Any] = {"lora.rank": 8}


def decide(*curves: tuple[Stand, tuple[float, ...]], left: int = 10_000, candidates=(NEW,), is_earlier: bool = False):
    trials = {
        number: CurveState(number, {}, losses, stand, OUTCOMES[stand], is_earlier)
        for number, (stand, losses) in enumerate(curves)
    }
    return BestFirst(GRID).decide(Situation(trials, candidates, left, 1, len(candidates)))


FREE, RUNNING, OVER = Stand.FREE, Stand.RUNNING, Stand.OVER


def test_new_trials_begin_until_a_third_of_a_rung_is_somebody():
    assert decide() == StartNew(NEW)
    assert decide((FREE, (2.0,)), (FREE, (1.0,))) == StartNew(NEW)
    assert decide((FREE, (2.0,)), (FREE, (1.0,)), (FREE, (3.0,))) == GoOn(1)
    # it has gone on: the next best of three is no third
    assert decide((FREE, (2.0,)), (FREE, (1.0, 0.9)), (FREE, (3.0,))) == StartNew(NEW)


def test_a_trial_passed_over_before_is_promoted_once_enough_are_worse():
    worse = [(FREE, (4.0 + number,)) for number in range(4)]
    assert decide((FREE, (2.0,)), (FREE, (1.0, 0.9)), *worse) == GoOn(0)


def test_without_a_point_to_try_the_lowest_loss_goes_on():
    assert decide((FREE, (2.0,)), (FREE, (1.0, 1.5)), candidates=()) == GoOn(1)
    assert decide((RUNNING, (2.0,)), (OVER, (1.0, 0.9, 0.8, 0.7)), candidates=()) is None


def test_the_tokens_to_finish_the_best_trial_are_spent_on_nothing_else():
    curves = (FREE, (2.0,)), (FREE, (1.0,))
    assert decide(*curves, left=400) == StartNew(NEW)
    assert decide(*curves, left=399) == GoOn(1)
    assert decide(*curves, left=99) is None
    # it runs: its next rung is paid for, and 200 more are kept
    running = (RUNNING, (1.0,)), (FREE, (2.0,))
    assert decide(*running, left=299, candidates=()) is None
    assert decide(*running, left=300, candidates=()) == GoOn(1)


def test_nothing_is_kept_once_a_trial_of_this_sweep_is_complete():
    complete = (OVER, (1.0, 0.9, 0.8, 0.7))
    assert decide((FREE, (2.0,)), complete, left=100) == StartNew(NEW)
    assert decide((FREE, (2.0,)), complete, left=100, is_earlier=True) == GoOn(0)  # the twin: of an earlier sweep
