"""Predict how long computation waits for copies to and from host memory. No torch.

The prediction follows `HostStash` (engine/layers/host_stash.py) through one forward and one
backward pass, with the time of each layer. There is one stream of copies, in order. Out, the
computation waits for a copy when its device memory is released. Back, a copy may begin when the
layer above begins.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.shape.compute_limits import HOST_IN_FLIGHT, HOST_LAG


@dataclass(frozen=True)
class LayerTimes:
    """The times of one layer in ms. `copy` is one way, and 0 if the host stores nothing."""

    forward: float
    backward: float
    copy: float


def waiting_ms(layers: list[LayerTimes], gb_s: float) -> float:
    """Return the ms that one forward and one backward pass wait.

    `gb_s` is the speed of the link to the host, one way.
    """
    return _out(layers, HOST_IN_FLIGHT / (gb_s * 1e6)) + _back(layers[::-1])


def _out(layers: list[LayerTimes], in_flight_ms: float) -> float:
    """Return the wait of the forward pass in ms.

    `in_flight_ms` is the copy time of the bytes that may wait in device memory.
    """
    now = waited = link_free = 0.0
    leaving: list[tuple[int, float]] = []  # layer, and the time when its copy ends
    for i, layer in enumerate(layers):
        now += layer.forward
        while leaving and (leaving[0][0] <= i - HOST_LAG or sum(layers[j].copy for j, _ in leaving) > in_flight_ms):
            waited, now = _wait(leaving.pop(0)[1], waited, now)
        if layer.copy:
            link_free = max(now, link_free) + layer.copy
            leaving.append((i, link_free))
    return _wait(link_free, waited, now)[0]


def _back(layers: list[LayerTimes]) -> float:
    """Return the wait of the backward pass in ms; `layers` go from the last to the first."""
    now = waited = link_free = 0.0
    places = [i for i, layer in enumerate(layers) if layer.copy]
    arrival: dict[int, float] = {}
    for i, layer in enumerate(layers):
        if layer.copy:
            if i not in arrival:
                arrival[i] = link_free = max(now, link_free) + layer.copy
            waited, now = _wait(arrival[i], waited, now)
            below = next((place for place in places if place > i), None)
            if below is not None:
                arrival[below] = link_free = max(now, link_free) + layers[below].copy
        now += layer.backward
    return waited


def _wait(until: float, waited: float, now: float) -> tuple[float, float]:
    return waited + max(0.0, until - now), max(now, until)
