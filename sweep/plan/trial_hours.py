"""Predict where a trial's hours go, training and evaluation, and say so if evaluation takes too much of them.

An evaluation reads its samples forward only, at about twice the speed of training or a little more.
Answers to task metrics have a line of their own (sweep/plan/answers_forecast.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.command_answers import EVALUATION, DataAccount, Facts
from engine.config.trial import TrainConfig
from engine.units import counted
from sweep.config.pruner_options import HyperbandConfig, MedianConfig, PatientConfig, SuccessiveHalvingConfig
from sweep.config.sweep import SweepConfig
from sweep.plan.feasibility import Fit
from sweep.plan.samples import MIN_EVAL_SAMPLES

# Beyond a quarter of the time, a trial evaluates most of what it trains on: 0.75 tokens for each. Half as many
# evaluated tokens then save an eighth of the sweep, or buy as many more trials.
MOST_SHARE, GOOD_SHARE = 0.25, 0.15
LEAST_S = 15.0  # of a sweep's evaluations: fewer seconds are not worth a warning
STEP = 16  # a proposed number of samples is a multiple
MIN_REPORTS = 2  # for a pruner to compare


@dataclass(frozen=True)
class EvaluationWork:
    """Hold what each evaluation reads: the accounts of its sets, as preparation knows them. times: evaluations a trial."""

    accounts: tuple[DataAccount, ...]
    times: int

    @classmethod
    def of(cls, config: TrainConfig, facts: Facts | None) -> EvaluationWork | None:
        """Return the work of a trial; None if its samples are not known. A running average is evaluated beside the adapter."""
        found = [one for one in getattr(facts, "accounts", ()) if one.part.split("/")[0] == EVALUATION]
        own = [one for one in found if one.max_seq_length == config.data.eval_max_seq_length]
        if not own:
            return None
        largest: dict[str, DataAccount] = {}
        for one in own:  # variables of a template may give each set other prompts
            largest[one.part] = max(one, largest.get(one.part, one), key=lambda account: account.num_tokens)
        rungs = len(config.train.report_grid())
        return cls(tuple(largest.values()), rungs if config.optim.ema_horizon is None else 2 * rungs)

    @property
    def num_tokens(self) -> int:
        """Return the tokens of one evaluation."""
        return sum(one.num_tokens for one in self.accounts)

    @property
    def most_rows(self) -> int:
        """Return the rows of the largest set, which data.eval_max_samples limits."""
        return max(one.num_chosen for one in self.accounts)

    def tokens_with(self, most_rows: int) -> float:
        """Return about how many tokens an evaluation has with at most so many rows in each set."""
        return sum(one.num_tokens * min(1.0, most_rows / one.num_chosen) for one in self.accounts)


@dataclass(frozen=True)
class Point:
    """Hold a point of the space, its config and its prediction. work: None if the evaluation samples are not known."""

    params: dict[str, Any]
    config: TrainConfig
    fit: Fit
    work: EvaluationWork | None = None

    @property
    def tokens_per_second(self) -> float | None:
        speed = None if self.fit.plan is None else self.fit.plan.speed
        return None if speed is None else speed.tokens_per_second

    @property
    def training_hours(self) -> float | None:
        """Return the hours of one trial's steps."""
        return None if self.tokens_per_second is None else self.config.train.max_tokens / self.tokens_per_second / 3600

    @property
    def hours_each(self) -> float:
        """Return the hours of one evaluation; 0 if its samples or speed are not known."""
        speed = None if self.fit.evaluation is None else self.fit.evaluation.tokens_per_second
        return 0.0 if speed is None or self.work is None else self.work.num_tokens / speed / 3600

    @property
    def evaluation_hours(self) -> float:
        """Return the hours of one trial's evaluations; 0 if they are not known."""
        return 0.0 if self.work is None else self.work.times * self.hours_each

    @property
    def hours(self) -> float | None:
        """Return the hours of one trial, with its evaluations if their samples are known."""
        return None if self.training_hours is None else self.training_hours + self.evaluation_hours

    def cells(self) -> tuple[str, str, str, str]:
        """Return the table's cells: plan, peak GiB, tok/s, hours."""
        peak = self.fit.predicted_peak_gib
        peak_text = "" if peak is None else f"{peak:.2f}"
        if self.fit.plan is None:
            return f"does not fit: {self.fit.reason}", peak_text, "", ""
        return self.fit.plan.describe(), peak_text, f"{self.tokens_per_second:,.0f}", hours_text(self.hours)


def hours_text(value: float) -> str:
    """Format hours: 3.41, or 0.0042."""
    return f"{value:,.2f}" if value >= 0.1 else f"{value:.2g}"


def most_reports(grid: Sequence[int], num_trials: int, full_trials: float) -> float:
    """Return the most reports that a sweep can make with the tokens of so many full trials, if trials end early.

    grid: tokens seen at each rung. The cheapest stretches between rungs come first, each for all trials.
    """
    left, number = full_trials * grid[-1], 0.0
    for length in sorted(after - before for before, after in zip((0, *grid), grid)):
        taken = min(num_trials, left / length)
        left, number = left - taken * length, number + taken
    return number


def least_reports(config: SweepConfig) -> int:
    """Return the fewest reports of a trial with which the pruner still stops some before their end, and metrics are measured."""
    pruner, at = config.effective_pruner, config.metrics.at
    first = 1
    if isinstance(pruner, SuccessiveHalvingConfig):
        first = pruner.min_rung * pruner.reduction_factor**pruner.min_early_stopping_rate
    elif isinstance(pruner, HyperbandConfig):
        first = pruner.min_rung
    elif isinstance(pruner, MedianConfig):
        first = pruner.num_warmup_rungs
    elif isinstance(pruner, PatientConfig):
        first = pruner.patience + 1
    return max(MIN_REPORTS, first + 1, 0 if isinstance(at, str) else max(at))


def evaluation_warning(points: Sequence[Point], num_trials: float, least: int = MIN_REPORTS) -> str | None:
    """Return the line about evaluations that take more than MOST_SHARE of a trial's time, with a way out.

    points: some of the space that fit; without speeds or samples there is no line. num_trials: whole ones that
    the sweep pays for. least: reports below which nothing is proposed. There is none either for evaluations of less
    than LEAST_S in all, or that cannot be fewer.
    """
    known = [point for point in points if point.training_hours and point.evaluation_hours]
    if not known:
        return None
    training, evaluation = (sum(hours) for hours in zip(*((p.training_hours, p.evaluation_hours) for p in known)))
    work = known[0].work

    def share(part: float) -> float:
        """Return the share of the time if `part` of today's tokens are evaluated."""
        return part * evaluation / (part * evaluation + training)

    if share(1.0) <= MOST_SHARE or num_trials * evaluation / len(known) * 3600 < LEAST_S:
        return None
    part = GOOD_SHARE / (1.0 - GOOD_SHARE) * training / evaluation  # of today's tokens, for a share of GOOD_SHARE
    ways = [*_fewer_samples(work, part, share), *_fewer_reports(known[0].config, part, share, least)]
    if not ways:
        return None
    each = f"{counted(work.times, 'evaluation')} of {counted(work.num_tokens, 'token')}"
    return f"evaluation takes about {share(1.0):.0%} of a trial's time ({each}): {', or '.join(ways)}"


def _fewer_samples(work: EvaluationWork, part: float, share: Callable[[float], float]) -> list[str]:
    """Return how few samples bring the share down to GOOD_SHARE, or near it; nothing below MIN_EVAL_SAMPLES."""
    wanted = part * work.num_tokens
    fits = [n for n in range(MIN_EVAL_SAMPLES, work.most_rows, STEP) if work.tokens_with(n) <= wanted]
    number = max(fits, default=MIN_EVAL_SAMPLES)
    found = share(work.tokens_with(number) / work.num_tokens)
    if number >= work.most_rows or found > MOST_SHARE:
        return []
    return [f"data.eval_max_samples={number} makes it about {found:.0%}"]


def _fewer_reports(config: TrainConfig, part: float, share: Callable[[float], float], least: int) -> list[str]:
    """Return how few reports bring the share down to GOOD_SHARE, or near it, but at least `least`."""
    rungs = len(config.train.report_grid())
    number = max(least, int(part * rungs))
    found = share(number / rungs)
    if number >= rungs or found > MOST_SHARE:
        return []
    if config.train.report_at_tokens is None:
        return [f"train.num_reports={number} makes it about {found:.0%}"]
    return [f"{number} rungs (train.report_at_tokens) make it about {found:.0%}"]
