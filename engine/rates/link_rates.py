"""Measure the link between host and card, and the host's rate of launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.rates.timing import Timer

LINK_BYTES = 256 * 2**20
LAUNCHES = 1000


@dataclass(frozen=True)
class LinkRates:
    """GB/s of pinned copies to the card, from it, and of each when both run at once."""

    to_card: float
    to_host: float
    both: float

    @property
    def one_way(self) -> float:
        """Return the slower direction's speed: a layer's activations cross both ways."""
        return min(self.to_card, self.to_host)


def link_rates(timer: Timer, device: torch.device, num_bytes: int = LINK_BYTES) -> LinkRates:
    """Return the link's rates. `timer` must wait for the device (HostTimer)."""
    pinned = device.type == "cuda"
    hosts = [torch.empty(num_bytes, dtype=torch.int8, pin_memory=pinned) for _ in range(2)]
    cards = [torch.empty(num_bytes, dtype=torch.int8, device=device) for _ in range(2)]
    streams = [torch.cuda.Stream(device) for _ in range(2)] if pinned else [None, None]

    def both() -> None:
        _copy_on(streams[0], cards[0], hosts[0])
        _copy_on(streams[1], hosts[1], cards[1])

    to_card = timer(lambda: cards[0].copy_(hosts[0], non_blocking=True))
    to_host = timer(lambda: hosts[1].copy_(cards[1], non_blocking=True))
    return LinkRates(*(num_bytes / seconds / 1e9 for seconds in (to_card, to_host, timer(both))))


def launch_us(timer: Timer, launch: Callable[[], object], launches: int = LAUNCHES) -> float:
    """Return the microseconds that the host takes for one launch of a kernel that does next to nothing."""

    def many() -> None:
        for _ in range(launches):
            launch()

    return timer(many) / launches * 1e6


def _copy_on(stream: torch.cuda.Stream | None, target: Tensor, source: Tensor) -> None:
    if stream is None:
        target.copy_(source)
        return
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
