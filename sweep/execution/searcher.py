"""Connect Tune's searcher to the ledger: Tune asks here which trial to start.

The ledger makes all decisions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

from engine.trial_report import TrialReport
from sweep.ledger.answers import Next
from sweep.ledger.ledger import Ledger
from sweep.trials.record import Outcome, Proposal


class LedgerSearcher(Searcher):
    """Suggest the ledger's trials, and tell it when they end.

    A result with done=True reaches no on_trial_result hook, so this class takes a trial's last
    report.
    """

    def __init__(
        self,
        ledger: Ledger,
        worker_config: Callable[[Proposal], dict[str, Any]],
        on_running_out: Callable[[], None] = lambda: None,
    ) -> None:
        """on_running_out: called, once or more often, while the last trials train."""
        super().__init__()
        self._ledger, self._worker_config, self._on_running_out = ledger, worker_config, on_running_out
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        proposal: Proposal | Next = Next.WAIT
        with self._ledger.on_disk():
            proposal = self._ledger.next_trial()
        if self._ledger.is_running_out:
            self._on_running_out()
        if isinstance(proposal, Next):
            return Searcher.FINISHED if proposal is Next.FINISHED else None
        self._numbers[trial_id] = proposal.number
        return self._worker_config(proposal)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        with self._ledger.on_disk():
            self._ended(self._numbers.pop(trial_id), None if error else result)

    def _ended(self, number: int, result: dict[str, Any] | None) -> None:
        if result is None or "outcome" not in result:
            self._ledger.lost(number)
        elif result["outcome"] == Outcome.RUNNING and result.get("has_changed_inputs"):
            self._ledger.released(number, json.loads(result["timing"]))
            self._ledger.wind_down(f"trial {number}: {result['error']}")
        elif result["outcome"] == Outcome.RUNNING and result["error"]:
            self._ledger.suspend(f"trial {number}: {result['error']}")
        elif result["outcome"] == Outcome.RUNNING and not result["report"]:
            self._ledger.released(number, json.loads(result["timing"]))
        else:
            report = TrialReport.from_dict(json.loads(result["report"])) if result["report"] else None
            memory, timing = json.loads(result["memory"]), json.loads(result["timing"])
            self._ledger.ended(number, Outcome(result["outcome"]), report, result["error"], memory, timing)

    # Tune pickles the searcher into its snapshots, which no one reads: the journal is the record
    def __getstate__(self) -> dict[str, Any]:
        return {}

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep is resumed from its journal, not from Tune's snapshot")

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        pass
