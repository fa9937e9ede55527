"""Keep in the journal what a sweep begins with, so that every resume begins with the same.

The first points and the rate's prior are computed once. A later version of the program, or one that
finds another shape of the model, leaves them as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from sweep.prior.rate_prior import RatePrior
from sweep.prior.whole_points import Params

FIRST_POINTS, RATE_PRIOR = "first_points", "rate_prior"  # the study's attributes


class Attributes(Protocol):
    """Declare what is used of an Optuna study."""

    @property
    def user_attrs(self) -> dict[str, Any]: ...
    def set_user_attr(self, key: str, value: Any) -> None: ...
    def get_trials(self, deepcopy: bool = True) -> list[Any]: ...


class KeptBeginning:
    """Hold the first points of a study and what is known of its learning rate."""

    def __init__(self, study: Attributes) -> None:
        """Read what the journal has; a sweep of an older version may have nothing."""
        self._study, known = study, study.user_attrs
        self._points: list[Params] = known.get(FIRST_POINTS, [])
        self._next = 0
        values = known.get(RATE_PRIOR)
        self.rate: RatePrior | None = None if values is None else RatePrior.from_dict(values)

    def keep(self, points: Sequence[Params], rate: RatePrior | None) -> None:
        """Keep these, unless the study has begun: then it has its own, or none from an older version."""
        if FIRST_POINTS in self._study.user_attrs or self._study.get_trials(deepcopy=False):
            return
        if rate is not None:  # first: a kill in between leaves a beginning that is not kept yet
            self._study.set_user_attr(RATE_PRIOR, rate.to_dict())
        self._study.set_user_attr(FIRST_POINTS, list(points))
        self._points, self.rate = list(points), rate

    def replace_points(self, points: Sequence[Params]) -> None:
        """Keep these points in the place of all before, for a study whose points are chosen on the way."""
        self._study.set_user_attr(FIRST_POINTS, list(points))
        self._points, self._next = list(points), 0

    def known_line(self, is_new: Callable[[Params], bool]) -> str | None:
        """Say how many points were trained before, by an earlier sweep, and so are not tried; None if all are new."""
        num_known = sum(not is_new(point) for point in self._points)
        if not num_known:
            return None
        are = "is" if num_known == 1 else "are"
        return f"first trials: {num_known} of {len(self._points)} {are} known from an earlier sweep, and not trained again"

    def next_point(self, is_new: Callable[[Params], bool]) -> Params | None:
        """Return the first point that is new, None if all are tried. A known point stays known."""
        while self._next < len(self._points) and not is_new(self._points[self._next]):
            self._next += 1
        return self._points[self._next] if self._next < len(self._points) else None
