"""Turn a trial's params into numbers whose differences say how differently two trials learn.

The first number is the logarithm of the learning rate, less that of the rate which is known to be
good for the adapter's scaling (`RatePrior.of`). Two trials with different rates, ranks and alphas
but the same first number train with the same force. Numbers that act by factors enter by their
logarithm, and names enter as codes, of which only equality counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.config.optim_section import OptimConfig
from engine.config.parsing import parse
from engine.config.trial import LoraConfig
from sweep.prior.rate_prior import KAPPA, RatePrior, log_force, log_lion
from sweep.space.space import Choice, Dimension, Range, Space, value_at

RATE = "optim.learning_rate"
FORCE = ("lora.rank", "lora.lora_alpha", "lora.use_rslora", "optim.loraplus_lr_ratio", "optim.name")
"""Fields on which the good rate depends."""
OCTAVES = 2.0  # of a number that acts by factors, for a distance of 1
LOG_SPAN, LINEAR_SPAN = 3.0, 1.5  # most distance between two values of one axis
LOG_FACTOR = 3.9  # numbers whose largest is so many times the smallest act by factors


class TrialEncoder:
    """Encode the params of one space as rows of numbers."""

    def __init__(self, space: Space, base: Mapping[str, Any], rate_prior: RatePrior | None = None) -> None:
        """base: the base config as plain data. rate_prior: None if nothing is known of good rates."""
        self._space, self._base, self._prior = space, base, rate_prior
        paths = {dimension.path for dimension in space.dimensions}
        self._force_paths = tuple(path for path in FORCE if path in paths)
        self._varies_rate = RATE in paths or bool(self._force_paths)
        self._axes = [_axis(dimension, base) for dimension in space.dimensions if dimension.path != RATE]
        self._good_rates: dict[tuple[Any, ...], float] = {}
        self._middle = 0.0 if rate_prior is not None else self._middle_of_rates()
        self.is_name = np.array([False, *(axis.is_name for axis in self._axes)])

    @property
    def knows_rate(self) -> bool:
        """Return whether 0 in the first column stands for a rate that is known to be good."""
        return self._prior is not None and self._varies_rate

    def encode(self, trials: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Return a row of numbers for each trial's params: float64 [N, 1 + number of axes]."""
        rows = np.empty((len(trials), len(self.is_name)))
        rows[:, 0] = [self._log_excess_rate(params) for params in trials]
        for axis, column in enumerate(self._axes, 1):
            rows[:, axis] = [column.code(params) for params in trials]
        return rows

    def _log_excess_rate(self, params: Mapping[str, Any]) -> float:
        """Return ln(learning rate / good rate); without a prior, good is the middle of the range."""
        if not self._varies_rate:
            return 0.0
        rate = params.get(RATE, self._base["optim"]["learning_rate"])
        key = tuple([params.get(path) for path in self._force_paths])
        good = self._good_rates.get(key)
        if good is None:
            good = self._good_rates[key] = self._log_good_rate(params)
        return math.log(max(rate, 1e-30)) - good - self._middle

    def _log_good_rate(self, params: Mapping[str, Any]) -> float:
        config = self._space.apply(self._base, params)
        if self._prior is not None:
            return self._prior.of(config.lora, config.optim)[0]
        return -KAPPA * log_force(config.lora, config.optim) - log_lion(config.optim)

    def _middle_of_rates(self) -> float:
        """Return the middle of ln(rate), plus that of the scalings of the base's adapter."""
        rates = next((dimension for dimension in self._space.dimensions if dimension.path == RATE), None)
        ends = [self._base["optim"]["learning_rate"]] if rates is None else [rates.value(end) for end in rates.corners()]
        logs = [math.log(max(float(end), 1e-30)) for end in ends]
        return (min(logs) + max(logs)) / 2.0 + _log_base_force(self._base)


def _log_base_force(base: Mapping[str, Any]) -> float:
    """Return what the base config's adapter and optimizer take off ln(good rate)."""
    lora, optim = parse(LoraConfig, dict(base["lora"])), parse(OptimConfig, dict(base["optim"]))
    return KAPPA * log_force(lora, optim) + log_lion(optim)


class _Numbers:
    """Encode a numeric axis; a trial without it has the base's value."""

    is_name = False

    def __init__(self, dimension: Dimension, ends: Sequence[float], is_log: bool, default: Any) -> None:
        self._path, self._is_log = dimension.path, is_log
        self._low, high = float(min(ends)), float(max(ends))
        if is_log:
            self._scale = min(1.0 / OCTAVES, LOG_SPAN / max(math.log2(high / self._low), 1e-9))
        else:
            self._scale = LINEAR_SPAN / max(high - self._low, 1e-12)
        is_number = isinstance(default, int | float) and not isinstance(default, bool) and (default > 0 or not is_log)
        self._default = self._code(float(default) if is_number else math.sqrt(self._low * high) if is_log else high / 2)
        choices = dimension.values.items() if isinstance(dimension, Choice) else ()
        self._codes = {name: self._code(float(value)) for name, value in choices}

    def code(self, params: Mapping[str, Any]) -> float:
        name = params.get(self._path)
        if name is None:
            return self._default
        return self._codes[name] if self._codes else self._code(float(name))

    def _code(self, value: float) -> float:
        return (math.log2(max(value, 1e-30) / self._low) if self._is_log else value - self._low) * self._scale


class _Names:
    """Encode an axis of names by their position; a trial without it has the code -1."""

    is_name = True

    def __init__(self, dimension: Choice) -> None:
        self._path = dimension.path
        self._codes = {name: float(code) for code, name in enumerate(dimension.values)}

    def code(self, params: Mapping[str, Any]) -> float:
        return self._codes.get(params.get(self._path), -1.0) if self._path in params else -1.0


def _axis(dimension: Dimension, base: Mapping[str, Any]) -> _Numbers | _Names:
    default = value_at(base, dimension.path)
    if isinstance(dimension, Range):
        is_log = dimension.log and dimension.low > 0
        return _Numbers(dimension, (dimension.low, dimension.high), is_log, default)
    values = list(dimension.values.values())
    if len(values) < 2 or not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return _Names(dimension)
    is_log = min(values) > 0 and max(values) / min(values) >= LOG_FACTOR
    return _Numbers(dimension, values, is_log, default)
