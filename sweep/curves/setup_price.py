"""Say what it costs to set up a trial, in tokens that its slot could have trained on meanwhile.

Set-up is what a trial's first report counts beside steady steps: data, adapter, plan and recordings,
without the base model, which is loaded once for each worker. A trial that goes on after a pause
needs all but the recordings. Where full trials take minutes it is nothing. Where they take seconds,
it costs more than their tokens.

The price is measured once, when enough trials have reported, and goes into the journal. So every
later decision, after a kill too, counts with the same price.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from statistics import median

from engine.trial_report import TrialReport
from sweep.prior.kept_beginning import Attributes

SETUP_PRICE = "setup_price"  # the study's attribute
LEAST_SHARE = 0.25  # of the tokens to the first rung; less counts as nothing
NUM_MEASURED = 3  # trials, after the first one of each slot, which also warms its process up


@dataclass(frozen=True)
class SetupPrice:
    """Hold tokens. begin: of a new trial. thaw: of one that waited."""

    begin: int = 0
    thaw: int = 0

    def tokens_left(self, tokens: int, num_begun: int, num_thawed: int, to_finish_one: int) -> int:
        """Return what is left for training when the set-ups of these trials are paid for.

        tokens: left of the limit. num_thawed: trials that went on after a look. to_finish_one: what
        would finish a trial, 0 if one is finished. That stays, since a sweep without a finished trial
        is worth little.
        """
        return max(tokens - self.begin * num_begun - self.thaw * num_thawed, min(tokens, to_finish_one), 0)


FREE = SetupPrice()


class KeptSetupPrice:
    """Hold the measured price that the journal has, None before it is known."""

    def __init__(self, study: Attributes) -> None:
        known = study.user_attrs.get(SETUP_PRICE)
        self._study, self.price = study, None if known is None else SetupPrice(*known)

    def keep(self, price: SetupPrice) -> None:
        """Enter the price. A kill leaves it whole or not at all."""
        self._study.set_user_attr(SETUP_PRICE, list(astuple(price)))
        self.price = price


def measured_price(first_reports: Sequence[TrialReport], num_slots: int, first_rung: int) -> SetupPrice | None:
    """Return the median price of some trials in coarse steps; None if too few have reported.

    first_reports: of all trials by number. first_rung: tokens to it. Steps are powers of two of it,
    so that the noise of clocks seldom shows.
    """
    measured = first_reports[num_slots : num_slots + NUM_MEASURED]
    if len(measured) < NUM_MEASURED:
        return None
    begin, thaw = (median(tokens) for tokens in zip(*map(_tokens, measured), strict=True))
    return SetupPrice(_in_steps(begin, first_rung), _in_steps(thaw, first_rung))


def _in_steps(price: float, first_rung: int) -> int:
    return 0 if price < LEAST_SHARE * first_rung else round(first_rung * 2.0 ** round(math.log2(price / first_rung)))


def _tokens(report: TrialReport) -> tuple[float, float]:
    """Return what the trial could have trained on in its whole set-up, and in that without recordings.

    Where the report has one step, no step was steady: the first one counts as recordings, its tokens too.
    """
    model_s, data_s, attach_s = (seconds or 0.0 for seconds in (report.model_s, report.data_s, report.attach_s))
    thaw_s = data_s + attach_s
    begin_s = max(report.setup_s - model_s, thaw_s) + (report.recording_s or 0.0)
    if not report.train_s:
        return begin_s * report.tokens_per_second, thaw_s * report.tokens_per_second
    if report.step == 1:
        return max(begin_s * report.tokens_per_second - report.tokens_seen, 0.0), thaw_s * report.tokens_per_second
    speed = report.tokens_seen / report.train_s
    return begin_s * speed, thaw_s * speed
