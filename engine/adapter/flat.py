"""Keep all LoRA matrices of a model in one flat parameter, at addresses that trials can share."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from engine.adapter.lora import AnyLora
from engine.adapter.token_rows import TokenRows
from engine.kernels.ops import noise_of


class AdapterMemory:
    """Hold the tensors of an adapter that a pass through the model reads or adds to.

    A recorded pass (engine/training/recordings.py) reads their addresses. The next adapter of the
    same `key` moves into the same memory, with other values, another scaling and another dropout
    rate, and the recording serves it too.
    """

    def __init__(self, layers: dict[str, AnyLora], dtype: torch.dtype) -> None:
        """Allocate memory for `layers`. dtype: the activations' dtype."""
        first = next(iter(layers.values()))
        device, size = first.lora_a.device, sum(p.numel() for layer in layers.values() for p in layer.parameters_of())
        self.key = self.key_of(layers, dtype)
        self.values, self.gradient = (torch.zeros(size, device=device) for _ in range(2))
        self.cast = torch.zeros(size, dtype=dtype, device=device)
        self.scaling = torch.ones((), device=device)
        self.noise = torch.zeros(2, dtype=torch.int64, device=device)

    @staticmethod
    def key_of(layers: dict[str, AnyLora], dtype: torch.dtype) -> tuple[object, ...]:
        """Return what two adapters must share to fit into the same memory: layers, ranks, dtype, dropout or none."""
        drops = next(iter(layers.values())).dropout > 0.0  # one rate for all
        shapes = [(name, *(p.shape for p in layer.parameters_of()), drops) for name, layer in layers.items()]
        return dtype, next(iter(layers.values())).lora_a.device, *shapes

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.values, self.gradient, self.cast))


class FlatAdapter:
    """Hold all A, then rows of trained tokens, then all B, as one parameter with one gradient and one 16-bit copy.

    An adapter has hundreds of small tensors, and one launch per tensor is slow. On an H100, 8-bit
    AdamW over 360 tensors spent 58 ms on launches for 1.4 ms of work. On the flat parameter, the
    optimizer, the gradient norm, zeroing and casting take one or two launches each; the layers hold
    views.

    Layers that read the same input follow each other in a model. Their A are therefore adjacent in
    memory, and one matmul reads them as one matrix.
    """

    def __init__(self, layers: dict[str, AnyLora], dtype: torch.dtype, memory: AdapterMemory | None = None) -> None:
        """Move the parameters of `layers` into the flat one.

        dtype: the activations' dtype. memory: that of an earlier adapter of the same key, which
        nothing else uses; new memory if None. num_a counts the elements of all A and of the rows.
        """
        self.memory = memory or AdapterMemory(layers, dtype)
        if self.memory.key != AdapterMemory.key_of(layers, dtype):
            raise ValueError("an adapter of another shape, dtype or device does not fit into this memory")
        adapters = [layer for layer in layers.values() if not isinstance(layer, TokenRows)]
        rows = [layer.rows for layer in layers.values() if isinstance(layer, TokenRows)]
        parts = [layer.lora_a for layer in adapters] + rows + [layer.lora_b for layer in adapters]
        torch.cat([p.detach().flatten() for p in parts], out=self.memory.values)
        self.parameter = nn.Parameter(self.memory.values)
        self.parameter.grad = self.memory.gradient
        self.zero_grad()
        self._cast = self.memory.cast
        self.num_a = sum(p.numel() for p in parts[: len(adapters) + len(rows)])
        first = next(iter(layers.values()))  # one config, one scaling and one rate
        self.memory.scaling.fill_(first.scaling)
        self.memory.noise.copy_(torch.tensor(noise_of(0, first.dropout)))
        views, start = [], 0
        for p in parts:
            part = slice(start, start + p.numel())
            p.data, p.grad = self.parameter.data[part].view_as(p), self.parameter.grad[part].view_as(p)
            views.append(self._cast[part].view_as(p))
            start = part.stop
        for i, layer in enumerate(adapters):
            layer.casts = (views[i], views[len(adapters) + len(rows) + i])
            layer.scale, layer.noise = self.memory.scaling, self.memory.noise
        self.refresh()

    def refresh(self) -> None:
        """Update the copy of A and scaling * B after the parameter has changed."""
        values = self.parameter.detach()
        self._cast[: self.num_a].copy_(values[: self.num_a])
        torch.mul(values[self.num_a :], self.memory.scaling, out=self._cast[self.num_a :])

    def zero_grad(self) -> None:
        self.parameter.grad.zero_()

    def draw_masks(self, *place: int) -> None:
        """Set the dropout masks of the next pass.

        place: seed of the trial, step and micro-batch, say. The masks are a function of it alone.
        """
        digest = hashlib.sha256(":".join(map(str, place)).encode()).digest()
        self.memory.noise[0].fill_(int.from_bytes(digest[:8], "little") >> 1)
