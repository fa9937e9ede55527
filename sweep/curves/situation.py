"""Define what a policy of freeze and thaw sees, and what it may decide.

After each report, and for each empty slot, the ledger describes the sweep as a Situation. The
policy names what the slot does until the next rung.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from sweep.curves.setup_price import FREE, SetupPrice
from sweep.trials.record import Outcome, TrialRecord


class Stand(Enum):
    """Say whether a trial may go on."""

    RUNNING = "holds a slot, and trains to its next rung"
    FREE = "waits at a rung, and may go on"
    OVER = "has ended, or is of an earlier sweep; its losses still tell something"


STANDS = {Outcome.RUNNING: Stand.RUNNING, Outcome.PAUSED: Stand.FREE, Outcome.STOPPED: Stand.FREE}
"""From the outcomes of trials that have not ended. All others are OVER."""


@dataclass(frozen=True)
class CurveState:
    """Hold one trial's learning curve, and how the trial stands.

    number: the study's. params: dotted path -> sampled value or choice name. losses: eval_loss at
    rungs 1, 2, ..., in nats per target token; empty before the first report. is_earlier: the trial
    is of an earlier sweep, so its tokens cost this one nothing.
    """

    number: int
    params: Mapping[str, Any]
    losses: tuple[float, ...]
    stand: Stand
    outcome: Outcome
    is_earlier: bool = False

    @classmethod
    def of(cls, record: TrialRecord) -> CurveState:
        """Return the state of a trial that its record describes."""
        is_earlier = record.source is not None
        stand = Stand.OVER if is_earlier else STANDS.get(record.outcome, Stand.OVER)
        losses = tuple(report.eval_loss for report in record.reports)
        return cls(record.number, record.params, losses, stand, record.outcome, is_earlier)


@dataclass(frozen=True)
class Situation:
    """Describe the sweep at the moment of a decision.

    trials: by number, ascending, without INFEASIBLE ones. The mapping changes after the decision.
    candidates: params of untried points, of which a new trial takes one; empty if none may begin.
    tokens_left: the budget, less what all reports have cost and what RUNNING trials need to their
    next rungs. num_startable: how many new trials may still begin.
    setup: what it costs to set up a trial. For those that have begun it is off tokens_left. in_slot:
    the trial that holds the slot in question, and needs no set-up; None if the slot is empty.
    """

    trials: Mapping[int, CurveState]
    candidates: Sequence[Mapping[str, Any]]
    tokens_left: int
    num_slots: int
    num_startable: int
    setup: SetupPrice = FREE
    in_slot: int | None = None


@dataclass(frozen=True)
class GoOn:
    """Train this FREE trial to its next rung."""

    number: int


@dataclass(frozen=True)
class StartNew:
    """Begin a trial at one of the candidates, and train it to its first rung."""

    params: Mapping[str, Any]


Decision = GoOn | StartNew | None
"""None: nothing is worth a slot now. If no trial runs, this ends the sweep."""


class FreezePolicy(Protocol):
    """Decide what one slot does next.

    The decision depends on the policy's arguments and the situation alone. After a kill the policy
    is asked again, and must decide the same.
    """

    def decide(self, situation: Situation) -> Decision: ...
