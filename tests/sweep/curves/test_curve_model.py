"""The Gaussian process over curves, next to its textbook formulas."""

import math

import numpy as np
import pytest

from sweep.curves.curve_model import VAGUE, CurveModel, decay_of, progress_of
from sweep.curves.curve_posterior import Posterior
from sweep.curves.observations import Observations

GRID = (100, 200, 400, 800, 1600)
DECAY = decay_of("cosine", GRID)
ROWS = np.array([[0.3, 0.0, 1.2], [-0.4, 1.0, 0.2], [1.5, 2.0, 0.7], [0.0, 0.0, 0.0]])
NEW = np.array([[0.1, 1.0, 0.5], [-2.0, 2.0, 1.0]])


@pytest.fixture(params=[True, False], ids=["rate known", "rate unknown"])
def model(request):
    return CurveModel(progress_of(GRID), DECAY, np.array([False, True, False]), request.param)


def seen():
    trial, rung = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 0, 0, 2, 4])
    return Observations(trial, rung, np.array([3.0, 2.6, 3.4, 3.1, 2.2, 1.9]), unit=0.02)


def covariance(model, left, right):
    """Return the covariance of two losses, each (row, rung, which trial), by the sum in the module's docstring."""
    prior, (x, r, i), (y, q, j) = model.prior, left, right
    final = drop = away = drop_away = 0.0
    for axis in range(3):
        if axis == 1:
            squares = (x[1] != y[1]) / prior.name_length**2
            near, stretch = float(x[1] == y[1]), 1.0
        else:
            squares = ((x[axis] - y[axis]) / (prior.rate_length if axis == 0 else prior.other_length)) ** 2
            near, stretch = math.exp(-squares / 2), prior.joint_stretch**2
        final += (prior.rate if axis == 0 else prior.other) * near
        drop += (prior.drop_rate if axis == 0 else prior.drop_other) * near
        away += squares / stretch
        drop_away += 0.3 * squares
    root = math.sqrt(5 * away)
    final += prior.joint * (1 + root + root**2 / 3) * math.exp(-root)
    drop += prior.drop_joint * math.exp(-drop_away / 2)
    widths = (prior.valley_width, prior.tilt) if model._knows_rate else (1.0, 1.0)
    final += widths[0] ** 2 * valley(x[0]) * valley(y[0])
    final += widths[1] ** 2 * (x[0] / (1 + 0.3 * abs(x[0]))) * (y[0] / (1 + 0.3 * abs(y[0])))
    heat = [0.5 * (1 + math.cos(math.pi * GRID[k] / 1600)) * math.exp(min(max(z[0], -3), 1.6)) for z, k in ((x, r), (y, q))]
    final += prior.heat_width**2 * heat[0] * heat[1]
    s, t = progress_of(GRID)[r], progress_of(GRID)[q]
    faded = s**prior.fading * t**prior.fading
    fall = faded * math.exp(-abs(s - t) / prior.progress_length)
    total = final + drop * fall + VAGUE + VAGUE * faded * math.exp(-abs(s - t) / 3.0)
    return total + (prior.seed**2 * max(1.0, (0.0015 / 0.02 / prior.seed) ** 2) + prior.own_drop**2 * fall if i == j else 0.0)


def valley(rate):
    return rate**2 / (1 + abs(rate))


def dense(model, known, values, wanted):
    """Return mean and covariance of `wanted` given `known`, with a matrix inverse."""
    noise = 0.05 * max(model.prior.seed, 0.0015 / 0.02) ** 2 + 1e-6
    k = np.array([[covariance(model, a, b) for b in known] for a in known]) + noise * np.eye(len(known))
    cross = np.array([[covariance(model, a, b) for b in wanted] for a in known])
    prior = np.array([[covariance(model, a, b) for b in wanted] for a in wanted])
    slope = model.prior.valley if model._knows_rate else 0.0
    expected = [
        np.array([slope * valley(x[0]) + model.prior.heat * DECAY[r] * math.exp(min(max(x[0], -3), 1.6)) for x, r, _ in points])
        for points in (known, wanted)
    ]
    height = np.mean(values[:6])
    weights = np.linalg.inv(k)
    mean = height + expected[1] + cross.T @ weights @ (values - height - expected[0])
    return mean, prior - cross.T @ weights @ cross


def predictions(model, running=(), next_rung=()):
    posterior = Posterior(model, ROWS, seen(), np.array(running, dtype=np.int64), np.array(next_rung, dtype=np.int64))
    return posterior, posterior.ends(np.concatenate([ROWS, NEW]))


def known_losses():
    return [(ROWS[i], r, i) for i, r in zip(seen().trial, seen().rung)]


WANTED = [(ROWS[i], 4, i) for i in range(4)] + [(NEW[0], 4, -1), (NEW[1], 4, -2)]


def test_the_posterior_is_that_of_the_dense_formula(model):
    mean, full = dense(model, known_losses(), seen().value, WANTED)
    posterior, ends = predictions(model)
    np.testing.assert_allclose(ends.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(ends.variance, np.diag(full), rtol=1e-5)
    spread = np.sqrt(np.maximum(np.diag(full) + full[1, 1] - 2 * full[1], 1e-10) * posterior.factor)
    np.testing.assert_allclose(ends.spread(1), spread, rtol=1e-4)


def test_what_a_later_loss_tells_is_the_change_of_the_dense_formula(model):
    """An expected end moves by covariance / deviation of the loss, for each deviation by which the loss surprises."""
    posterior, ends = predictions(model)
    for option, rung, other in ((0, 3, 2), (1, 2, 2), (3, 0, 1), (4, 0, 1), (5, 4, 0)):
        ahead = [WANTED[option], WANTED[other], (WANTED[option][0], rung, WANTED[option][2])]
        _, full = dense(model, known_losses(), seen().value, ahead)
        noise = 0.05 * posterior.seed + 1e-6
        told = abs(full[0, 2] - full[1, 2]) / math.sqrt(full[2, 2] + noise) * math.sqrt(posterior.factor)
        assert ends.told(np.array([option]), np.array([rung]), other)[0] == pytest.approx(told, rel=1e-4)


def test_a_running_trial_counts_as_reported_at_its_expected_loss(model):
    expected, _ = dense(model, known_losses(), seen().value, [(ROWS[1], 1, 1)])
    mean, full = dense(model, [*known_losses(), (ROWS[1], 1, 1)], np.append(seen().value, expected), WANTED)
    _, ends = predictions(model, running=[1], next_rung=[1])
    np.testing.assert_allclose(ends.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(ends.variance, np.diag(full), rtol=1e-5)
    assert ends.variance[1] < predictions(model)[1].variance[1]


def test_losses_twice_as_far_from_what_was_expected_make_all_deviations_larger(model):
    def factor(stretch):
        values = Observations(seen().trial, seen().rung, 2.0 + stretch * (seen().value - 2.0), 0.02)
        return Posterior(model, ROWS, values, np.zeros(0, np.int64), np.zeros(0, np.int64)).factor

    assert factor(20.0) > factor(10.0) > factor(1.0) == 1.0  # losses as expected make none smaller


def test_a_finished_trial_keeps_its_loss(model):
    _, ends = predictions(model)
    assert ends.mean[2] == pytest.approx(1.9, abs=0.05)
    assert ends.variance[2] < 0.01 < ends.variance[3]


def test_what_is_known_of_trials_is_kept_and_what_is_new_is_added(model):
    """Trials come, go and change places; some hold in both lists, some in one, and some are new."""
    draws = np.random.default_rng(0).normal(size=(12, 3))
    draws[:, 1] = np.round(draws[:, 1])
    for rows, others in (
        (draws[:4], draws[4:10]),
        (draws[[1, 0, 3, 10]], draws[[5, 4, 8, 11, 9]]),
        (draws[[1, 10]], draws[[11, 4, 4]]),
        (draws[5:9], draws[:3]),
        (draws[5:9], draws[:0]),
    ):
        kept, whole = model.known_alike(rows, others, 0), model.alike(rows, others)
        for name in ("final", "drop", "heat", "other_heat"):
            np.testing.assert_array_equal(getattr(kept, name), getattr(whole, name))


def test_progress_falls_from_1_to_0_in_log_tokens():
    np.testing.assert_allclose(progress_of(GRID), [1.0, 0.75, 0.5, 0.25, 0.0])
    assert progress_of((512,)).tolist() == [0.0]


def test_the_decay_is_that_of_the_schedule():
    np.testing.assert_allclose(decay_of("cosine", (1, 2, 4)), [0.5 + 0.5 / math.sqrt(2), 0.5, 0.0], atol=1e-12)
    np.testing.assert_allclose(decay_of("linear", (1, 2, 4)), [0.75, 0.5, 0.0])
    assert not decay_of("constant", (1, 2, 4)).any()
    np.testing.assert_allclose(decay_of("wsd", (1, 2, 3, 4), 0.5), [1.0, 1.0, 1.0 - math.sqrt(0.5), 0.0], atol=1e-12)
