"""Ray's seam for the pruner: Tune asks here whether a trial goes on after a report."""

from __future__ import annotations

import json
from typing import Any

from ray.tune.schedulers import FIFOScheduler

from sweep.ledger import Ledger


class LedgerScheduler(FIFOScheduler):
    """Starts trials in the order they were suggested, and stops those the ledger has pruned."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles it into its own snapshots, which nobody reads

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        stop = False
        with self._ledger.on_disk():
            stop = self._ledger.reported(trial.config["number"], json.loads(result["report"]))
        return self.STOP if stop else self.CONTINUE
