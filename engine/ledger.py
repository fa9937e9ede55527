"""Bytes that are alive, by what holds them, and their highest sum so far: for counting through a computation. No torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

KEPT, TRANSIENT, WEIGHTS, ATTENTION, BOUNDARY, LOW = (
    "kept activations", "transients", "dequantised weights", "attention workspace", "layer boundaries", "low-rank hidden",
)  # fmt: skip


@dataclass
class Ledger:
    """What is alive, by component; the highest sum of each phase, and phase and components at the highest of all."""

    alive: dict[str, tuple[str, int]] = field(default_factory=dict)
    components: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    total: int = 0
    phase: str = ""
    peaks: dict[str, int] = field(default_factory=dict)
    highest: int = -1
    highest_phase: str = ""
    highest_components: dict[str, int] = field(default_factory=dict)

    def enter(self, phase: str) -> None:
        self.phase = phase
        self._note()

    def hold(self, name: str, size: int, component: str = TRANSIENT) -> None:
        """A tensor is made. One of the same name is freed only after that."""
        self._add(component, size)
        self.drop(name)
        self.alive[name] = (component, size)

    def drop(self, *names: str) -> None:
        """Tensors are freed; a name that is not alive is let pass."""
        for name in names:
            component, size = self.alive.pop(name, ("", 0))
            self.components[component] -= size
            self.total -= size

    def rename(self, old: str, new: str) -> None:
        """The tensor called new is freed, and old is called so from now on."""
        self.drop(new)
        if old in self.alive:
            self.alive[new] = self.alive.pop(old)

    @contextmanager
    def holding(self, size: int, component: str = TRANSIENT) -> Iterator[None]:
        """A tensor lives as long as the block."""
        self._add(component, size)
        yield
        self.components[component] -= size
        self.total -= size

    def briefly(self, size: int, component: str = TRANSIENT) -> None:
        with self.holding(size, component):
            pass

    def _add(self, component: str, size: int) -> None:
        self.components[component] += size
        self.total += size
        self._note()

    def _note(self) -> None:
        if self.total > self.peaks.get(self.phase, -1):
            self.peaks[self.phase] = self.total
            if self.total > self.highest:
                self.highest, self.highest_phase = self.total, self.phase
                self.highest_components = dict(self.components)
