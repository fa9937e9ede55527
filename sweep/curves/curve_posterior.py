"""Condition the model of learning curves on losses, and predict.

The formulas are those of Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), 2.2
and A.3. All covariances are multiplied by one factor, whose estimate is in closed form.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.linalg import cholesky
from scipy.linalg.lapack import dtrtri

from sweep.curves.curve_model import VAGUE, Alike, CurveModel
from sweep.curves.observations import Observations

LEAST_NOISE = 0.0015  # nats; two seeds of one config differ by 0.002 to 0.004
FACTOR_WEIGHT = 8.0  # the common factor is 1 with the weight of so many losses
LEAST_FACTOR = 1.0  # losses that agree with the model so far do not show that the ends will
REPORT_NOISE = 0.05  # variance of one report, as a share of the seed's
JITTER, LEAST_VARIANCE = 1e-6, 1e-10


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
        self.alike = model.known_alike(rows, rows, 0)
        self.seed = max(model.prior.seed, LEAST_NOISE / seen.unit) ** 2
        self.noise = REPORT_NOISE * self.seed + JITTER
        self._trial, self._rung = seen.trial, seen.rung
        self.height = float(seen.value.mean())
        excess = seen.value - self.height - model.expected(rows)[seen.trial]
        excess -= model.expected_heat(rows[seen.trial], seen.rung)
        self._inverse = _inverse_factor(self._covariance(self._trial, self._rung))
        self.weights = self.solve(excess)
        factor = (FACTOR_WEIGHT + float(self.weights @ self.weights)) / (FACTOR_WEIGHT + len(excess))
        self.factor = max(factor, LEAST_FACTOR)
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
        place, column = np.nonzero(self._trial[:, None] == own[None])  # few of M x Q
        covariance[place, column] += (self.seed + self.model.prior.own_drop**2 * fall)[place]
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
        new = self._model.known_alike(posterior.rows, rows[posterior.num_trials :], 1)
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
