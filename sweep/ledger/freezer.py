"""Decide at each rung which trial goes on, which waits, and whether a new one begins.

The ledger tells the freezer of each trial's new state and asks it for each slot. The policy sees
curves, untried points and the tokens that are left. It sees no time and no order of arrival, so with
one slot a resumed sweep decides what the undisturbed one decided.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from engine.trial_report import TrialReport
from sweep.config.sweep import SweepConfig
from sweep.curves.candidates import Candidates
from sweep.curves.makers import make_policy
from sweep.curves.setup_price import FREE, SetupPrice, measured_price
from sweep.curves.situation import STANDS, CurveState, Decision, FreezePolicy, GoOn, Situation, Stand, StartNew
from sweep.ledger.limits import Limits
from sweep.ledger.quota import Quota
from sweep.space.space import Space
from sweep.study.study import Study
from sweep.trials.record import Outcome, TrialRecord

Points = Sequence[Mapping[str, Any]]


class Freezer:
    """Keep every trial's curve, and ask the policy what a slot does next."""

    def __init__(
        self, policy: FreezePolicy, candidates: Candidates, study: Study, limits: Limits, setup: SetupPrice | None = None
    ) -> None:
        """limits: with a token_limit and the grid of rungs. setup: its price; None: it is measured."""
        self._policy, self._candidates, self._study, self._limits = policy, candidates, study, limits
        self._setup = setup
        self._first_reports: dict[int, TrialReport] = {}
        self._curves: dict[int, CurveState] = {}
        self._num_known = 0  # trials with a point of the space, INFEASIBLE ones too
        self._committed = 0  # tokens that RUNNING trials need to their next rungs
        self._warm: dict[int, int] = {}  # warm clone -> tokens to its end, counted in _committed
        self._held: set[int] = set()  # a user has paused them
        self._points: Points | None = None
        self._decision: tuple[Decision] | None = None
        self._in_slot: int | None = None

    def begin(self, quota: Quota, records: Iterable[TrialRecord]) -> None:
        """Take the trials so far. quota: says whether new ones may begin, and what was spent."""
        self._quota = quota
        for record in records:
            self.on_trial_updated(record)

    def on_trial_updated(self, record: TrialRecord) -> None:
        """Take a trial's new state, before any decision that follows from it."""
        if record.number >= self._num_known:
            self._num_known = record.number + 1
            if record.warm is None:
                self._candidates.drop(record.params)
            self._points = None
        if record.outcome is Outcome.INFEASIBLE:
            self._decision = None
            return
        if record.warm is not None:  # the policy never sees it
            self._take_warm(record)
            return
        if record.source is None and record.reports:
            self._first_reports.setdefault(record.number, record.reports[0])
        curve = self._as_held(CurveState.of(record))
        if curve != self._curves.get(record.number):
            self._set(curve)
            self._decision = None

    def change(self, limits: Limits) -> None:
        """Decide by these limits from now on."""
        self._limits, self._decision = limits, None

    def hold(self, numbers: Iterable[int]) -> None:
        """Let just these trials wait until a user lets them go on. The policy still sees their curves."""
        self._held, self._decision = set(numbers), None
        for curve in list(self._curves.values()):
            if curve.stand is not Stand.RUNNING and not curve.is_earlier:
                self._set(self._as_held(replace(curve, stand=STANDS.get(curve.outcome, Stand.OVER))))

    def decide(self) -> Decision:
        """Return what an empty slot does next; None: nothing, as long as no trial's state changes."""
        if self._quota.budget.spent() or self._quota.is_closed:
            return None
        if self._decision is None:
            self._decision = (self._decided(),)
        return self._decision[0]

    def goes_on(self, number: int) -> bool:
        """Return whether this trial keeps its slot after its report. If not, it is PAUSED next."""
        running = self._curves[number]
        self._set(replace(running, stand=Stand.FREE, outcome=Outcome.PAUSED))
        self._decision, self._in_slot = None, number
        decision = self.decide()
        self._in_slot = None
        if decision != GoOn(number):
            return False
        self._set(running)
        self._decision = None
        return True

    def _decided(self) -> Decision:
        setup = self._setup_price()
        left = self._limits.token_limit - self._quota.budget.num_tokens - self._committed
        while True:
            decision = self._policy.decide(Situation(
                trials=self._curves,
                candidates=self._untried(),
                tokens_left=self._paid(setup, left),
                num_slots=self._limits.num_slots,
                num_startable=max(self._quota.num_trials - self._quota.num_started, 0),
                setup=setup,
                in_slot=self._in_slot,
            ))  # fmt: skip
            if not isinstance(decision, StartNew) or self._study.is_new(decision.params):
                return decision
            self._candidates.drop(decision.params)  # another point gave the same config
            self._points = None

    def _setup_price(self) -> SetupPrice:
        """Return what a set-up costs; it is free until enough trials have told it."""
        if self._setup is None and (kept := self._study.setup_price).price is not None:
            self._setup = kept.price
        elif self._setup is None:
            reports = [report for _, report in sorted(self._first_reports.items())]
            self._setup = measured_price(reports, self._limits.num_slots, self._limits.tokens_at(1))
            if self._setup is not None:
                kept.keep(self._setup)
        return self._setup or FREE

    def _paid(self, setup: SetupPrice, left: int) -> int:
        """Return the tokens that are left after set-ups. No record counts thaws: a trial of several rungs had one."""
        own = [curve for curve in self._curves.values() if not curve.is_earlier]
        rungs = [len(curve.losses) for curve in own if curve.stand is not Stand.OVER or curve.outcome is Outcome.COMPLETE]
        to_finish_one = self._limits.tokens_at(self._limits.num_rungs) - self._limits.tokens_at(max(rungs, default=0))
        num_thawed = sum(len(curve.losses) > 1 for curve in own)
        return setup.tokens_left(left, self._quota.num_started, num_thawed, to_finish_one)

    def _untried(self) -> Points:
        """Return the points of which a new trial takes one."""
        if not self._quota.may_ask:
            return ()
        if self._points is None:
            first = self._study.next_first_point()
            self._points = self._candidates.at(self._num_known) if first is None else (first,)
            self._quota.is_used_up = not self._points
        return self._points

    def _as_held(self, curve: CurveState) -> CurveState:
        is_held = curve.number in self._held and curve.stand is Stand.FREE
        return replace(curve, stand=Stand.OVER) if is_held else curve

    def _set(self, curve: CurveState) -> None:
        self._committed += self._need(curve) - self._need(self._curves.get(curve.number))
        self._curves[curve.number] = curve

    def _take_warm(self, record: TrialRecord) -> None:
        """Keep the tokens off that a warm clone needs to its end: it stays in its slot until then."""
        limits, rungs = self._limits, record.reports[-1].rung if record.reports else 0
        need = limits.tokens_at(limits.num_rungs) - limits.tokens_at(rungs) if record.outcome is Outcome.RUNNING else 0
        if need != self._warm.get(record.number, 0):
            self._committed += need - self._warm.get(record.number, 0)
            self._warm[record.number], self._decision = need, None

    def _need(self, curve: CurveState | None) -> int:
        """Return the tokens that a RUNNING trial needs to its next rung."""
        if curve is None or curve.stand is not Stand.RUNNING:
            return 0
        rung = len(curve.losses)
        return self._limits.tokens_at(min(rung + 1, self._limits.num_rungs)) - self._limits.tokens_at(rung)


def make_freezer(config: SweepConfig, space: Space, study: Study, limits: Limits) -> Freezer | None:
    """Return the freezer of a sweep whose sampler pauses trials, None for any other sweep."""
    if not config.pauses_trials:
        return None
    base, seed = config.base().model_dump(mode="json"), config.sweep.seed
    policy = make_policy(config.sampler, space, base, limits.grid, seed, study.beginning.rate)
    given = config.sampler.setup_tokens
    return Freezer(policy, Candidates(space, seed), study, limits, None if given == "auto" else SetupPrice(given))
