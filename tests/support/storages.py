"""Count what code allocates on the meta device, without computing anything."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Storages(TorchDispatchMode):
    """Count the bytes of living storages made while this mode is on, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.highest = 0
        self._seen: dict[int, weakref.ref] = {}
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(Tensor, self._count, out)
        return out

    def resize(self, storage: torch.UntypedStorage, size: int) -> None:
        """Count `storage` as if it had been resized."""
        self.alive += size - self._sizes[storage._cdata]
        self._sizes[storage._cdata] = size
        self.highest = max(self.highest, self.alive)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or tensor.device.type != "meta":
            return
        self._seen[key], self._sizes[key] = weakref.ref(storage, lambda _: self._free(key)), 0
        self.resize(storage, size)

    def _free(self, key: int) -> None:
        del self._seen[key]
        self.alive -= self._sizes.pop(key)

    def ignore(self, *tensors: Tensor) -> None:
        """Leave out storages made earlier."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._seen[storage._cdata] = weakref.ref(storage)
