"""Predict where learning curves end: a Gaussian process over params and tokens.

The loss of a trial with params x after a share s of its tokens is modelled as

    loss(x, s) = mean(s) + final(x) + drop(x, s) + heat(x) * rate(s) + own(trial, s).

`mean` is the curve that all trials share; nothing is assumed of its height and length. `final` says
how good the params are at the end. `drop` says how much more, or less, than the mean the loss still
falls; it is 0 at the end. `heat` is the noise that a high rate keeps up and that goes as the rate
decays: trials with high rates look bad early and fall late. It grows in proportion to the rate, and
rate(s) is the schedule's share of the peak rate. `own` is what params do not explain: a seed, and a
part that is gone at the end.

To tie curves together by where they end is the idea of freeze-thaw optimisation (Swersky et al.,
arXiv:1406.3896). Its curves, mixtures of exponentials, were given up: under cosine decay a loss has
no asymptote. The sum of kernels over axes is that of Duvenaud et al. (arXiv:1112.4394). Nothing but
one common factor is fitted in a sweep, so a decision is a function of the trials alone, and fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

VAGUE = 25.0  # variance of what nothing is assumed of, in squared units
DROP_STRETCH = 0.3  # the drop varies more slowly over all axes jointly than the final loss
HEAT_BOUNDS = (-3.0, 1.6)  # ln(rate / good rate); above, trials diverge rather than heat up


@dataclass(frozen=True)
class CurvePrior:
    """Set the sizes of the model's parts, as variances in squared units, and their lengths.

    The numbers lie between a first guess and what fits the recorded curves of two tasks best (70
    trials of SmolLM2-135M on an H200). drop_joint, own_drop, fading and HEAT_BOUNDS went half of the
    way to where ends are predicted best, on recorded and made curves. Units are those of `observations.py`.
    rate, other, joint: final(x) along the rate, along each other axis, and of all axes jointly.
    drop_*: the same for drop(x, s) at the first rung. seed, own_drop: standard deviations of own;
    seed also holds what params do together and no kernel here does.
    *_length: distance over which values are alike, in the encoder's numbers. valley: mean slope of
    the loss away from a rate that is known to be good, and valley_width its standard deviation.
    heat: mean of heat(x) at a good rate, and heat_width its standard deviation.
    """

    rate: float = 0.5
    other: float = 0.1
    joint: float = 0.25
    drop_rate: float = 0.3
    drop_other: float = 0.02
    drop_joint: float = 0.17
    seed: float = 0.3
    own_drop: float = 0.3
    rate_length: float = 1.7
    other_length: float = 3.7
    name_length: float = 0.8
    joint_stretch: float = 2.0
    fading: float = 0.7
    progress_length: float = 1.2
    valley: float = 0.38
    valley_width: float = 0.25
    tilt: float = 0.7
    heat: float = 0.22
    heat_width: float = 0.3


@dataclass(frozen=True)
class Alike:
    """Hold how alike the rows of two lists of trials are.

    final, drop: float64 [N, Q]. heat, other_heat: float64 [N] and [Q], relative to a good rate's.
    """

    final: np.ndarray
    drop: np.ndarray
    heat: np.ndarray
    other_heat: np.ndarray


class CurveModel:
    """Hold the kernels for one space and one grid of rungs."""

    def __init__(
        self, progress: np.ndarray, rate: np.ndarray, is_name: np.ndarray, knows_rate: bool, prior: CurvePrior | None = None
    ) -> None:
        """progress: float64 [R], 1 at the first rung and 0 at the last, see progress_of().

        rate: float64 [R], share of the peak rate, less that at the last rung. is_name: bool [D].
        """
        self.rate = rate
        self.prior = prior or CurvePrior()
        self.num_rungs = len(progress)
        self._is_name, self._knows_rate = is_name, knows_rate
        self._known: dict[int, tuple[np.ndarray, np.ndarray, Alike]] = {}
        self._lengths = [self.prior.rate_length, *[self.prior.other_length] * (len(is_name) - 1)]
        deviations = (self.prior.valley_width, self.prior.tilt) if knows_rate else (1.0, 1.0)
        self._bowl = tuple(zip((_valley, _tilt), deviations, strict=True))
        faded = progress**self.prior.fading
        apart = np.abs(progress[:, None] - progress[None])
        self.fall = np.outer(faded, faded) * np.exp(-apart / self.prior.progress_length)
        self.shared_fall = VAGUE * np.outer(faded, faded) * np.exp(-apart / 3.0)

    def known_alike(self, rows: np.ndarray, others: np.ndarray, place: int) -> Alike:
        """Return alike(rows, others). What the last result of this place holds is taken from there."""
        known = self._known.get(place)
        if known is None or not (np.array_equal(known[0], rows) and np.array_equal(known[1], others)):
            found = self.alike(rows, others) if known is None else self._grown(known, rows, others)
            known = self._known[place] = (rows, others, found)
        return known[2]

    def _grown(self, known: tuple[np.ndarray, np.ndarray, Alike], rows: np.ndarray, others: np.ndarray) -> Alike:
        """Return alike(rows, others), and compute only what the known result does not hold."""
        left, right = _places(known[0], rows), _places(known[1], others)
        if 2 * (left < 0).sum() > len(left) or 2 * (right < 0).sum() > len(right):
            return self.alike(rows, others)
        final, drop = known[2].final[np.ix_(left, right)], known[2].drop[np.ix_(left, right)]
        if (new := np.flatnonzero(left < 0)).size:
            found = self.alike(rows[new], others)
            final[new], drop[new] = found.final, found.drop
        if (new := np.flatnonzero(right < 0)).size:
            found = self.alike(rows, others[new])
            final[:, new], drop[:, new] = found.final, found.drop
        return Alike(final, drop, _heat(rows[:, 0]), _heat(others[:, 0]))

    def alike(self, rows: np.ndarray, others: np.ndarray) -> Alike:
        """Return how alike trials are. rows: float64 [N, D]; others: float64 [Q, D]; see TrialEncoder."""
        prior, shape = self.prior, (len(rows), len(others))
        final, drop, away, drop_away = np.zeros(shape), np.zeros(shape), np.zeros(shape), np.zeros(shape)
        for axis in range(rows.shape[1]):
            size, drop_size = (prior.rate, prior.drop_rate) if axis == 0 else (prior.other, prior.drop_other)
            squares = np.subtract.outer(rows[:, axis] / self._lengths[axis], others[:, axis] / self._lengths[axis])
            if self._is_name[axis]:
                near = (squares == 0.0).astype(float)
                squares = (1.0 - near) / prior.name_length**2
                away += squares
            else:
                np.square(squares, out=squares)
                near = np.exp(-0.5 * squares)
                away += squares * (1.0 / prior.joint_stretch**2)
            drop_away += squares
            final += size * near
            near *= drop_size
            drop += near
        root = np.sqrt(5.0 * away)
        final += prior.joint * (1.0 + root * (1.0 + root / 3.0)) * np.exp(-root)  # Matern 5/2
        drop += prior.drop_joint * np.exp(-0.5 * DROP_STRETCH * drop_away)
        for feature, deviation in self._bowl:
            final += np.outer(deviation**2 * feature(rows[:, 0]), feature(others[:, 0]))
        return Alike(final, drop, _heat(rows[:, 0]), _heat(others[:, 0]))

    def prior_variances(self, rows: np.ndarray) -> tuple[np.ndarray, float]:
        """Return the diagonals of alike(rows, rows): final float64 [Q], and drop, which is one number."""
        prior, others = self.prior, rows.shape[1] - 1
        bowl = sum((deviation * feature(rows[:, 0])) ** 2 for feature, deviation in self._bowl)
        final = prior.rate + others * prior.other + prior.joint + bowl
        return final, prior.drop_rate + others * prior.drop_other + prior.drop_joint

    def expected_heat(self, rows: np.ndarray, rungs: np.ndarray) -> np.ndarray:
        """Return what is known of heat(x) * rate(s) before any trial, in units: float64 [K]."""
        return self.prior.heat * _heat(rows[:, 0]) * self.rate[rungs]

    def expected(self, rows: np.ndarray) -> np.ndarray:
        """Return what is known of final(x) before any trial, in units: float64 [Q]."""
        return self.prior.valley * _valley(rows[:, 0]) if self._knows_rate else np.zeros(len(rows))


def progress_of(grid: tuple[int, ...]) -> np.ndarray:
    """Return how far each rung is from the end in log(tokens): 1 at the first rung, 0 at the last."""
    if len(grid) == 1:
        return np.zeros(1)
    return np.array([math.log(grid[-1] / tokens) / math.log(grid[-1] / grid[0]) for tokens in grid])


def decay_of(schedule: str, grid: tuple[int, ...], decay_ratio: float = 0.2) -> np.ndarray:
    """Return by rung the share of the peak rate that is still to go, for a schedule's name: float64 [R].

    decay_ratio: the last share of the tokens, in which `wsd` decays.
    """
    share = np.array(grid) / grid[-1]
    if schedule == "cosine":
        return 0.5 * (1.0 + np.cos(np.pi * share))
    if schedule == "wsd":
        return 1.0 - np.sqrt(np.maximum(0.0, 1.0 - (1.0 - share) / decay_ratio))
    return 1.0 - share if schedule == "linear" else np.zeros(len(grid))


def _places(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return where each wanted row is among the known ones, -1 if nowhere: int64 [N]."""
    places = {row.tobytes(): place for place, row in enumerate(known)}
    return np.array([places.get(row.tobytes(), -1) for row in wanted], dtype=np.int64)


def _valley(log_rate: np.ndarray) -> np.ndarray:
    """Return a bowl over ln(rate / good rate): a square near 0, a line far away."""
    return log_rate**2 / (1.0 + np.abs(log_rate))


def _tilt(log_rate: np.ndarray) -> np.ndarray:
    return log_rate / (1.0 + 0.3 * np.abs(log_rate))


def _heat(log_rate: np.ndarray) -> np.ndarray:
    """Return rate / good rate, within bounds."""
    return np.exp(np.clip(log_rate, *HEAT_BOUNDS))
