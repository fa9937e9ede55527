"""Count the bytes that are alive during a computation, by component, and their peak. No torch.

`HostStack` does to them what `HostStash` (engine/layers/host_stash.py) does to tensors.
"""

from __future__ import annotations

from bisect import bisect
from collections import defaultdict
from dataclasses import dataclass, field

from engine.shape.compute_limits import HOST_IN_FLIGHT, HOST_LAG

KEPT, TRANSIENT, WEIGHTS, ATTENTION, BOUNDARY, LOW = (
    "kept activations", "transients", "dequantised weights", "attention workspace", "layer boundaries", "low-rank hidden",
)  # fmt: skip
# Of torch's allocator: tensors up to SMALL have pages of their own, and sizes are multiples of PIECE.
PIECE, SMALL, SMALL_PAGE, LARGE_PAGE = 512, 2**20, 2 * 2**20, 20 * 2**20


@dataclass
class LiveBytes:
    """The tensors that are alive, their sum by component, and the peaks.

    `peaks` holds the highest sum of each phase. `highest`, `highest_phase` and `highest_components`
    describe the highest of all.
    """

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
        """Make a tensor; free one of the same name only after that."""
        self._add(component, size)
        before = self.alive.pop(name, None)
        if before is not None:
            self._free(*before)
        self.alive[name] = (component, size)

    def drop(self, *names: str) -> None:
        """Free tensors; ignore names that are not alive."""
        for name in names:
            tensor = self.alive.pop(name, None)
            if tensor is not None:
                self._free(*tensor)

    def rename(self, old: str, new: str) -> None:
        """Free the tensor `new`, and give its name to `old`."""
        self.drop(new)
        if old in self.alive:
            self.alive[new] = self.alive.pop(old)

    def holding(self, size: int, component: str = TRANSIENT) -> _Holding:
        """Keep an unnamed tensor alive for the length of a `with` block."""
        return _Holding(self, component, size)

    def briefly(self, size: int, component: str = TRANSIENT) -> None:
        """Make an unnamed tensor and free it at once."""
        self._add(component, size)
        self._free(component, size)

    def rise(self, size: int, by_component: dict[str, int]) -> None:
        """Note a sum that is `size` higher for a moment."""
        top = self.total + size
        if top > self.peaks.get(self.phase, -1):
            self.peaks[self.phase] = top
            if top > self.highest:
                self.highest, self.highest_phase = top, self.phase
                added = {name: self.components[name] + more for name, more in by_component.items()}
                self.highest_components = {**self.components, **added}

    def change(self, by_component: dict[str, int]) -> None:
        """Change the sums, without a note."""
        for component, more in by_component.items():
            self.components[component] += more
            self.total += more

    def _free(self, component: str, size: int) -> None:
        self.components[component] -= size
        self.total -= size

    def _add(self, component: str, size: int) -> None:
        self.components[component] += size
        self.total = total = self.total + size
        if total > self.peaks.get(self.phase, -1):
            self._note()

    def _note(self) -> None:
        if self.total > self.peaks.get(self.phase, -1):
            self.peaks[self.phase] = self.total
            if self.total > self.highest:
                self.highest, self.highest_phase = self.total, self.phase
                self.highest_components = dict(self.components)


class _Holding:
    """Keep a tensor alive in a `with` block; a class, because a plan enters thousands and generators are slow."""

    __slots__ = ("component", "live", "size")

    def __init__(self, live: LiveBytes, component: str, size: int) -> None:
        self.live, self.component, self.size = live, component, size

    def __enter__(self) -> None:
        self.live._add(self.component, self.size)

    def __exit__(self, *error: object) -> None:
        self.live._free(self.component, self.size)


class PlacedBytes(LiveBytes):
    """LiveBytes that also places tensors as torch's allocator does in a pool, from `place` on.

    The pool is one range that grows (PyTorch, c10/cuda/CUDACachingAllocator, segments that expand). A
    tensor takes the smallest free piece that holds it, and neighbours that are free join. Small tensors
    have a range of their own.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ranges: tuple[_Range, _Range] | None = None
        self._places: dict[str, _Place] = {}
        self._held = 0
        self.placed_peak = 0

    @property
    def mapped(self) -> int:
        """Return the bytes that the pool has taken from the device: its tensors at their peak, and the pieces between them."""
        return sum(one.end for one in self._ranges or ())

    def place(self) -> None:
        self._ranges = _Range(SMALL_PAGE), _Range(LARGE_PAGE)

    def hold(self, name: str, size: int, component: str = TRANSIENT) -> None:
        new = self._taken(size)
        super().hold(name, size, component)
        self._given(self._places.pop(name, None))
        if new is not None:
            self._places[name] = new

    def drop(self, *names: str) -> None:
        super().drop(*names)
        for name in names:
            self._given(self._places.pop(name, None))

    def rename(self, old: str, new: str) -> None:
        super().rename(old, new)
        if old in self._places:
            self._places[new] = self._places.pop(old)

    def holding(self, size: int, component: str = TRANSIENT) -> _Holding:
        return _PlacedHolding(self, component, size)

    def briefly(self, size: int, component: str = TRANSIENT) -> None:
        with self.holding(size, component):
            pass

    def _taken(self, size: int) -> _Place | None:
        if self._ranges is None or not size:
            return None
        size = -(-size // PIECE) * PIECE
        self._held += size
        self.placed_peak = max(self.placed_peak, self._held)
        one = self._ranges[size > SMALL]
        return one, one.take(size), size

    def _given(self, place: _Place | None) -> None:
        if place is not None:
            one, start, size = place
            self._held -= size
            one.give(start, size)


class _PlacedHolding(_Holding):
    __slots__ = ("place",)

    def __enter__(self) -> None:
        self.place = self.live._taken(self.size)
        super().__enter__()

    def __exit__(self, *error: object) -> None:
        self.live._given(self.place)
        super().__exit__(*error)


class _Range:
    """A range of addresses that grows by whole pages. Its free pieces are [start, size], by their starts."""

    def __init__(self, page: int) -> None:
        self._page, self._free = page, []
        self.end = 0

    def take(self, size: int) -> int:
        """Return where `size` bytes begin now."""
        fitting = [(piece[1], i) for i, piece in enumerate(self._free) if piece[1] >= size]
        i = min(fitting)[1] if fitting else self._grown(size)
        start, free = self._free[i]
        if free == size:
            del self._free[i]
        else:
            self._free[i] = [start + size, free - size]
        return start

    def give(self, start: int, size: int) -> None:
        i = bisect(self._free, [start, 0])
        if i < len(self._free) and self._free[i][0] == start + size:
            size += self._free.pop(i)[1]
        if i and sum(self._free[i - 1]) == start:
            self._free[i - 1][1] += size
        else:
            self._free.insert(i, [start, size])

    def _grown(self, size: int) -> int:
        if not (self._free and sum(self._free[-1]) == self.end):
            self._free.append([self.end, 0])
        more = -(-(size - self._free[-1][1]) // self._page) * self._page
        self._free[-1][1] += more
        self.end += more
        return len(self._free) - 1


_Place = tuple[_Range, int, int]


@dataclass
class _Held:
    names: list[str]
    sizes: dict[str, tuple[str, int]] = field(default_factory=dict)
    age: int = 0
    is_here: bool = True


@dataclass
class HostStack:
    """The tensors that layers store on the host, as a stack.

    `num_bytes` are on the host now; `highest` is the most so far.
    """

    live: LiveBytes
    entries: list[_Held] = field(default_factory=list)
    num_bytes: int = 0
    highest: int = 0

    def push(self, names: list[str]) -> None:
        entry = _Held(names, {name: self.live.alive[name] for name in names})
        self.entries.append(entry)
        self.num_bytes += _bytes(entry)
        self.highest = max(self.highest, self.num_bytes)

    def advance(self) -> None:
        """Note that a layer has run, and release device memory as `HostStash.advance` does."""
        leaving = [entry for entry in self.entries if entry.is_here]
        in_flight = sum(map(_bytes, leaving))
        for entry in leaving:
            entry.age += 1
            if entry.age >= HOST_LAG or in_flight > HOST_IN_FLIGHT:
                self._let_go(entry)
                in_flight -= _bytes(entry)

    def flush(self) -> None:
        """Release the device memory of all entries: the forward pass is over."""
        for entry in self.entries:
            if entry.is_here:
                self._let_go(entry)

    def pop(self) -> None:
        """Bring back the last entry, and start to fetch the one before it."""
        entry = self.entries.pop()
        self._fetch(entry)
        self.num_bytes -= _bytes(entry)
        if self.entries:
            self._fetch(self.entries[-1])

    def _let_go(self, entry: _Held) -> None:
        self.live.drop(*entry.names)
        entry.is_here = False

    def _fetch(self, entry: _Held) -> None:
        if not entry.is_here:
            entry.is_here = True
            for name, (component, size) in entry.sizes.items():
                self.live.hold(name, size, component)


def _bytes(entry: _Held) -> int:
    return sum(size for _, size in entry.sizes.values())
