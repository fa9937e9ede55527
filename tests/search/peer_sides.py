"""Drive strategies of others: Ray Tune's ASHA and OptunaSearch, and "one look, keep the best".

Proposals are replaced by the nearest recorded config that was not trained yet, as for the product.
The chosen adapter is the one with the lowest loss in the last report of any trial, stopped ones
included: `ResultGrid.get_best_result` does that.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, Protocol

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from ray.tune.schedulers import ASHAScheduler

from .clock import Choice, Turn
from .points import Task
from .product_side import RecordedSpace


class Searcher(Protocol):
    """Propose points of the space, and learn from trials that have ended."""

    def propose(self) -> dict[str, Any]: ...

    def ended(self, params: dict[str, Any], eval_loss: float) -> None: ...


class RandomSearcher:
    """Draw one of the recorded configs, each with the same chance, in the order of the product's."""

    def __init__(self, task: Task, seed: int) -> None:
        self._order = iter(RecordedSpace(task).shuffled_points(seed))

    def propose(self) -> dict[str, Any]:
        return next(self._order)

    def ended(self, params: dict[str, Any], eval_loss: float) -> None:
        pass


class OptunaSearcher:
    """Propose as Ray's OptunaSearch does: Optuna's TPE with its defaults, without a pruner.

    OptunaSearch tells every trial that ended as COMPLETE with its last loss, also a stopped one. It
    ignores running trials, and looks for no repeats.
    """

    def __init__(self, task: Task, seed: int) -> None:
        self._study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed), pruner=optuna.pruners.NopPruner())
        self._distributions = distributions(task)

    def propose(self) -> dict[str, Any]:
        trial = self._study.ask(self._distributions)
        self._study.tell(trial, state=optuna.trial.TrialState.FAIL)  # the recorded config is told in its place
        return trial.params

    def ended(self, params: dict[str, Any], eval_loss: float) -> None:
        told = optuna.trial.create_trial(params=params, distributions=self._distributions, value=eval_loss)
        self._study.add_trial(told)


class Recorded:
    """Replace proposals by recorded configs that are new, and keep the trials' last reports."""

    def __init__(self, task: Task, searcher: Searcher) -> None:
        self.task, self.searcher, self._used = task, searcher, [False] * len(task.points)
        self.last: dict[int, tuple[float, Choice]] = {}  # by trial

    def new_point(self) -> int | None:
        """Return a config that was not trained yet, or None if all were."""
        if all(self._used):
            return None
        index = self.task.nearest(self.searcher.propose(), self._used)
        self._used[index] = True
        return index

    def reported(self, turn: Turn, eval_loss: float) -> None:
        self.last[turn.number] = (eval_loss, Choice(turn.point, turn.rung))

    def ended(self, turn: Turn, eval_loss: float) -> None:
        """Tell the searcher that the trial is over, with its last loss."""
        params = {path: self.task.points[turn.point].params[path] for path in self.task.axes}
        self.searcher.ended(params, eval_loss)

    def chosen(self) -> Choice | None:
        found = [(loss, number) for number, (loss, _) in self.last.items()]
        return self.last[min(found)[1]][1] if found else None


class RayAshaSide:
    """Stop trials by Ray Tune's own ASHAScheduler, with its default factor of 4."""

    def __init__(self, task: Task, searcher: Searcher, reduction_factor: float = 4) -> None:
        self._recorded, self._num_trials = Recorded(task, searcher), 0
        self._scheduler = ASHAScheduler(
            time_attr="rung",
            metric="eval_loss",
            mode="min",
            max_t=len(task.grid),
            grace_period=1,
            reduction_factor=reduction_factor,
        )
        self.chosen = self._recorded.chosen

    def next_trial(self) -> Turn | None:
        point = self._recorded.new_point()
        if point is None:
            return None
        number, self._num_trials = self._num_trials, self._num_trials + 1
        self._scheduler.on_trial_add(None, SimpleNamespace(trial_id=number))
        return Turn(number, point, 1)

    def reported(self, turn: Turn, eval_loss: float) -> bool:
        self._recorded.reported(turn, eval_loss)
        result = {"rung": turn.rung, "eval_loss": eval_loss}
        stops = self._scheduler.on_trial_result(None, SimpleNamespace(trial_id=turn.number), result) == ASHAScheduler.STOP
        if stops:
            self._recorded.ended(turn, eval_loss)
        return not stops

    def diverged(self, turn: Turn) -> None:
        """Drop the trial: one that raised an error leaves OptunaSearch nothing."""


class OneLookSide:
    """Train n trials to one rung, then the best k of them to the end. Nothing else is decided.

    Half of the cost goes into looks, half into finishing: k = cost / 2 / (1 - look) rounded down, at
    least 1, and n is what the rest of the cost allows. The idea is that of Egele et al.,
    arXiv:2307.15422 (one epoch, then the best few), with a look of a given share of a trial.
    """

    def __init__(self, task: Task, searcher: Searcher, cost: float, look: float, begin: float = 0.0) -> None:
        """cost: in full trials. look: share of a trial's tokens; the first rung at or above it. begin: see Clock."""
        self._recorded = Recorded(task, searcher)
        self._rung = next(rung for rung, tokens in enumerate(task.grid, 1) if tokens >= look * task.grid[-1] * (1 - 1e-9))
        share = task.grid[self._rung - 1] / task.grid[-1]
        self.num_looks, self.num_finished = looks_and_finishers(cost, share, len(task.points), begin)
        self._num_started, self._num_looked, self._looks = 0, 0, []
        self.chosen = self._recorded.chosen
        self._last_rung = len(task.grid)

    def next_trial(self) -> Turn | None:
        if self._num_started < self.num_looks:
            point = self._recorded.new_point()
            number, self._num_started = self._num_started, self._num_started + 1
            return Turn(number, point, 1)
        if self._num_looked < self.num_looks or not self._looks:
            return None
        _, turn = self._looks.pop(0)
        return Turn(turn.number, turn.point, turn.rung + 1)

    def reported(self, turn: Turn, eval_loss: float) -> bool:
        self._recorded.reported(turn, eval_loss)
        if turn.rung != self._rung:
            return turn.rung < self._last_rung
        self._looks.append((eval_loss, turn))
        self._count_look()
        return False

    def diverged(self, turn: Turn) -> None:
        if turn.rung <= self._rung:
            self._count_look()

    def _count_look(self) -> None:
        self._num_looked += 1
        if self._num_looked == self.num_looks:
            self._looks = sorted(self._looks, key=lambda look: (look[0], look[1].number))[: self.num_finished]
            if self._rung == self._last_rung:
                self._looks.clear()


def looks_and_finishers(cost: float, share: float, num_points: int, begin: float = 0.0) -> tuple[int, int]:
    """Return n and k. share: of a trial's tokens, up to the look. num_points: the most looks. begin: see Clock."""
    look = share + begin
    if share >= 1.0:
        return min(num_points, math.floor(cost / look + 1e-9)), 0
    finished = max(1, math.floor(cost / 2 / (1 - share) + 1e-9))
    looks = math.floor((cost - finished * (1 - share)) / look + 1e-9)
    if looks > num_points:
        looks, finished = num_points, math.floor((cost - num_points * look) / (1 - share) + 1e-9)
    return max(looks, 1), min(finished, looks)


def distributions(task: Task) -> dict[str, BaseDistribution]:
    """Return the task's axes as Optuna's distributions."""
    return {
        path: FloatDistribution(leaf["low"], leaf["high"], log=leaf["log"]) if "low" in leaf
        else CategoricalDistribution(tuple(leaf["choices"]))
        for path, leaf in task.space_section.items()
    }  # fmt: skip
