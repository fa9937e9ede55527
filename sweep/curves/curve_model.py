"""Predict where learning curves end: a Gaussian process over params and tokens.

The loss of a trial with params x after a share s of its tokens is modelled as

    loss(x, s) = mean(s) + final(x) + drop(x, s) + heat(x) * rate(s) + own(trial, s).

`mean` is the curve that all trials share; nothing is assumed of its height and length. `final` says
how good the params are at the end. `drop` says how much more, or less, than the mean the loss still
falls; it is 0 at the end. `heat` is the noise that a high rate keeps up and that goes as the rate
decays: trials with high rates look bad early and fall late. It grows in proportion to the rate, and
rate(s) is the schedule's share of the peak rate. `own` is what params do not explain: a seed, and a
part that is gone at the end. The idea to tie curves together by
their asymptotes is that of freeze-thaw optimisation (Swersky et al., arXiv:1406.3896); the sum of
kernels over axes is that of Duvenaud et al. (arXiv:1112.4394). Their exponential decay is not used,
because cosine decay has no asymptote. All kernels have fixed sizes in units of the losses
(`observations.py`); one common factor is fitted, in closed form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cholesky
from scipy.linalg.lapack import dtrtri

from sweep.curves.observations import Observations

VAGUE = 25.0  # variance of what nothing is assumed of, in squared units
LEAST_NOISE = 0.0015  # nats; two seeds of one config differ by 0.002 to 0.004
FACTOR_WEIGHT = 8.0  # the common factor is 1 with the weight of so many losses
REPORT_NOISE = 0.15  # variance of one report, as a share of the seed's
DROP_STRETCH = 0.3  # the drop varies more slowly over all axes jointly than the final loss
HEAT_BOUNDS = (-3.0, 1.2)  # ln(rate / good rate); above, trials diverge rather than heat up
JITTER, LEAST_VARIANCE = 1e-6, 1e-10


@dataclass(frozen=True)
class CurvePrior:
    """Set the sizes of the model's parts, as variances in squared units, and their lengths.

    rate, other, joint: final(x) along the rate, along each other axis, and of all axes jointly.
    drop_*: the same for drop(x, s) at the first rung. seed, own_drop: standard deviations of own.
    *_length: distance over which values are alike, in the encoder's numbers. valley: mean slope of
    the loss away from a rate that is known to be good, and valley_width its standard deviation.
    heat: mean of heat(x) at a good rate, and heat_width its standard deviation.
    """

    rate: float = 0.5
    other: float = 0.1
    joint: float = 0.25
    drop_rate: float = 0.3
    drop_other: float = 0.02
    drop_joint: float = 0.14
    seed: float = 0.09
    own_drop: float = 0.25
    rate_length: float = 1.7
    other_length: float = 3.7
    name_length: float = 0.8
    joint_stretch: float = 2.0
    fading: float = 0.8
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
        self._lengths = [self.prior.rate_length, *[self.prior.other_length] * (len(is_name) - 1)]
        deviations = (self.prior.valley_width, self.prior.tilt) if knows_rate else (1.0, 1.0)
        self._bowl = tuple(zip((_valley, _tilt), deviations, strict=True))
        faded = progress**self.prior.fading
        apart = np.abs(progress[:, None] - progress[None])
        self.fall = np.outer(faded, faded) * np.exp(-apart / self.prior.progress_length)
        self.shared_fall = VAGUE * np.outer(faded, faded) * np.exp(-apart / 3.0)

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


class Posterior:
    """Condition the model on losses, and predict ends of curves and what next losses would tell."""

    def __init__(
        self, model: CurveModel, rows: np.ndarray, seen: Observations, running: np.ndarray, next_rung: np.ndarray
    ) -> None:
        """rows: float64 [N, D], of the trials seen. running, next_rung: int64 [K], trials on their way to a rung.

        What running trials will report is taken to be what the model expects, so that it knows
        that they will tell something, and what not.
        """
        self.model, self.rows, self.num_trials = model, rows, len(rows)
        self.alike = model.alike(rows, rows)
        self.seed = max(model.prior.seed, LEAST_NOISE / seen.unit) ** 2
        self.noise = REPORT_NOISE * self.seed + JITTER
        self._trial, self._rung = seen.trial, seen.rung
        self.height = float(seen.value.mean())
        excess = seen.value - self.height - model.expected(rows)[seen.trial]
        excess -= model.expected_heat(rows[seen.trial], seen.rung)
        self._inverse = _inverse_factor(self._covariance(self._trial, self._rung))
        self.weights = self.solve(excess)
        self.factor = (FACTOR_WEIGHT + float(self.weights @ self.weights)) / (FACTOR_WEIGHT + len(excess))
        self.running, self.open_variance = running, self._end_variance(running)
        if len(running):
            self._believe(running, next_rung)

    def ends(self, rows: np.ndarray) -> Ends:
        """Predict the final losses of trials. rows: float64 [Q, D], those of all trials seen, then others."""
        return Ends(self, rows)

    def solve(self, right: np.ndarray) -> np.ndarray:
        """Return the inverse of the losses' Cholesky factor times this. right: float64 [M] or [M, Q]."""
        return self._inverse @ right

    def cross(self, alike: Alike, columns: np.ndarray | slice, rung: int, own: np.ndarray) -> np.ndarray:
        """Return the covariances of the losses seen with other losses at one rung: float64 [M, Q].

        columns: of `alike`, [Q]. own: int64 [Q], which of the trials seen each column is, or -1.
        """
        fall = self.model.fall[self._rung, rung]
        covariance = alike.final[:, columns][self._trial]
        covariance += (self.model.shared_fall[self._rung, rung] + VAGUE)[:, None]
        if fall.any():
            covariance += alike.drop[:, columns][self._trial] * fall[:, None]
        if self.model.rate[rung]:
            heat = self._rate_heat(alike)
            covariance += np.outer(heat, self.model.rate[rung] * alike.other_heat[columns])
        known = np.flatnonzero(own >= 0)
        same = self._trial[:, None] == own[None, known]
        covariance[:, known] += same * (self.seed + self.model.prior.own_drop**2 * fall)[:, None]
        return covariance

    def _end_variance(self, trials: np.ndarray) -> np.ndarray:
        """Return the variances of final losses, as far as what was seen tells: float64 [K]."""
        solved = self.solve(self.cross(self.alike, trials, self.model.num_rungs - 1, trials))
        return self.model.prior_variances(self.rows[trials])[0] + VAGUE + self.seed - _sums(solved, solved)

    def _rate_heat(self, alike: Alike) -> np.ndarray:
        return self.model.prior.heat_width**2 * self.model.rate[self._rung] * alike.heat[self._trial]

    def _believe(self, running: np.ndarray, next_rung: np.ndarray) -> None:
        """Add the expected next losses of running trials, by a step of block elimination.

        An added loss that is as expected has weight 0 in the factor's coordinates.
        """
        cross = np.empty((len(self._trial), len(running)))
        for rung in np.unique(next_rung):
            at = np.flatnonzero(next_rung == rung)
            cross[:, at] = self.cross(self.alike, running[at], int(rung), running[at])
        solved = self.solve(cross)
        inverse = _inverse_factor(self._covariance(running, next_rung) - solved.T @ solved)
        old = len(self._trial)
        grown = np.zeros((old + len(running), old + len(running)))
        grown[:old, :old] = self._inverse
        grown[old:, :old] = -inverse @ (solved.T @ self._inverse)
        grown[old:, old:] = inverse
        self._inverse = grown
        self._trial, self._rung = np.concatenate([self._trial, running]), np.concatenate([self._rung, next_rung])
        self.weights = np.concatenate([self.weights, np.zeros(len(running))])

    def _covariance(self, trial: np.ndarray, rung: np.ndarray) -> np.ndarray:
        """Return the covariances of losses of trials seen, each trial and rung once, with noise: float64 [K, K]."""
        trials, rungs = np.ix_(trial, trial), np.ix_(rung, rung)
        fall = self.model.fall[rungs]
        covariance = self.alike.final[trials] + self.alike.drop[trials] * fall + self.model.shared_fall[rungs] + VAGUE
        same = trial[:, None] == trial[None]
        covariance += same * (self.seed + self.model.prior.own_drop**2 * fall)
        heat = self.model.prior.heat_width * self.model.rate[rung] * self.alike.heat[trial]
        covariance += np.outer(heat, heat)
        covariance[np.diag_indices_from(covariance)] += self.noise
        return covariance


def _inverse_factor(covariance: np.ndarray) -> np.ndarray:
    """Return the inverse of the lower Cholesky factor. Products with it are faster than triangular solves here."""
    lower = cholesky(covariance, lower=True, check_finite=False, overwrite_a=True)
    return np.ascontiguousarray(dtrtri(lower, lower=1)[0])


class Ends:
    """Hold predicted final losses, and tell what later losses would change about them."""

    def __init__(self, posterior: Posterior, rows: np.ndarray) -> None:
        """rows: float64 [Q, D], see Posterior.ends(). Fills mean, variance: float64 [Q], in units."""
        self._posterior, self._model = posterior, posterior.model
        places = np.arange(len(rows))
        self._own = np.where(places < posterior.num_trials, places, -1)
        new = self._model.alike(posterior.rows, rows[posterior.num_trials :])
        self._alike = _joined(posterior.alike, new)
        self._final, self._drop = self._model.prior_variances(rows)
        self._solved = posterior.solve(posterior.cross(self._alike, slice(None), self._model.num_rungs - 1, self._own))
        self.mean = posterior.weights @ self._solved + self._model.expected(rows) + posterior.height
        variance = self._final + VAGUE + posterior.seed - _sums(self._solved, self._solved)
        self.variance = np.maximum(variance, LEAST_VARIANCE)

    def spread(self, one: int) -> np.ndarray:
        """Return the standard deviations of all ends less that of trial `one`: float64 [Q].

        What they share, such as the unknown mean curve, falls out.
        """
        shared = self._alike.final[one] + VAGUE - self._solved[:, one] @ self._solved
        shared[one] = self.variance[one]
        variance = self.variance + self.variance[one] - 2.0 * shared
        return np.sqrt(np.maximum(variance, LEAST_VARIANCE) * self._posterior.factor)

    def open_spread(self, one: int) -> np.ndarray:
        """Return spread(one) as it is before running trials report: float64 [Q]."""
        posterior, told = self._posterior, np.zeros(len(self.mean))
        told[posterior.running] = np.maximum(posterior.open_variance - self.variance[posterior.running], 0.0)
        return np.sqrt(self.spread(one) ** 2 + (told + told[one]) * posterior.factor)

    def told(self, options: np.ndarray, rungs: np.ndarray, other: int) -> np.ndarray:
        """Return how far losses at later rungs would move expected ends, as standard deviations: float64 [K].

        options, rungs: int64 [K]. Entry k is about the end of option k less that of trial `other`, if
        option k reported at rung rungs[k], counted from 0.
        """
        told = np.zeros(len(options))
        for rung in np.unique(rungs):
            at = np.flatnonzero(rungs == rung)
            told[at] = self._told_at(rung, options[at], other)
        return told

    def _told_at(self, rung: int, options: np.ndarray, other: int) -> np.ndarray:
        posterior, model = self._posterior, self._model
        solved = posterior.solve(posterior.cross(self._alike, options, rung, self._own[options]))
        fall, final = model.fall[rung, rung], self._final[options]
        loss = final + self._drop * fall + model.shared_fall[rung, rung] + VAGUE
        loss += posterior.seed + posterior.noise + model.prior.own_drop**2 * fall - _sums(solved, solved)
        loss += (model.prior.heat_width * model.rate[rung] * self._alike.other_heat[options]) ** 2
        with_own = final + VAGUE + posterior.seed - _sums(self._solved[:, options], solved)
        with_other = self._alike.final[other, options] + VAGUE - self._solved[:, other] @ solved
        return np.abs(with_own - with_other) / np.sqrt(np.maximum(loss, LEAST_VARIANCE)) * math.sqrt(posterior.factor)


def _joined(left: Alike, right: Alike) -> Alike:
    """Return how alike the same rows are to the others of both."""
    final, drop = np.hstack([left.final, right.final]), np.hstack([left.drop, right.drop])
    return Alike(final, drop, left.heat, np.concatenate([left.other_heat, right.other_heat]))


def _sums(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the sums over columns of the products of two arrays [M, Q]."""
    return np.einsum("mq,mq->q", left, right)


def progress_of(grid: tuple[int, ...]) -> np.ndarray:
    """Return how far each rung is from the end in log(tokens): 1 at the first rung, 0 at the last."""
    if len(grid) == 1:
        return np.zeros(1)
    return np.array([math.log(grid[-1] / tokens) / math.log(grid[-1] / grid[0]) for tokens in grid])


def decay_of(schedule: str, grid: tuple[int, ...]) -> np.ndarray:
    """Return by rung the share of the peak rate that is still to go, for a schedule's name: float64 [R]."""
    share = np.array(grid) / grid[-1]
    if schedule == "cosine":
        return 0.5 * (1.0 + np.cos(np.pi * share))
    return 1.0 - share if schedule == "linear" else np.zeros(len(grid))


def _valley(log_rate: np.ndarray) -> np.ndarray:
    """Return a bowl over ln(rate / good rate): a square near 0, a line far away."""
    return log_rate**2 / (1.0 + np.abs(log_rate))


def _tilt(log_rate: np.ndarray) -> np.ndarray:
    return log_rate / (1.0 + 0.3 * np.abs(log_rate))


def _heat(log_rate: np.ndarray) -> np.ndarray:
    """Return rate / good rate, within bounds."""
    return np.exp(np.clip(log_rate, *HEAT_BOUNDS))
