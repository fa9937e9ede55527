"""Keep recorded passes from trial to trial: they belong to the resident base model.

A CUDA graph holds addresses. What it reads or adds to therefore stays where it is: the base's
weights, the adapter's memory (engine/adapter/flat.py), the rows' tensors, INT8 scales, and the
dequantised weights and codes that the plan keeps. A trial whose adapter has the same shape moves
into the same memory and finds the recordings made. Values, learning rate, scaling, dropout rate and
seeds are read from there, so these may differ.

All recordings allocate from one pool, because only one runs at a time. What lies in it between two
passes is free for the next, so the pool holds as much as the largest of them needs.

Kept recordings must not take memory that the next trial's plan counts on. They are dropped before
such a trial, when memory runs out, and when weights, codes or scales that they read are dropped.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from engine.adapter.flat import AdapterMemory
from engine.adapter.lora import AnyLora
from engine.data.packing import Batch
from engine.data.row_sizes import MOST_SIZES, Size
from engine.model.base import Base
from engine.model.device import capture as capture
from engine.model.device import record_workspaces
from engine.units import GIB

# Recordings of one kind of pass, and of all kinds where memory is short. 30 layers take 0.2 s to
# record, forward and backward, and 10 MiB for the nodes outside torch's pools (H100).
MAX_OF_A_KIND, MAX_OF_ALL, NODES_GIB = MOST_SIZES, 32, 12 / 1024
KINDS_OF_A_TRIAL = 2  # training and evaluation
# Memory of adapters that no trial uses, kept for recordings where memory is short.
MAX_IDLE_GIB = 0.5
ROOM_SHARE = 0.25  # of what a trial's plan leaves free: that much for more nodes, and for more idle memory
NAME = "recordings"


@dataclass
class RecordedRow:
    """Hold the fixed tensors of a recorded pass, and what replays it.

    batch, divisor: filled before each replay. loss: fp32, a scalar in training and one for each
    target in an evaluation. It is valid until the next replay, and None until the pass is recorded.
    """

    batch: Batch
    divisor: Tensor
    loss: Tensor | None = None
    replay: Callable[[], None] | None = None

    def fill(self, row: Batch, num_targets: int) -> None:
        """Put the values of a row of the same size in place."""
        self.batch.copy_(row)
        self.batch = replace(self.batch, document_lengths=row.document_lengths)
        self.divisor.fill_(num_targets)


@dataclass
class RecordedKind:
    """Hold the recordings of one kind of pass, by row size.

    memory: the adapter's. addresses: of what they read, see `Base.read_addresses`.
    activation_bytes: the most that a pass allocated beyond what was there before, if it was the
    trial's peak when it was recorded.
    """

    memory: AdapterMemory
    addresses: dict[Hashable, int] = field(default_factory=dict)
    rows: dict[Size, RecordedRow] = field(default_factory=dict)
    activation_bytes: int = 0
    is_warm: bool = False


class Recordings:
    """Keep the recordings of one base model, the least recently used first."""

    def __init__(self, device: torch.device) -> None:
        self.can_record = device.type == "cuda"
        self.recording_s = 0.0
        self.evaluation_waits: bool | None = None  # for the host, if an evaluation is not recorded
        self.follows_boundaries: bool | None = None  # a replay reads where samples begin; None until tried
        self._device = device
        self._kinds: OrderedDict[Hashable, RecordedKind] = OrderedDict()
        self._pool: Any = None
        self._workspaces: Callable[[], None] | None = None
        self._spare_gib = 0.0

    @classmethod
    def of(cls, base: Base) -> Recordings:
        """Return the recordings of `base`, none at first."""
        return base.lasting.setdefault(NAME, cls(base.device))

    @property
    def pool(self) -> Any:
        """Return the pool that all recordings share."""
        if self._pool is None and self._device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
            self._workspaces = record_workspaces(self._pool, self._device)
        return self._pool

    def __len__(self) -> int:
        return sum(len(kind.rows) for kind in self._kinds.values())

    def adapter_memory(self, layers: dict[str, AnyLora], dtype: torch.dtype) -> AdapterMemory:
        """Return the memory that recordings of such an adapter read, or new memory."""
        key = AdapterMemory.key_of(layers, dtype)
        known = (kind.memory for kind in self._kinds.values() if kind.memory.key == key)
        return next(known, None) or AdapterMemory(layers, dtype)

    def kind(self, key: Hashable, memory: AdapterMemory, addresses: dict[Hashable, int]) -> RecordedKind:
        """Return the recordings of a kind of pass, empty at first.

        addresses: of what passes read now. Recordings that read other places, which may be gone, are
        dropped.
        """
        for other, kind in list(self._kinds.items()):
            if any(addresses.get(place) != address for place, address in kind.addresses.items()):
                del self._kinds[other]
        full = (key, memory.key)
        kind = self._kinds.setdefault(full, RecordedKind(memory))
        kind.addresses = addresses  # all that it has read, and what it may read from now on
        self._kinds.move_to_end(full)
        return kind

    def trim(self, memory: AdapterMemory) -> None:
        """Drop the least recently used kinds beyond the limits, but not those of a trial on `memory`."""
        more = ROOM_SHARE * self._spare_gib
        while len(self) > MAX_OF_ALL + int(more / NODES_GIB) and len(self._kinds) > KINDS_OF_A_TRIAL:
            self._kinds.popitem(last=False)
        idle = [key for key, kind in self._kinds.items() if kind.memory is not memory]
        while idle and self.idle_bytes(memory) > (MAX_IDLE_GIB + more) * GIB:
            del self._kinds[idle.pop(0)]

    def idle_bytes(self, memory: AdapterMemory) -> int:
        """Return the bytes of adapters' memory kept beside `memory`."""
        kept = {id(kind.memory): kind.memory.num_bytes for kind in self._kinds.values() if kind.memory is not memory}
        return sum(kept.values())

    def drop_if_short(self, key: Hashable, memory: AdapterMemory, need_gib: float | None, limit_gib: float) -> None:
        """Drop all recordings if a trial may need their room.

        key: the trial's kind of training pass, whose activations lie in the pool if it is known.
        need_gib: what the trial's plan takes, None if that is not known. limit_gib: what it may have.
        """
        self._spare_gib = 0.0
        if not self.can_record or not self._kinds or math.isinf(limit_gib):
            return
        if need_gib is None:
            self.clear()
            return
        if need_gib + self._beside(key, memory) > limit_gib:
            self.trim(memory)
        self._spare_gib = max(0.0, limit_gib - need_gib - self._beside(key, memory))
        if not self._spare_gib:
            self.clear()

    def _beside(self, key: Hashable, memory: AdapterMemory) -> float:
        """Return the GiB that recordings hold beside the plan of a trial, whose kind of pass is `key`."""
        own = self._kinds.get((key, memory.key))
        held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated() + self.idle_bytes(memory)
        extra = held - (0 if own is None else own.activation_bytes)
        return max(0, extra) / GIB + max(0, len(self) - MAX_OF_ALL) * NODES_GIB

    def clear(self) -> bool:
        """Drop all recordings, and return True if there were some. Their pool's memory becomes free."""
        had_some = len(self) > 0
        self._kinds.clear()
        self._pool = self._workspaces = None  # a pool that once ran full stays in pieces
        return had_some

    def start_over(self) -> None:
        """Forget what is recorded, in every kind, and take a new pool: torch lets no one record into a broken one."""
        for kind in self._kinds.values():
            kind.rows.clear()
        self._pool = self._workspaces = None
