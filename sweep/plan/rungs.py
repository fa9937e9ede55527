"""Check that every trial takes at least one optimizer step to each rung.

A step reads rows of up to max_seq_length tokens. Where rungs are closer than a step is long, one
step passes two of them, and the second would judge the same adapter as the first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from engine.config.preference_section import IN_A_PAIR, PREFERENCE
from engine.config.trial import LoopConfig, bins_in_step
from engine.errors import InputError
from sweep.config.sweep import SweepConfig
from sweep.space.space import MAX_WALKED_POINTS, Choice, Dimension, Space

STEP_FIELDS = ("data.max_seq_length", "train.tokens_per_step", "train.gradient_accumulation_steps", "train.micro_batch_size")


def check_rungs(config: SweepConfig, space: Space) -> str | None:
    """Raise InputError if a trial's full step is longer than the way from one rung to the next.

    Without packing, only a step of the longest samples is that long. Then the result is a warning,
    and such a trial takes one step to each rung. A sweep of one point moves its own rungs apart.
    """
    loop = config.train
    if config.sweep.only_most_demanding:
        return None
    longest, params = longest_step(config.base().model_dump(mode="json"), space)
    way = least_way(loop)
    if longest <= way:
        return None
    at = f" ({', '.join(f'{path}={value}' for path, value in params.items())})" if params else ""
    what = f"a step takes up to {longest:,} tokens{at}"
    if not is_packed(config, space):
        return f"{what}, and rungs are as little as {way:,} apart; a trial takes at least one step to each rung"
    smaller = "a smaller step (train.tokens_per_step, data.max_seq_length)"
    if longest > loop.max_tokens:
        allowed = f"must be at least one step, and {what}; raise it, or take {smaller}"
        raise InputError("train.max_tokens", loop.max_tokens, allowed)
    most = f"at most {loop.max_tokens // longest} with these max_tokens" if loop.report_at_tokens is None else "further apart"
    field = "num_reports" if loop.report_at_tokens is None else "report_at_tokens"
    allowed = f"must be {most}: {what}, and rungs are as little as {way:,} apart; or take {smaller}"
    raise InputError(f"train.{field}", getattr(loop, field), allowed)


def least_way(loop: LoopConfig) -> int:
    """Return the fewest tokens from one rung to the next; max_tokens if there is only one rung."""
    return min((after - before for before, after in itertools.pairwise(loop.report_grid())), default=loop.max_tokens)


def is_packed(config: SweepConfig, space: Space) -> bool:
    """Return whether some trial packs samples, so that its steps are as long as they can be."""
    varied = next((dimension for dimension in space.dimensions if dimension.path == "data.packing"), None)
    return config.data.packing or (isinstance(varied, Choice) and True in varied.values.values())


def longest_step(base: Mapping[str, Any], space: Space) -> tuple[int, dict[str, Any]]:
    """Return the most tokens of one step at any point of the space, and the values that give it."""
    best, found = 0, {}
    for params, values in _points(base, space):
        length, *others = (values[path] for path in STEP_FIELDS)
        length *= IN_A_PAIR if base["data"]["format"] == PREFERENCE else 1
        tokens = length * bins_in_step(length, *others)
        if tokens > best:
            best, found = tokens, {path: value for path, value in params.items() if path in STEP_FIELDS}
    return best, found


def _points(base: Mapping[str, Any], space: Space) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield params, and the values of the fields that decide a step's length, base values included.

    A space too large to walk gives its corners, whatever their conditions.
    """
    fixed = {path: base[path.split(".")[0]][path.split(".")[1]] for path in STEP_FIELDS}
    dimensions = {dimension.path: dimension for dimension in space.dimensions}
    part = Space(tuple(d for d in space.dimensions if d.path in _needed(dimensions)))
    if (part.size() or MAX_WALKED_POINTS + 1) <= MAX_WALKED_POINTS:
        points: Iterator[dict[str, Any]] = part.points()
    else:
        corners = [[(d.path, value) for value in d.corners()] for d in part.dimensions]
        points = map(dict, itertools.product(*corners))
    for params in points:
        chosen = {path: dimensions[path].value(name) for path, name in params.items() if path in STEP_FIELDS}
        yield params, {**fixed, **chosen}


def _needed(dimensions: Mapping[str, Dimension]) -> set[str]:
    """Return the paths of the step's dimensions, and of those that their conditions refer to."""
    needed = {path for path in STEP_FIELDS if path in dimensions}
    waiting = list(needed)
    while waiting:
        parents = set(dimensions[waiting.pop()].when) - needed
        needed |= parents
        waiting += parents
    return needed
