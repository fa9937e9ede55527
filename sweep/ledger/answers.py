"""Define what the ledger answers when it has no trial, and whom it tells of a trial's new state."""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from sweep.trials.record import TrialRecord


class Next(Enum):
    """Say why next_trial() returns no trial."""

    WAIT = "all slots are taken, or a running trial may have to start again, or the caller must ask again at once"
    FINISHED = "nothing runs or may start: trials, budget or space are used up, or too many proposals did not fit"


class Listener(Protocol):
    """Receive a trial's record after the journal has it."""

    def on_trial_updated(self, record: TrialRecord) -> None: ...
