"""Choose the points that a new sweep tries first: the user's own, and those of the prior.

The prior's points are all-linear, because adapters on all layers learn best; of the middle rank; and
of alpha 32 where alpha is searched ("LoRA without regret"). Their rates are the centre of what is
known, and one standard deviation above and below it. A last point has the largest rank, with the
rate for that rank. All other fields have the base config's value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.config.lora_section import ALL_LINEAR
from engine.config.preference_section import PREFERENCE
from engine.shape.model_shape import ModelShape
from engine.units import counted
from sweep.config.sweep import SweepConfig
from sweep.prior.own_points import read_own_points
from sweep.prior.rate_prior import LION_FACTOR, RULE_ALPHA, RatePrior, rate_prior
from sweep.prior.whole_points import Params, completed
from sweep.space.coordinates import OUTSIDE, coordinate, nearest, numbers
from sweep.space.space import Choice, Dimension, Space
from sweep.text import params_text

PRIOR_SAMPLERS = ("freeze_thaw",)
"""Samplers for which `sweep.prior=auto` means true."""
MAX_SHOWN = 12  # points in the plan
RATE, RANK = "optim.learning_rate", "lora.rank"


@dataclass(frozen=True)
class Beginning:
    """Hold what a new sweep begins with.

    own: the points of sweep.first_trials, completed. known: those of the prior, empty if it is off.
    rate: what is known of the learning rate; None if the prior is off or the hidden size is not
    known. notes: one line each on the prior.
    """

    own: tuple[Params, ...] = ()
    known: tuple[Params, ...] = ()
    rate: RatePrior | None = None
    notes: tuple[str, ...] = ()

    def points(self, earlier: Sequence[Params] = ()) -> list[Params]:
        """Return all points in order, with the best ones of earlier sweeps before the prior's."""
        return [*self.own, *earlier, *self.known]

    def describe(self) -> list[str]:
        """Return the lines of the plan: where the prior's rate comes from, and each point."""
        lines = [f"prior      {note}" for note in self.notes]
        parts = [f"{len(self.own)} of sweep.first_trials"] if self.own else []
        parts += [f"{len(self.known)} of the prior"] if self.known else []
        if parts:
            lines.append(f"first      {counted(len(self.points()), 'trial')}: {', '.join(parts)}")
        points = self.points()
        lines += [f"  {params_text(point)}" for point in points[:MAX_SHOWN]]
        return lines + ([f"  and {len(points) - MAX_SHOWN} more"] if len(points) > MAX_SHOWN else [])


def make_beginning(config: SweepConfig, space: Space, shape: ModelShape | None) -> Beginning:
    """Return what a sweep of this config begins with. It depends on nothing else.

    shape: None if it is not known. Raises InputError for a point of sweep.first_trials that is none
    of the space.
    """
    base = config.base().model_dump(mode="json")
    given = read_own_points(config.sweep.first_trials, space, base)
    if not has_prior(config):
        return Beginning(tuple(completed(space, base, point) for point in given))
    rate = rate_prior(shape, config.data.format == PREFERENCE)
    own = tuple(_whole(space, base, point, rate) for point in given)
    known, notes = _known_points(space, base, rate)
    return Beginning(own, tuple(point for point in known if point not in own), rate, notes)


def has_prior(config: SweepConfig) -> bool:
    """Return whether the prior is on: a grid has none, since it tries every point anyway."""
    asked = config.sweep.prior
    return config.sampler.name != "grid" and (config.sampler.name in PRIOR_SAMPLERS if asked == "auto" else asked)


def _known_points(space: Space, base: Mapping[str, Any], rate: RatePrior | None) -> tuple[tuple[Params, ...], tuple[str, ...]]:
    """Return the prior's points, each once, and the notes on them."""
    if not space.dimensions:
        return (), ()
    by_path = {dimension.path: dimension for dimension in space.dimensions}
    wanted: list[Params] = [_whole(space, base, {}, rate)]
    if rate is not None and RATE in by_path:
        wanted += [_whole(space, base, {}, rate, sign) for sign in (1.0, -1.0)]
    if RANK in by_path and (largest := _ranks(by_path[RANK])[-1:]):
        wanted.append(_whole(space, base, {RANK: coordinate(by_path[RANK], largest[0])}, rate))
    points = [point for place, point in enumerate(wanted) if point not in wanted[:place]]
    return tuple(points), _notes(space, base, by_path.get(RATE), rate, wanted[0])


def _notes(
    space: Space, base: Mapping[str, Any], dimension: Dimension | None, rate: RatePrior | None, first: Params
) -> tuple[str, ...]:
    """Return a line on where the prior's rate comes from, or why there is none."""
    if dimension is None:
        return (f"no learning rate: the space does not vary {RATE}",)
    if rate is None:
        return ("no learning rate: the model's hidden size is not known, so the base config's rate is tried",)
    config = space.apply(base, first)
    lora, optim = config.lora, config.optim
    mean, width = rate.of(lora, optim)
    line = f"learning rate {math.exp(mean):.2g}, give or take a factor of {math.exp(width):.2g}: {rate.source}"
    if abs(lora.scaling * lora.rank - RULE_ALPHA) > 1e-9:
        line += f", for rank {lora.rank} with alpha {lora.alpha:g}{' and rsLoRA' if lora.use_rslora else ''}"
    if optim.loraplus_lr_ratio != 1.0:
        line += f", for LoRA+ with ratio {optim.loraplus_lr_ratio:g}"
    if optim.is_lion:
        line += f", divided by {LION_FACTOR:.2g} for Lion"
    if not _reaches(dimension, math.exp(mean)):
        line += f"; it is outside the space ({dimension.describe()}), so the nearest rate there is tried"
    return (line,)


def _reaches(dimension: Dimension, rate: float) -> bool:
    values = list(numbers(dimension).values()) if isinstance(dimension, Choice) else dimension.corners()
    return bool(values) and min(values) <= rate <= max(values)


def _whole(space: Space, base: Mapping[str, Any], given: Params, rate: RatePrior | None, deviations: float = 0.0) -> Params:
    """Return the point with these params, completed by the prior.

    deviations: standard deviations of ln(rate) between its rate and the centre. If the space does
    not reach the centre, they count from the nearest rate that it has.
    """
    point = completed(space, base, given, _preferred)
    dimension = next((one for one in space.dimensions if one.path == RATE), None)
    if rate is None or RATE in given or RATE not in point:
        return point
    config = space.apply(base, point)
    mean, width = rate.of(config.lora, config.optim)
    centre = nearest(dimension, math.exp(mean))
    if centre is OUTSIDE:
        return point
    # two digits are all that is known, and the same on every machine
    found = nearest(dimension, float(f"{dimension.value(centre) * math.exp(deviations * width):.1e}"))
    return completed(space, base, {**given, RATE: found}, _preferred)


def _preferred(dimension: Dimension) -> Any:
    """Return the point of the dimension that the prior prefers, or OUTSIDE for none."""
    match dimension.path:
        case "lora.target_modules":
            return coordinate(dimension, ALL_LINEAR)
        case "lora.rank":
            ranks = _ranks(dimension)
            return coordinate(dimension, ranks[len(ranks) // 2]) if ranks else OUTSIDE
        case "lora.lora_alpha":
            return nearest(dimension, RULE_ALPHA)
        case "lora.use_rslora":
            return coordinate(dimension, False)
    return OUTSIDE


def _ranks(dimension: Dimension) -> list[float]:
    """Return the ranks of the space in ascending order: all choices, or both ends of a range and its middle."""
    if isinstance(dimension, Choice):
        return sorted(numbers(dimension).values())
    middle = math.sqrt(dimension.low * dimension.high) if dimension.log else (dimension.low + dimension.high) / 2
    return sorted({nearest(dimension, rank) for rank in (dimension.low, middle, dimension.high)})
