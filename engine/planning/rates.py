"""Define the speeds that predictions divide by: of one card in one host. No torch.

engine/planning/sheet_rates.py assumes them from a data sheet, and `python -m engine calibrate`
measures them (engine/rates/).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from engine.errors import InputError

INT8 = "int8"
LARGEST = 1e7  # of any rate; a number beyond it is a damaged file
# Assumed where nobody has measured products in INT8. The kernels over bf16's, in a layer of 8B (H100: 1,200
# to 1,350 TOPS next to 750 to 870, and 1.7 in whole steps); the data sheets of other cards say 2 (A100) to
# 4 (RTX 3090 and 4090).
INT8_GAIN = 1.6
# Time of making a weight's INT8 codes in units of dequantising it: forward, where it is rotated, and
# backward, where it is transposed (H100: 61 and 54 us of 14336 x 4096, and 57 us).
INT8_UNPACKING = (1.08, 0.95)
NF4_BYTES = 0.516  # a packed weight, scales included
CODE_BYTES, PLAIN_BYTES = 1.0 + NF4_BYTES, 2.0 + NF4_BYTES  # read and written to make its codes, and its 16 bits


@dataclass(frozen=True)
class Curve:
    """A rate that depends on a size: straight lines over log(size) between points, flat beyond them.

    `points` are (size, rate), sizes ascending.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def flat(cls, rate: float) -> Curve:
        return cls(((1.0, rate),))

    def times(self, factor: float) -> Curve:
        """Return the curve with every rate multiplied."""
        return Curve(tuple((size, factor * rate) for size, rate in self.points))

    def at(self, size: float) -> float:
        """Return the rate at a size above 0."""
        (low, low_rate), (high, high_rate) = self.points[0], self.points[-1]
        if size <= low or size >= high:
            return low_rate if size <= low else high_rate
        for (low, low_rate), (high, high_rate) in zip(self.points, self.points[1:]):
            if size <= high:
                share = math.log(size / low) / math.log(high / low)
                return low_rate + share * (high_rate - low_rate)
        raise AssertionError("sizes must ascend")


@dataclass(frozen=True)
class Int8Rates:
    """The measured speeds of products in INT8, over hidden size.

    `matmul_tops` of a layer's products with both scales. `forward_gb_s` and `backward_gb_s` of making
    the weights' codes for a pass from NF4, and `rows_gb_s` of making the other operand's.
    """

    matmul_tops: Curve
    forward_gb_s: Curve
    backward_gb_s: Curve
    rows_gb_s: Curve


@dataclass(frozen=True)
class Rates:
    """The speeds of one card in one host; each curve names its size.

    Over hidden size: `matmul_tflops` of a layer's matmuls, `head_tflops` of the head's;
    `norm_gb_s` of norms and other passes over activations, `adapter_gb_s` of an adapter's matmuls
    while bytes bind them, `activation_gb_s` of the gated activation with low-rank terms, `nf4_gb_s`
    of dequantisation, and `gaps`, the time of a step relative to the sum of its kernels.

    Over head dim: `attention_tflops` of flash attention on endless samples. A sample of L tokens
    reaches L / (L + `half_length`) of it, and the backward pass `attention_backward`.

    `thin_tflops` bounds adapters of high rank, `loss_gb_s` the loss over logits. `link_gb_s` is a
    pinned copy one way. `host_ms` and `unfused_host_ms` are Python and launches of one layer,
    forward and backward. `int8` is None where nobody has measured it: older files lack it.
    """

    matmul_tflops: Curve
    head_tflops: Curve
    norm_gb_s: Curve
    adapter_gb_s: Curve
    activation_gb_s: Curve
    nf4_gb_s: Curve
    gaps: Curve
    attention_tflops: Curve
    half_length: Curve
    attention_backward: Curve
    thin_tflops: float
    loss_gb_s: float
    link_gb_s: float
    host_ms: float
    unfused_host_ms: float
    int8: Int8Rates | None = None

    @property
    def of_int8(self) -> Int8Rates:
        """Return the speeds of products in INT8: measured, or assumed from those in 16 bits."""
        if self.int8 is not None:
            return self.int8
        forward, backward = (self.nf4_gb_s.times(CODE_BYTES / PLAIN_BYTES / factor) for factor in INT8_UNPACKING)
        return Int8Rates(self.matmul_tflops.times(INT8_GAIN), forward, backward, self.norm_gb_s)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: a number, or the points of a curve; `int8` only if it was measured."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != INT8}
        plain = {name: _plain(value) for name, value in values.items()}
        if self.int8 is not None:
            plain[INT8] = {field.name: _plain(getattr(self.int8, field.name)) for field in fields(Int8Rates)}
        return plain

    @classmethod
    def from_dict(cls, values: Any, where: str = "rates") -> Rates:
        """Read plain data. Raises InputError for a missing, unknown or impossible value."""
        names = [field.name for field in fields(cls) if field.name != INT8]
        _check_names(values, names, {INT8}, where)
        curves = {field.name for field in fields(cls) if field.type == "Curve"}
        given = {n: (_curve if n in curves else _rate)(values[n], f"{where}.{n}") for n in names}
        int8, of_int8 = values.get(INT8), [field.name for field in fields(Int8Rates)]
        if int8 is not None:
            _check_names(int8, of_int8, set(), f"{where}.{INT8}")
            given[INT8] = Int8Rates(**{name: _curve(int8[name], f"{where}.{INT8}.{name}") for name in of_int8})
        return cls(**given)


def _plain(value: float | Curve) -> float | list[list[float]]:
    return [list(point) for point in value.points] if isinstance(value, Curve) else value


def _check_names(values: Any, names: list[str], optional: set[str], where: str) -> None:
    if not isinstance(values, Mapping) or set(values) - optional != set(names):
        raise InputError(where, values, f"must hold exactly {', '.join(names)}")


def _curve(value: Any, where: str) -> Curve:
    is_list = isinstance(value, list) and value and all(isinstance(p, list) and len(p) == 2 for p in value)
    if not is_list:
        raise InputError(where, value, "must be a list of points [size, rate]")
    points = tuple((_rate(size, where), _rate(rate, where)) for size, rate in value)
    sizes = [size for size, _ in points]
    if sizes != sorted(set(sizes)):
        raise InputError(where, value, "must have its sizes in ascending order, each once")
    return Curve(points)


def _rate(value: Any, where: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0.0 < value <= LARGEST:  # NaN is neither
        raise InputError(where, value, f"must be a number above 0, and at most {LARGEST:g}")
    return float(value)


def curve_of(points: Iterable[tuple[float, float]]) -> Curve:
    """Return a curve through these points, given in any order."""
    return Curve(tuple(sorted((float(size), float(rate)) for size, rate in points)))
