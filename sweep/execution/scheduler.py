"""Connect Tune's scheduler to the ledger.

Tune asks here whether a trial continues after a report, and says here why a trial was lost.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.tune.schedulers import FIFOScheduler

from engine.trial_report import TrialReport
from sweep.ledger.ledger import Ledger


class LedgerScheduler(FIFOScheduler):
    """Start trials in the order of their suggestion, stop pruned ones and kill hung workers."""

    def __init__(self, ledger: Ledger, on_turn: Callable[[], None] = lambda: None) -> None:
        """on_turn: called in every turn of Tune's loop."""
        super().__init__()
        self._ledger, self._on_turn = ledger, on_turn
        # Tune's id of a trial whose worker this scheduler killed -> why
        self._killed: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles this object into its snapshots, which no one reads

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        stop = False
        with self._ledger.on_disk():
            report = TrialReport.from_dict(json.loads(result["report"]))
            stop = self._ledger.reported(trial.config["number"], report, json.loads(result["timing"]))
        return self.STOP if stop else self.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Tell the ledger that the worker is gone, and why.

        Tune calls this before it calls the searcher, and gives the searcher no reason.
        """
        reason = self._killed.pop(trial.trial_id, None) or _cause_of_death(trial)
        with self._ledger.on_disk():
            self._ledger.lost(trial.config["number"], reason)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Take the user's commands and kill workers that hang, then let Tune choose.

        Tune asks in every turn of its loop, a tenth of a second apart.
        """
        with self._ledger.on_disk():
            self._on_turn()
        for trial in tune_controller.get_live_trials():
            number = trial.config["number"]
            if trial.status == trial.PENDING:
                self._ledger.live.still_waits(number)
            elif trial.status == trial.RUNNING and trial.trial_id not in self._killed and self._ledger.live.is_silent(number):
                timeout_s = self._ledger.live.report_timeout_s
                self._killed[trial.trial_id] = f"it had not reported for {timeout_s:g} s (cluster.report_timeout_s)"
                ray.kill(trial.temporary_state.ray_actor)
        return super().choose_trial_to_run(tune_controller)


def _cause_of_death(trial: Any) -> str:
    """Return Ray's reason in a few words, from the text that Tune writes into the trial's file."""
    file = Path(trial.error_file) if trial.error_file else None
    text = file.read_text() if file is not None and file.is_file() else ""
    if "its node has died" in text:
        return "its node was lost"
    if "low on memory" in text:
        return "its worker process was killed, because its node ran low on memory"
    return "its worker process died"
