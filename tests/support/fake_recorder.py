"""Record passes on the CPU: a fake of CUDA graphs that is as strict about addresses as they are."""

from __future__ import annotations

import torch

from engine.adapter.lora import LoraLinear
from engine.layers.swap import int8_groups
from engine.model.base import Base
from engine.training import recordings
from engine.training.recordings import Recordings


class FakeRecorder:
    """Stand in for `recordings.capture` on one base.

    Recording computes nothing. A replay computes what was recorded, and fails if a tensor that a
    graph would read or add to is not where it was. `fault` is raised instead of the next recording.
    """

    def __init__(self, base: Base, monkeypatch) -> None:
        self._base, self.num_recorded, self.num_replayed, self.fault = base, 0, 0, None
        Recordings.of(base).can_record = True
        monkeypatch.setattr(recordings, "capture", self._capture)

    def _capture(self, compute, pool):
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        self.num_recorded += 1
        result, places = torch.zeros(()), self._places()

        def replay():
            assert places.items() <= self._places().items(), "a recording would read other memory"
            self.num_replayed += 1
            found = compute()
            result.resize_(found.shape).copy_(found)

        return result, replay

    def _places(self):
        layers = [module for module in self._base.model.modules() if isinstance(module, LoraLinear)]
        tensors = [t for layer in layers for t in (*layer.casts, layer.scale, layer.noise, layer.lora_a.grad, layer.lora_b.grad)]
        found = {"adapter": tuple(t.data_ptr() for t in tensors), **self._base.read_addresses()}
        for (first, *_), int8 in int8_groups(self._base.model):
            found[first] = int8.scales.row_O.data_ptr(), int8.scales.column_D.data_ptr()
        return found
