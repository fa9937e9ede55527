"""How long computation waits for copies to and from host memory, from the time of each layer. No torch.

Goes through one forward and one backward pass as `engine.offload.HostStash` does: a single stream
of copies, in order; out, the computation waits for a copy when its device memory is let go; back, a
copy may begin when the layer above begins.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.planning.compute_limits import HOST_IN_FLIGHT, HOST_LAG


@dataclass(frozen=True)
class LayerTimes:
    """All in ms; copy: one way, 0 where nothing is put away."""

    forward: float
    backward: float
    copy: float


def waiting_ms(layers: list[LayerTimes], gb_s: float) -> float:
    """Of one forward and one backward pass; gb_s: of the link, one way."""
    return _out(layers, HOST_IN_FLIGHT / (gb_s * 1e6)) + _back(layers[::-1])


def _out(layers: list[LayerTimes], in_flight_ms: float) -> float:
    """in_flight_ms: of copies that memory may wait for."""
    now = waited = link_free = 0.0
    leaving: list[tuple[int, float]] = []  # layer, when its copy is done
    for i, layer in enumerate(layers):
        now += layer.forward
        while leaving and (leaving[0][0] <= i - HOST_LAG or sum(layers[j].copy for j, _ in leaving) > in_flight_ms):
            waited, now = _wait(leaving.pop(0)[1], waited, now)
        if layer.copy:
            link_free = max(now, link_free) + layer.copy
            leaving.append((i, link_free))
    return _wait(link_free, waited, now)[0]


def _back(layers: list[LayerTimes]) -> float:
    """layers: from the last to the first."""
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
