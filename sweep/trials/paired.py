"""Compare adapters on the same evaluation samples, with paired standard errors.

A mean loss is a ratio: nats over all samples by target tokens over all samples. Samples are the
independent units, because tokens of one sample depend on each other. With D the difference of two
adapters' nats on a sample, T its targets, and d = sum(D) / sum(T), leaving out sample i moves d by
-(D_i - d T_i) / (sum(T) - T_i). The standard error is the delete-one jackknife's:
sqrt((n - 1) / n * sum of these moves squared), with n - 1 degrees of freedom. For many samples it
is the delta method's. For few, of unequal length, it is larger, as it must be.

Sources: Cochran, Sampling Techniques (1977), chapter 6, on ratios; Efron and Tibshirani, An
Introduction to the Bootstrap (1993), chapter 11, on the jackknife; Miller, Adding Error Bars to
Evals (arXiv 2411.00640), on pairs and clusters; Hsu, Annals of Statistics 12 (1984) 1136-1144, on
comparisons with the best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.sample_losses import SampleLosses

LEVEL, LEVEL_TEXT = 0.95, "95 %"
OTHER_SAMPLES = "losses on other evaluation samples"


@dataclass(frozen=True)
class PairedDifference:
    """Hold a difference of two mean losses, in nats per target token.

    standard_error: infinite for a single sample, which says nothing of its spread. least_samples:
    of the smallest of several evaluation sets, whose degrees of freedom then count.
    """

    nats: float
    standard_error: float
    num_samples: int
    least_samples: int | None = None

    def margin(self, error_rate: float) -> float:
        """Return the nats below `nats` that the true difference exceeds with this chance of error.

        It is Student's quantile times the standard error.
        """
        number = self.num_samples if self.least_samples is None else self.least_samples
        if self.standard_error == 0.0 or number < 2:
            return self.standard_error
        from scipy.special import stdtrit  # here, because help and completion must not wait for it

        return float(stdtrit(number - 1, 1.0 - error_rate)) * self.standard_error


@dataclass(frozen=True)
class Contest:
    """Hold the contender with the lowest loss, and how far the others are above it.

    differences: trial number -> its loss less the lowest. Those of other trials are not known.
    left_out: trial number -> why it could not be compared, in words.

    Of m compared others, each is tested with a chance of error of 0.05 / m, on one side. So the
    set of `tied` holds the truly best of them with a probability of at least 0.95: it is left out
    only if the lowest, which is truly no better, is told apart from it (Hsu; Bonferroni's bound in
    place of Dunnett's quantile, which differs by 0.2 standard errors at 15 others).
    """

    lowest: int
    num_samples: int = 0
    differences: Mapping[int, PairedDifference] = field(default_factory=dict)
    left_out: Mapping[int, str] = field(default_factory=dict)

    def at_least(self, number: int) -> float:
        """Return the nats by which the trial is at least above the lowest; below 0 if tied."""
        found = self.differences[number]
        return found.nats - found.margin((1.0 - LEVEL) / len(self.differences))

    @property
    def tied(self) -> tuple[int, ...]:
        """Return the others that cannot be told apart from the lowest, closest first."""
        order = sorted(self.differences, key=lambda number: (self.differences[number].nats, number))
        return tuple(number for number in order if self.at_least(number) <= 0.0)


def paired_difference(losses: SampleLosses, others: SampleLosses) -> PairedDifference:
    """Return the mean of `losses` less that of `others`, with its paired standard error.

    Both are on the same samples, with the same targets. Of several evaluation sets, each has its own
    difference and error; the sets are independent, so the weighted mean's error is the root of the
    sum of the squared weighted ones.
    """
    if not losses.sets:
        return _difference(losses.sums, others.sums, losses.num_targets)
    total = sum(losses.weights.values())
    found = [
        (losses.weights[name] / total, _difference(losses.sums[part], others.sums[part], losses.num_targets[part]))
        for name, part in losses.parts().items()
        if losses.weights[name]
    ]
    nats = math.fsum(weight * one.nats for weight, one in found)
    error = math.hypot(*(weight * one.standard_error for weight, one in found))
    counts = [one.num_samples for _, one in found]
    return PairedDifference(nats, error, sum(counts), min(counts))


def _difference(sums: Sequence[float], others: Sequence[float], num_targets: Sequence[int]) -> PairedDifference:
    import numpy as np

    targets = np.asarray(num_targets, dtype=np.float64)
    nats = np.asarray(sums, dtype=np.float64) - np.asarray(others, dtype=np.float64)
    nats, targets = nats[targets > 0], targets[targets > 0]
    total, num_samples = float(targets.sum()), len(targets)
    mean = float(nats.sum()) / total
    if num_samples < 2:
        return PairedDifference(mean, math.inf, num_samples)
    moves = (nats - mean * targets) / (total - targets)
    error = math.sqrt((num_samples - 1) / num_samples * float(np.square(moves).sum()))
    return PairedDifference(mean, error, num_samples)


def are_comparable(losses: SampleLosses, others: SampleLosses) -> bool:
    """Return whether both are on the same samples."""
    same = losses.evaluation_digest == others.evaluation_digest and losses.num_targets == others.num_targets
    return same and losses.sets == others.sets and losses.weights == others.weights


def hold_contest(losses: Mapping[int, SampleLosses], lowest: int, left_out: Mapping[int, str]) -> Contest:
    """Compare each contender with the one whose loss is lowest.

    losses: trial number -> losses on each sample, of `lowest` too. left_out: of the others, why
    they have none.
    """
    best, missing = losses[lowest], dict(left_out)
    differences = {}
    for number, found in losses.items():
        if not are_comparable(found, best):
            missing[number] = OTHER_SAMPLES
        elif number != lowest:
            differences[number] = paired_difference(found, best)
    decisive = [part for name, part in best.parts().items() if not best.sets or best.weights[name]]
    counted = sum(number > 0 for part in decisive for number in best.num_targets[part])
    return Contest(lowest, counted, differences, missing)
