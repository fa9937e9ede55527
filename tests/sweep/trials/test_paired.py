"""Two adapters are compared on the same samples: how large the error is, and how often a verdict is wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine.sample_losses import SampleLosses
from sweep.trials.paired import Contest, PairedDifference, hold_contest, paired_difference


def losses(sums, targets, digest="a") -> SampleLosses:
    return SampleLosses(digest, tuple(map(float, sums)), tuple(map(int, targets)))


def drawn(rng: np.random.Generator, num_samples: int, means: list[float]) -> dict[int, SampleLosses]:
    """Draw the losses of adapters with these true means on samples of unequal length.

    What makes a sample hard is common to all adapters; a tenth as much is each adapter's own.
    """
    targets = np.maximum(1, rng.lognormal(4.0, 0.8, num_samples)).astype(int)
    hard = rng.normal(0.0, 0.5, num_samples)
    own = rng.normal(0.0, 0.05, (len(means), num_samples)) + rng.normal(size=(len(means), num_samples)) * 0.3 / np.sqrt(targets)
    return {i: losses(targets * (mean + hard + own[i]), targets) for i, mean in enumerate(means)}


def test_the_difference_is_that_of_the_means_per_token_and_the_error_that_of_a_bootstrap_of_samples():
    rng = np.random.default_rng(0)
    one, other = drawn(rng, 200, [2.0, 2.1]).values()
    found = paired_difference(one, other)
    assert found.nats == pytest.approx(one.mean - other.mean, abs=1e-12)
    a, b, targets = (np.array(values, dtype=float) for values in (one.sums, other.sums, one.num_targets))
    picked = rng.integers(0, 200, (4000, 200))
    resampled = (a[picked].sum(1) - b[picked].sum(1)) / targets[picked].sum(1)
    assert found.standard_error == pytest.approx(resampled.std(), rel=0.06)
    unpaired = (a[picked].sum(1) / targets[picked].sum(1)).std()
    assert found.standard_error < 0.3 * unpaired  # the twin: what is lost without the pairs


def test_the_error_is_the_delete_one_jackknifes_to_the_last_digits():
    one, other = losses([1, 5, 2, 9], [2, 4, 1, 8]), losses([2, 3, 2, 7], [2, 4, 1, 8])
    differences = np.array(one.sums) - np.array(other.sums)
    targets, found = np.array(one.num_targets), paired_difference(one, other)
    without = [np.delete(differences, i).sum() / np.delete(targets, i).sum() for i in range(4)]
    expected = math.sqrt(3 / 4 * sum((value - found.nats) ** 2 for value in without))
    assert found == PairedDifference(pytest.approx(3 / 15), pytest.approx(expected), 4)


def test_a_sample_without_targets_counts_for_nothing():
    with_empty = paired_difference(losses([1, 0, 3], [1, 0, 2]), losses([2, 0, 2], [1, 0, 2]))
    assert with_empty == paired_difference(losses([1, 3], [1, 2]), losses([2, 2], [1, 2])) and with_empty.num_samples == 2


@pytest.mark.parametrize("num_samples", [2, 60])
def test_the_best_is_lost_from_the_tie_no_more_often_than_the_level_says(num_samples):
    """All of eight are truly best, which is the hardest case. The twin tests each as if it were the only one."""
    rng, lost, lost_without_correction = np.random.default_rng(1), 0, 0
    for _ in range(300):
        found = drawn(rng, num_samples, [2.0] * 8)
        lowest = min(found, key=lambda number: (found[number].mean, number))
        contest = hold_contest(found, lowest, {})
        if lowest != 0:
            lost += 0 not in contest.tied
            lost_without_correction += contest.differences[0].nats > contest.differences[0].margin(0.05)
    assert lost / 300 <= 0.05 < 0.1 < lost_without_correction / 300


@pytest.mark.parametrize(("gap", "least", "most"), [(0.002, 0.0, 0.2), (0.03, 0.95, 1.0)])
def test_a_large_difference_is_found_and_a_small_one_is_not_claimed(gap, least, most):
    rng, told = np.random.default_rng(3), 0
    for _ in range(100):
        found = drawn(rng, 256, [2.0, 2.0 + gap, 2.5, 2.6, 2.7])
        told += 1 not in hold_contest(found, 0, {}).tied
    assert least <= told / 100 <= most


def test_equal_losses_are_a_tie_and_a_constant_difference_is_none():
    one = losses([2, 4, 6], [1, 2, 3])
    contest = hold_contest({0: one, 1: one, 2: losses([4, 8, 12], [1, 2, 3])}, 0, {})
    assert contest.tied == (1,) and contest.at_least(2) == pytest.approx(2.0)


def test_one_sample_tells_nobody_apart_and_two_hardly():
    alone = hold_contest({0: losses([2], [1]), 1: losses([9], [1])}, 0, {})
    assert alone.tied == (1,) and alone.at_least(1) == -math.inf and alone.num_samples == 1
    assert hold_contest({0: losses([2, 3], [1, 1]), 1: losses([3, 6], [1, 1])}, 0, {}).tied == (1,)


def test_losses_on_other_samples_are_never_compared():
    one, moved = losses([2, 3], [1, 1]), losses([2, 3], [1, 1], digest="b")
    contest = hold_contest({0: one, 1: moved, 2: losses([2, 3], [1, 2])}, 0, {3: "no losses by sample"})
    assert contest == Contest(0, 2, {}, {1: "losses on other evaluation samples", 2: "losses on other evaluation samples",
                                         3: "no losses by sample"})  # fmt: skip
