"""Call the searcher and the scheduler that a sweep gives to Ray Tune, as Tune's controller calls them.

A result that is not `done` goes to the scheduler; if that says stop, the searcher hears of the
trial's end with the same result. A result with `done` goes to the searcher alone. Each stay of a
trial on a slot is a Tune trial of its own, so one that was paused comes back under another id.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from engine.trial_report import TrialReport
from sweep.cluster.slots import Slots
from sweep.execution.scheduler import LedgerScheduler
from sweep.execution.searcher import LedgerSearcher
from sweep.execution.worker import _result
from sweep.execution.worker_config import REAL_ENGINE, worker_config
from sweep.folder.sweep_folder import SweepFolder
from sweep.ledger.ledger import Ledger
from sweep.trials.record import Outcome, Proposal


class TuneHooks:
    """Stand in for Tune's controller and its workers. folder: of the sweep."""

    def __init__(self, ledger: Ledger, folder: SweepFolder, num_slots: int) -> None:
        self._ledger, self._folder, self._slots = ledger, folder, Slots(num_slots, "cuda", 1)
        self._searcher, self._scheduler = LedgerSearcher(ledger, self._config), LedgerScheduler(ledger)
        self._trials: dict[int, SimpleNamespace] = {}
        self._num_suggested = 0

    def suggest(self) -> tuple[int, int] | None:
        """Return the number of the trial for a free slot and how many reports it has; None: wait, or nothing is left."""
        trial_id = f"{self._num_suggested:08x}"
        self._num_suggested += 1
        config = self._checked(self._searcher.suggest(trial_id))
        if config is None or config == LedgerSearcher.FINISHED:
            return None
        self._trials[config["number"]] = SimpleNamespace(trial_id=trial_id, config=config)
        return config["number"], config["num_heard"]

    def reported(self, number: int, report: TrialReport) -> bool:
        """Take a worker's report before the last rung; return whether the trial goes on."""
        result, trial = self._result(Outcome.RUNNING, report, done=False), self._trials[number]
        if self._checked(self._scheduler.on_trial_result(None, trial, result)) == LedgerScheduler.CONTINUE:
            self._searcher.on_trial_result(trial.trial_id, result)
            return True
        self._leaves(number, {**result, "done": True})
        return False

    def ended(self, number: int, outcome: Outcome, report: TrialReport | None = None) -> None:
        """Take a worker's last result."""
        self._leaves(number, self._result(outcome, report, done=True))

    def _leaves(self, number: int, result: dict[str, Any]) -> None:
        trial = self._trials.pop(number)
        self._scheduler.on_trial_complete(None, trial, result)
        self._checked(self._searcher.on_trial_complete(trial.trial_id, result))

    def _result(self, outcome: Outcome, report: TrialReport | None, done: bool) -> dict[str, Any]:
        return {**_result(outcome, report=report, done=done), "timing": json.dumps({})}

    def _config(self, proposal: Proposal) -> dict[str, Any]:
        return worker_config(proposal, self._folder, self._slots, REAL_ENGINE)

    def _checked(self, answer: Any) -> Any:
        """Return the answer. Raises RuntimeError if the ledger took an error for that of a full disk: there is no disk."""
        if self._ledger.storage_fault:
            raise RuntimeError(self._ledger.storage_fault)
        return answer
