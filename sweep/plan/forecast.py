"""Predict memory, speed and hours at points of the space, before anything starts.

This needs neither torch nor a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

from engine.command_answers import Facts
from engine.config.matmul import Matmul
from engine.config.trial import TrainConfig
from engine.errors import InputError
from engine.planning.cards import CARDS
from engine.planning.known_cards import speed_basis
from engine.shape.model_shape import ModelShape
from engine.units import counted
from sweep.plan.feasibility import Feasibility, Fit, has_no_effect
from sweep.plan.trial_hours import MIN_REPORTS, EvaluationWork, Point, evaluation_warning, hours_text, most_reports
from sweep.space.space import Choice, Dimension, Space, is_active
from sweep.text import params_text, short_name, value_text

MAX_POINTS = 24  # the table fits a screen, and planning takes seconds
Params = dict[str, Any]
LEANEST = {
    "micro_batch_size": 1, "activation_checkpointing": True, "keep_layers": 0, "host_layers": 0, "weight_cache_gib": 0.0,
}  # fmt: skip
"""One way to compute every config, so that predictions of different configs compare."""


def describe_forecast(
    space: Space,
    base: Mapping[str, Any],
    feasibility: Feasibility,
    num_trials: int,
    full_trials: float | None = None,
    facts: Facts | None = None,
    least: int = MIN_REPORTS,
) -> tuple[str, str | None]:
    """Return the table of points and the sweep's cost, or one line if nothing can be predicted; and a warning, if any.

    full_trials: the sweep's budget of tokens, in those of a whole trial; None: no limit. facts: with the accounts of
    the evaluation samples, without which evaluations are left out. least: see `evaluation_warning`.
    """
    # an existing Ray cluster may have GPUs while this machine has none
    if feasibility.card is None:
        return no_forecast_line("auto"), None
    if feasibility.shape is None:
        return "forecast   none: nothing is predicted for a model of this architecture", None
    size = space.size()
    whole = size is not None and size <= MAX_POINTS
    chosen = list(space.points()) if whole else corners(space)
    points = [_point(space, base, feasibility, params, facts) for params in chosen]
    shown = points if whole else _distinct(points)
    paths = [dimension.path for dimension in (space.dimensions if whole else _telling(space))]
    what = "every point of the space" if whole else f"{counted(len(shown), 'corner')} of the space, equal predictions shown once"
    fitting = [point for point in shown if point.fit.fits]
    possible = sum(point.fit.fits for point in points) if whole else size or num_trials
    gain = _matmul_gain(space, base, feasibility, fitting)
    head = [card_line(feasibility), *_estimate(feasibility.shape), *gain, f"forecast   {what}"]
    num_trials = min(num_trials, possible)
    grid = space.apply(base, chosen[0]).train.report_grid()
    text = "\n".join([*head, *_table(paths, shown), _cost(fitting, grid, num_trials, full_trials)])
    return text, evaluation_warning(fitting, min(num_trials, full_trials or num_trials), least)


def evaluation_warning_of(
    space: Space,
    base: Mapping[str, Any],
    feasibility: Feasibility,
    num_trials: int,
    full_trials: float | None,
    facts: Facts,
    least: int = MIN_REPORTS,
) -> str | None:
    """Return the warning of `describe_forecast`, from the two ends of the space alone: planning takes seconds."""
    ends = [_completed(space, {}, end) for end in (0, -1)]
    points = [_point(space, base, feasibility, params, facts) for params in ends] if feasibility.predicts else []
    return evaluation_warning([point for point in points if point.fit.fits], min(num_trials, full_trials or num_trials), least)


def card_line(feasibility: Feasibility) -> str:
    """Return the line that names the card or cards of the prediction, and what their speed rests on."""
    return f"card       {describe_cards(feasibility)}"


def describe_cards(feasibility: Feasibility) -> str:
    """Return the card or cards of the prediction, and what their speed rests on."""
    card = feasibility.card
    if len(feasibility.cards) > 1:
        names = ", ".join(f"{each.name} ({each.memory_gib:.1f} GiB)" for each in feasibility.cards)
        bases = {each.name: speed_basis(each) for each in feasibility.cards}
        alike = len(set(bases.values())) == 1
        speeds = next(iter(bases.values())) if alike else ", ".join(f"{name} {basis}" for name, basis in bases.items())
        return f"{names}; for each trial the smallest that it fits; speeds {speeds}"
    return f"{card.name}, {card.memory_gib:.1f} GiB; speed {speed_basis(card)}"


def _estimate(shape: ModelShape) -> list[str]:
    """Return a line that says which layers are estimated, if some are."""
    mixers = [one.mixer for one in shape.each if one.mixer is not None]
    if not mixers:
        return []
    how = "flash-linear-attention" if mixers[0].has_kernels else "torch operations (no flash-linear-attention here)"
    how += ", without CUDA graphs" if shape.has_unrecordable_mixers else ""
    layers = f"{len(mixers)} of {counted(shape.num_layers, 'layer')}"
    return [f"estimate   linear attention, {layers}: its memory is estimated from above and its speed roughly, on {how}"]


def _matmul_gain(space: Space, base: Mapping[str, Any], feasibility: Feasibility, fitting: list[Point]) -> list[str]:
    """Return a line that compares `train.matmul` with bf16, if it is set to another value and the space does not vary it."""
    mode = Matmul.of(base["train"].get("matmul", "auto"))
    if mode is Matmul.BF16 or not fitting or any(dimension.path == "train.matmul" for dimension in space.dimensions):
        return []
    plain = _point(space, {**base, "train": {**base["train"], "matmul": "bf16"}}, feasibility, fitting[0].params)
    if not plain.fit.fits:
        return []
    gain = fitting[0].tokens_per_second / plain.tokens_per_second
    return [f"matmul     {mode}: {gain:.2f} times the {plain.tokens_per_second:,.0f} tok/s of bf16 at the first point that fits"]


def no_forecast_line(device: str) -> str:
    """Return the line that says why nothing is predicted. device: train.device."""
    if device == "cpu":
        return "forecast   none: nothing is predicted for train.device=cpu"
    return f"forecast   none: no GPU here; set cluster.card=<name> to predict memory and speed: {', '.join(CARDS)}"


def check_any_fits(space: Space, base: Mapping[str, Any], feasibility: Feasibility) -> None:
    """Raise InputError if even the least demanding point of the space does not fit the card."""
    if not feasibility.predicts:
        return

    def check(params: Params) -> Fit:
        return feasibility.check_fit(space.apply(base, params))

    params, fit = _least_demanding(space, check)
    if not fit.fits:
        card = feasibility.card
        allowed = f"must hold a point that fits {card.name} ({card.memory_gib:.1f} GiB); even its least demanding one"
        raise InputError("space", params_text(params), f"{allowed} {fit.reason}")


def most_demanding(space: Space, base: Mapping[str, Any], feasibility: Feasibility) -> Params:
    """Return the point that needs most memory where each is computed as leanly as can be.

    A point that does not fit is never started, so it counts only if none fits. Where nothing is
    predicted, this is the point of the highest values.
    """
    size, highest = space.size(), _completed(space, {}, -1)
    if not feasibility.predicts or not space.dimensions:
        return highest
    points = list(space.points()) if size is not None and size <= MAX_POINTS else corners(space)
    fitting = [point for point in points if feasibility.check_fit(space.apply(base, point)).fits]
    lean = {**base, "train": {**base["train"], **LEANEST}}

    def need(point: Params) -> tuple[float, int, int]:
        config = space.apply(lean, point)
        return feasibility.check_fit(config).predicted_peak_gib or 0.0, config.data.max_seq_length, config.lora.rank

    return max(reversed(fitting or points), key=need, default=highest)


def corners(space: Space) -> list[Params]:
    """Return at most 24 points at the ends of the dimensions.

    These are all low, all high, and the points that differ from one of the two in one dimension.
    """
    low, high = _completed(space, {}, 0), _completed(space, {}, -1)
    points = [low]
    for dimension in _telling(space):
        if dimension.path in low:
            points += [_completed(space, {**low, dimension.path: value}, 0) for value in dimension.corners()]
    for dimension in _telling(space):
        if dimension.path in high:
            points.append(_completed(space, {**high, dimension.path: _ends(dimension)[0]}, -1))
    distinct = {repr(point): point for point in points if point != high}
    return [*list(distinct.values())[: MAX_POINTS - 1], high]


def _least_demanding(space: Space, check: Callable[[Params], Fit]) -> tuple[Params, Fit]:
    """Return the first point found that fits, else the one that exceeds the card by the least.

    In a larger space, one dimension after another takes its least demanding end. That is good
    enough, because the need of one dimension hardly depends on the others.
    """
    size = space.size()
    if size is not None and size <= MAX_POINTS:
        return _least((params, check(params)) for params in space.points())
    best = _completed(space, {}, 0), check(_completed(space, {}, 0))
    for dimension in space.dimensions:
        if dimension.path in best[0] and not best[1].fits:
            tried = [_completed(space, {**best[0], dimension.path: value}, 0) for value in dimension.corners()]
            best = _least((params, check(params)) for params in tried)
    return best


def _least(judged: Iterator[tuple[Params, Fit]]) -> tuple[Params, Fit]:
    least: tuple[Params, Fit] | None = None
    for params, fit in judged:
        if fit.fits:
            return params, fit
        if least is None or fit.excess_gib < least[1].excess_gib:
            least = params, fit
    return least


def _telling(space: Space) -> list[Dimension]:
    """Return the dimensions that a prediction may depend on."""
    return [dimension for dimension in space.dimensions if not has_no_effect(dimension.path)]


def _completed(space: Space, chosen: Params, end: int) -> Params:
    """Return the point with the chosen values, and the low (0) or high (-1) end for the others."""
    params: Params = {}
    for dimension in space.dimensions:
        if is_active(dimension, params):
            params[dimension.path] = chosen.get(dimension.path, _ends(dimension)[end])
    return params


def _ends(dimension: Dimension) -> tuple[Any, Any]:
    """Return the lowest and highest value. Choices that are not numbers give the first and last."""
    values = dimension.corners()
    if isinstance(dimension, Choice) and all(isinstance(value, int | float) for value in values):
        return min(values), max(values)
    return values[0], values[-1]


def _point(
    space: Space, base: Mapping[str, Any], feasibility: Feasibility, params: Params, facts: Facts | None = None
) -> Point:
    config: TrainConfig = space.apply(base, params)
    return Point(params, config, feasibility.check_fit(config), EvaluationWork.of(config, facts))


def _distinct(points: list[Point]) -> list[Point]:
    """Drop points predicted like an earlier one: a learning rate, say, needs no memory."""
    distinct: dict[tuple[str, ...], Point] = {}
    for point in points:
        distinct.setdefault(point.cells(), point)
    return list(distinct.values())


def _table(paths: list[str], points: list[Point]) -> list[str]:
    header = [*map(short_name, paths), "peak GiB", "tok/s", "hours", "plan"]
    rows = []
    for point in points:
        plan, *numbers = point.cells()
        rows.append([*(value_text(point.params.get(path, "-")) for path in paths), *numbers, plan])
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header) - 1)]
    return ["  " + "".join(f"{cell:>{width}}  " for cell, width in zip(line, widths)) + line[-1] for line in lines]


def _cost(fitting: list[Point], grid: Sequence[int], num_trials: int, full_trials: float | None) -> str:
    """Return the line on the sweep's hours. A budget of tokens holds more evaluations if it pays for many short trials."""
    if not fitting:
        return "cost       none of these points fits the card"
    training, evaluation = mean(one.training_hours for one in fitting), mean(one.evaluation_hours for one in fitting)
    left_out = "" if evaluation else "; evaluation left out"
    mean_of = f"{hours_text(training + evaluation)} hours, the mean of the lines that fit{left_out}"
    if full_trials is None or full_trials >= num_trials:
        what = f"{counted(num_trials, 'trial')} of {mean_of}"
        hours = _hours(num_trials * training, num_trials * evaluation)
        return f"cost       {hours}{',' * bool(evaluation)} if no trial is pruned: {what}"
    most = most_reports(grid, num_trials, full_trials)
    evaluated = evaluation * most / len(grid)
    what = f"the tokens of {counted(full_trials, 'full trial')} of {mean_of}"
    more = f", and at most {counted(int(most), 'report')}" if evaluation and most > full_trials * len(grid) else ""
    return f"cost       at most {_hours(full_trials * training, evaluated)}: {what}{more}"


def _hours(training: float, evaluation: float) -> str:
    """Return the GPU hours of both, and which share is evaluation."""
    total = training + evaluation
    share = f", {evaluation / total:.0%} of them evaluation" if evaluation else ""
    return f"{hours_text(total)} GPU hours{share}"
