"""Replays decide through Ray Tune's hooks, and decide what the ledger alone would."""

from __future__ import annotations

import json

import pytest

from sweep.execution.scheduler import LedgerScheduler
from sweep.execution.searcher import LedgerSearcher
from sweep.trials.record import Outcome, Proposal

from .clock import Clock, Turn
from .curve_files import CURVES
from .points import Point, Task
from .product_side import ProductSide
from .recorded_tasks import content_of, make_task
from .replay import shown_seeds
from .strategies import STRATEGIES, Setting


@pytest.fixture(scope="module")
def recorded() -> Task:
    return make_task(content_of(CURVES / "docs.json.gz")).part(0.5, 3)


class LedgerSide(ProductSide):
    """Ask the ledger itself, without searcher and scheduler."""

    def next_trial(self):
        proposal = self._ledger.next_trial()
        if not isinstance(proposal, Proposal):
            return None
        return Turn(proposal.number, self._task.nearest(proposal.params), proposal.num_heard + 1)

    def reported(self, turn, eval_loss):
        report = self._report(turn, eval_loss)
        if turn.rung == len(self._task.grid):
            self._ledger.ended(turn.number, Outcome.COMPLETE, report)
            return False
        return not self._ledger.reported(turn.number, report)

    def diverged(self, turn):
        self._ledger.ended(turn.number, Outcome.DIVERGED)


class Told:
    """Pass the clock's calls on, and keep each with its answer."""

    def __init__(self, side) -> None:
        self._side, self.calls = side, []

    def __getattr__(self, name):
        def call(*arguments):
            answer = getattr(self._side, name)(*arguments)
            self.calls.append((name, arguments, answer))
            return answer

        return call


@pytest.mark.parametrize("num_slots", [1, 4])
@pytest.mark.parametrize("name", ["random_halving", "tpe_halving", "freeze_thaw"])
def test_searcher_and_scheduler_decide_as_the_ledger_does_trial_by_trial(recorded, monkeypatch, name, num_slots):
    told, ends = [], []
    for kind in (ProductSide, LedgerSide):
        monkeypatch.setattr("tests.search.strategies.ProductSide", kind)
        clock = Clock(recorded, shown_seeds(recorded, 3), num_slots, 3)
        side = STRATEGIES[name].make(Setting(recorded, 3, num_slots, 8.0, lambda clock=clock: clock.now))
        told.append(Told(side))
        clock.run(told[-1], [4.0, 8.0])
        ends.append([(record.number, record.outcome, record.params, len(record.reports)) for record in side._ledger.records])
    assert told[0].calls == told[1].calls and ends[0] == ends[1]
    assert {outcome for _, outcome, *_ in ends[0]} & {Outcome.PRUNED, Outcome.PAUSED}
    assert len(told[0].calls) > 120


def test_a_replay_asks_the_searcher_for_each_stay_and_tells_it_of_each_end(recorded, monkeypatch):
    suggested, ended, judged = [], [], []
    for kind, method, calls in ((LedgerSearcher, "suggest", suggested), (LedgerSearcher, "on_trial_complete", ended),
                                (LedgerScheduler, "on_trial_result", judged)):  # fmt: skip
        real = getattr(kind, method)
        monkeypatch.setattr(kind, method, lambda self, *given, real=real, calls=calls: calls.append(given) or real(self, *given))
    clock = Clock(recorded, shown_seeds(recorded, 0), 2, 0)
    side = STRATEGIES["freeze_thaw"].make(Setting(recorded, 0, 2, 4.0, lambda: clock.now))
    clock.run(side, [4.0])
    stays, left = {trial_id for (trial_id,) in suggested}, [trial_id for trial_id, _ in ended]
    assert len(stays) == len(suggested) and len(set(left)) == len(left) > 8 and set(left) <= stays
    by_outcome = {outcome: sum(result["outcome"] == outcome for _, result in ended) for outcome in ("RUNNING", "COMPLETE")}
    assert by_outcome["RUNNING"] and by_outcome["COMPLETE"] and all(result["done"] for _, result in ended)
    num_reports = sum(len(record.reports) for record in side._ledger.records)
    assert len(judged) + by_outcome["COMPLETE"] == num_reports
    rungs = [json.loads(result["report"])["rung"] for _, _, result in judged]
    assert max(rungs) < len(recorded.grid)  # the last report is done, and Tune shows that to the searcher alone


def test_an_error_that_looks_like_a_full_disk_ends_the_replay():
    points = tuple(Point({"optim.learning_rate": rate}, ((1.0, 0.5),)) for rate in (1e-4, 1e-3))
    task = Task("t", (100, 200), points)
    side = ProductSide(task, {"sampler": {"name": "random"}}, 1, 2, lambda: 0.0)

    def full() -> None:
        raise OSError(28, "No space left on device")

    side._ledger.next_trial = full
    with pytest.raises(RuntimeError, match="cannot be written"):
        side.next_trial()
