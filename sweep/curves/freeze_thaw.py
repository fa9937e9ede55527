"""Decide by predicted curves which trial gets the next rung: one that waits, or a new one.

After each report the model predicts where all curves end, those of untried points too. The step
with the highest expected improvement for its tokens is taken, as long as the tokens that finish the
expected winner stay. So a sweep looks at many trials for one rung, follows the promising ones, goes
back to one that it left where the model has changed its mind, and ends with a finished trial.
"""

from __future__ import annotations

import json
import operator
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import ndtri

from sweep.curves.acquisition import Options, best_option, expected_winner
from sweep.curves.curve_model import CurveModel, CurvePrior, decay_of, progress_of
from sweep.curves.curve_posterior import Posterior
from sweep.curves.observations import SeenCurve, curve_of, may_go_on, observe, seen_curves, unit_of
from sweep.curves.situation import CurveState, Decision, GoOn, Situation, Stand, StartNew
from sweep.curves.trial_encoder import TrialEncoder
from sweep.prior.rate_prior import RatePrior
from sweep.space.space import Space

FIRST_TRIALS = 4  # begun before the model decides
LEAST_CURVES = 2  # curves with a loss, before the model decides
FIRST_SPREAD = 0.8  # standard deviation of ln(rate) around the known good rate, of the first trials
SUSPICIOUS, LEAST_LOOKS = 2.0, 6  # units that the first trial is behind the best first loss, of so many
LOOKS_SHARE = 0.25  # of all tokens, before the expected winner is trained to its end to show how curves end
END_LEFT = 2.05, 3.0  # full trials: the fewest and the most tokens that are left then


class FreezeThaw:
    """Give each slot the step that promises most."""

    def __init__(
        self,
        space: Space,
        base: Mapping[str, Any],
        grid: Sequence[int],
        seed: int,
        rate_prior: RatePrior | None = None,
        prior: CurvePrior | None = None,
    ) -> None:
        """base: the base config as plain data. grid: tokens seen at each rung, ascending."""
        self._seen_tokens, self._seed = np.array((0, *grid)), seed
        self._num_rungs, self._progress = len(grid), progress_of(tuple(grid))
        self._encoder = TrialEncoder(space, base, rate_prior)
        optim = base["optim"]
        decay = decay_of(optim.get("lr_schedule", "cosine"), tuple(grid), optim.get("decay_ratio", 0.2))
        self._model = CurveModel(self._progress, decay, self._encoder.is_name, self._encoder.knows_rate, prior)
        self._curves: dict[int, SeenCurve] = {}
        self._trial_rows: dict[int, np.ndarray] = {}
        self._known_facts: dict[int, tuple[SeenCurve, tuple[int, int, int, bool, bool, bool, bool]]] = {}
        self._candidates: tuple[Mapping[str, Any], ...] = ()
        self._candidate_rows = np.zeros((0, len(self._encoder.is_name)))

    def decide(self, situation: Situation) -> Decision:
        """Return what one slot does next, or None if no step is worth its tokens or fits into those that are left."""
        curves = [self._curve(state) for state in situation.trials.values()]
        own = [curve for curve in curves if not curve.state.is_earlier]
        seen = seen_curves(curves)
        known = sum(bool(curve.losses) for curve in curves)
        begun = known + sum(not curve.losses for curve in own)
        if begun < FIRST_TRIALS or known < LEAST_CURVES:
            return self._begin(situation, own)
        return self._predicted(situation, own, seen)

    def _begin(self, situation: Situation, own: Sequence[SeenCurve]) -> Decision:
        """Start a trial that nothing but the prior speaks for; if none may start, continue one."""
        left = situation.tokens_left
        kept = min((self._to_finish(curve) for curve in own if self._may_win(curve)), default=0)
        first = int(self._seen_tokens[1]) + situation.setup.begin
        if situation.candidates and first <= left and (left - first >= kept or left < kept):
            return StartNew(min(situation.candidates, key=self._first_rank))
        if any(curve.state.stand is Stand.RUNNING for curve in own):
            return None  # their reports say more than the first one alone
        return self._most_promising(own, left)

    def _predicted(self, situation: Situation, own: Sequence[SeenCurve], seen: Sequence[SeenCurve]) -> Decision:
        """Take the step that the model speaks for, unless the first trial has to show what its first loss is worth."""
        doubted = self._doubted(own, seen, situation.tokens_left)
        if doubted is not None:
            return GoOn(doubted.state.number)
        rows = np.array([self._row(curve) for curve in seen])
        running = np.array([i for i, curve in enumerate(seen) if curve.state.stand is Stand.RUNNING], dtype=np.int64)
        next_rung = np.array([min(seen[i].num_rungs, self._num_rungs - 1) for i in running], dtype=np.int64)
        posterior = Posterior(self._model, rows, observe(seen, self._progress), running, next_rung)
        everything = np.concatenate([rows, self._rows_of(situation.candidates)])
        predicted = posterior.ends(everything)
        options = self._options(seen, situation)
        winner = expected_winner(options, predicted.mean, situation.tokens_left)
        if winner is None:
            means = predicted.mean[len(seen) :]
            if len(means) and situation.tokens_left >= self._seen_tokens[-1] + situation.setup.begin:
                return StartNew(situation.candidates[int(means.argmin())])
            return self._most_promising(own, situation.tokens_left)
        if options.may_run[winner] and self._needs_an_end(own, seen, situation.tokens_left):
            return GoOn(seen[winner].state.number)
        chosen = best_option(predicted, options, self._seen_tokens[1:], winner, situation.tokens_left)
        if chosen is None:
            return None
        if chosen < len(seen):
            return GoOn(seen[chosen].state.number)
        return StartNew(situation.candidates[chosen - len(seen)])

    def _doubted(self, own: Sequence[SeenCurve], seen: Sequence[SeenCurve], tokens_left: int) -> SeenCurve | None:
        """Return the first trial if it waits, has the good rate, and lies far behind after its first rung.

        Then either the known rate is not good here, or early losses mislead, as those of high rates do.
        The model takes the first loss at its word, and no trial that it gives up can show that it errs.
        So the first trial is trained to its end, as long as the tokens can finish another one too.
        """
        looks = [curve for curve in seen if curve.losses]
        first = next((curve for curve in own if curve.losses), None)
        if first is None or len(looks) < LEAST_LOOKS or not may_go_on(first, self._num_rungs):
            return None
        if not self._encoder.knows_rate or abs(self._row(first)[0]) > 2.0 * FIRST_SPREAD:
            return None
        if any(curve.state.is_earlier and curve.num_rungs == self._num_rungs for curve in seen):
            return None  # whole curves have told what first losses are worth
        if not self._looks_bad(first, seen):
            return None
        others = [self._to_finish(curve) for curve in own if curve is not first and self._may_win(curve)]
        needed = self._to_finish(first) + (min(others, default=0) if first.num_rungs == 1 else 0)
        return first if needed <= tokens_left else None

    def _looks_bad(self, first: SeenCurve, seen: Sequence[SeenCurve]) -> bool:
        """Return whether the trial's first loss is far behind the lowest one."""
        lowest = min(curve.losses[0] for curve in seen if curve.losses)
        return first.losses[0] - lowest > SUSPICIOUS * unit_of(seen)

    def _needs_an_end(self, own: Sequence[SeenCurve], seen: Sequence[SeenCurve], tokens_left: int) -> bool:
        """Return whether the expected winner is trained to its end now, so that one end is known in time.

        Until a trial has ended, the model can only guess how much further each curve falls. Where early
        losses mislead, the end of the first winner is what corrects it. That comes too late if the tokens
        finish no other trial then. The end of a first trial that looked bad early does not count: it
        says nothing of those that look good.
        """
        full, first = int(self._seen_tokens[-1]), next((curve for curve in own if curve.losses), None)
        used = sum(int(self._seen_tokens[-1]) - self._to_finish(curve) for curve in own)
        fewest, most = END_LEFT
        if not fewest * full <= tokens_left <= min(most * full, (used + tokens_left) * (1.0 - LOOKS_SHARE)):
            return False
        ended = [curve for curve in seen if curve.num_rungs == self._num_rungs]
        return all(curve is first and self._looks_bad(curve, seen) for curve in ended)

    def _options(self, seen: Sequence[SeenCurve], situation: Situation) -> Options:
        """Return what trials and candidates cost, and what they may do."""
        begin, thaw, num_candidates = situation.setup.begin, situation.setup.thaw, len(situation.candidates)
        new = (0, int(self._seen_tokens[1]) + begin, int(self._seen_tokens[-1]) + begin, True, False, False, False)
        facts = np.array([*map(self._facts, seen), *[new] * num_candidates], dtype=np.int64)
        setup = np.array(
            [0 if curve.state.number == situation.in_slot else thaw for curve in seen] + [begin] * num_candidates, dtype=np.int64
        )
        rung, price, to_finish = facts[:, :3].T
        may_run, may_win, has_begun, is_running = facts[:, 3:].astype(bool).T
        return Options(rung, self._seen_tokens[rung], price, to_finish, may_run, may_win, has_begun, is_running, setup)

    def _facts(self, curve: SeenCurve) -> tuple[int, int, int, bool, bool, bool, bool]:
        """Return rung, price, to_finish, may_run, may_win, has_begun and is_running of a trial, see Options."""
        known = self._known_facts.get(curve.state.number)
        if known is None or known[0] is not curve:
            is_running = curve.state.stand is Stand.RUNNING
            may = may_go_on(curve, self._num_rungs), self._may_win(curve), True, is_running
            facts = (min(curve.num_rungs, self._num_rungs), self._price(curve), self._to_finish(curve), *may)
            known = self._known_facts[curve.state.number] = curve, facts
        return known[1]

    def _most_promising(self, own: Sequence[SeenCurve], tokens_left: int) -> Decision:
        """Continue the waiting trial with the lowest loss whose step fits."""
        fitting = [c for c in own if may_go_on(c, self._num_rungs) and self._price(c) <= tokens_left]
        if not fitting:
            return None
        return GoOn(min(fitting, key=lambda curve: (curve.losses[-1], curve.state.number)).state.number)

    def _price(self, curve: SeenCurve) -> int:
        """Return the tokens to the trial's next rung."""
        rung = min(curve.num_rungs, self._num_rungs - 1)
        return int(self._seen_tokens[rung + 1] - self._seen_tokens[rung])

    def _to_finish(self, curve: SeenCurve) -> int:
        """Return the tokens to the trial's end. Those to a running trial's next rung are taken already."""
        rung = min(curve.num_rungs + (curve.state.stand is Stand.RUNNING), self._num_rungs)
        return int(self._seen_tokens[-1] - self._seen_tokens[rung])

    def _may_win(self, curve: SeenCurve) -> bool:
        """Return whether the trial is of this sweep, and has or can get an adapter at its last rung."""
        if curve.state.is_earlier or curve.is_diverged:
            return False
        return curve.state.stand is not Stand.OVER or curve.num_rungs == self._num_rungs

    def _first_rank(self, params: Mapping[str, Any]) -> float:
        """Return a number that is low for the points to begin with: near the good rate, else random."""
        text = json.dumps([self._seed, sorted((path, repr(value)) for path, value in params.items())])
        draw = ndtri((zlib.crc32(text.encode()) + 0.5) / 2.0**32)
        if not self._encoder.knows_rate:
            return float(draw)
        return abs(float(self._encoder.encode([params])[0, 0]) + FIRST_SPREAD * float(draw))

    def _curve(self, state: CurveState) -> SeenCurve:
        known = self._curves.get(state.number)
        if known is None or known.state is not state:
            known = self._curves[state.number] = curve_of(state)
        return known

    def _row(self, curve: SeenCurve) -> np.ndarray:
        number = curve.state.number
        if number not in self._trial_rows:
            self._trial_rows[number] = self._encoder.encode([curve.state.params])[0]
        return self._trial_rows[number]

    def _rows_of(self, candidates: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Return the rows of the candidates, those of the last call for the same objects."""
        known = self._candidates
        if len(known) != len(candidates) or not all(map(operator.is_, known, candidates)):
            places = {id(params): place for place, params in enumerate(known)}
            found = np.array([places.get(id(params), -1) for params in candidates], dtype=np.int64)
            rows = np.empty((len(candidates), len(self._encoder.is_name)))
            rows[found >= 0] = self._candidate_rows[found[found >= 0]]
            rows[found < 0] = self._encoder.encode([params for params, place in zip(candidates, found) if place < 0])
            self._candidates, self._candidate_rows = tuple(candidates), rows
        return self._candidate_rows
