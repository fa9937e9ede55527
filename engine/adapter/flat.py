"""Keep all LoRA matrices of a model in one flat parameter, at addresses that trials can share."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from engine.adapter.expert_lora import LoraExperts
from engine.adapter.lora import AnyLora, LoraLinear
from engine.adapter.token_rows import TokenRows
from engine.kernels.ops import noise_of

GIVEN_BACK = 2**28  # bytes of parameters whose former memory goes back to the device at once


class AdapterMemory:
    """Hold the tensors of an adapter that a pass through the model reads or adds to.

    A recorded pass (engine/training/recordings.py) reads their addresses. The next adapter of the
    same `key` moves into the same memory, with other values, another scaling and another dropout
    rate, and the recording serves it too. `embedding_noise` is NEFTune's alpha.
    """

    def __init__(self, layers: dict[str, AnyLora], dtype: torch.dtype) -> None:
        """Allocate memory for `layers`. dtype: the activations' dtype."""
        first = next(iter(layers.values()))
        device, size = first.lora_a.device, sum(p.numel() for layer in layers.values() for p in layer.parameters_of())
        num_gains = sum(layer.out_features for layer in _with_lengths(layers))
        self.gains, self.norms = (torch.ones(num_gains, device=device) for _ in range(2))
        self.key = self.key_of(layers, dtype)
        self.values = torch.zeros(size, device=device)
        copied = sum(p.numel() for layer in layers.values() if not isinstance(layer, LoraExperts) for p in layer.parameters_of())
        self.cast = torch.zeros(copied, dtype=dtype, device=device)
        self.scalings = torch.ones(len(_adapters(layers)), 4, device=device)[:, 0]  # 16 bytes apart: kernels are compiled once
        self.noise = torch.zeros(2, dtype=torch.int64, device=device)
        self.embedding_noise = torch.zeros((), device=device)

    @staticmethod
    def key_of(layers: dict[str, AnyLora], dtype: torch.dtype) -> tuple[object, ...]:
        """Return what two adapters must share to fit into the same memory: layers, ranks, dtype, dropout or none, DoRA or not."""
        drops = next(iter(layers.values())).dropout > 0.0  # one rate for all
        shapes = [(name, *(p.shape for p in layer.parameters_of()), drops) for name, layer in layers.items()]
        return dtype, next(iter(layers.values())).lora_a.device, *shapes

    @functools.cached_property
    def gradient(self) -> torch.Tensor:
        """Return the gradient, zeros at first. It is made on first use: by then the parameters have left their own memory."""
        return torch.zeros_like(self.values)

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.values, self.values, self.cast))


class FlatAdapter:
    """Hold an adapter as one parameter with one gradient and one 16-bit copy of all but experts.

    All A come first, then rows of trained tokens, then all B, then DoRA's magnitudes. Those of experts
    follow other A and rows, and other B.

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
        nothing else uses; new memory if None. num_a counts the elements of all A and of the rows;
        shapes are those of all matrices, in order.
        """
        self.memory = memory or AdapterMemory(layers, dtype)
        if self.memory.key != AdapterMemory.key_of(layers, dtype):
            raise ValueError("an adapter of another shape, dtype or device does not fit into this memory")
        adapters = [layer for layer in layers.values() if isinstance(layer, LoraLinear)]
        experts = [layer for layer in layers.values() if isinstance(layer, LoraExperts)]
        self._rows = [layer for layer in layers.values() if isinstance(layer, TokenRows)]
        self._dora = _with_lengths(layers)
        first_parts = [layer.lora_a for layer in adapters] + [layer.rows for layer in self._rows]
        self._copied_a = sum(p.numel() for p in first_parts)
        first_parts += [layer.lora_a for layer in experts]
        parts = first_parts + [layer.lora_b for layer in adapters + experts] + [layer.magnitude for layer in self._dora]
        torch.cat([p.detach().flatten() for p in parts], out=self.memory.values)
        self.parameter = nn.Parameter(self.memory.values)
        self._cast = self.memory.cast
        self.num_a = sum(p.numel() for p in first_parts)
        self._copied_b = sum(layer.lora_b.numel() for layer in adapters)
        self._past_b = self.num_a + self._copied_b + sum(layer.lora_b.numel() for layer in experts)
        first = next(iter(layers.values()))  # one config, one rate
        self.memory.scalings.copy_(torch.tensor([layer.scaling for layer in _adapters(layers)]))
        self.memory.noise.copy_(torch.tensor(noise_of(0, first.dropout)))
        self.shapes = [part.shape for part in parts if part.dim() == 2]
        self._frozen = [(layer.lora_a, layer.lora_b, layer.num_frozen) for layer in adapters if layer.num_frozen]
        self._kept: list[torch.Tensor] = []
        for p, values in zip(parts, _views(self.parameter.data, parts)):
            p.data = values
        if self.parameter.is_cuda and self.parameter.nbytes >= GIVEN_BACK:
            torch.cuda.empty_cache()  # where the parameters were: the gradient is a little larger than that hole
        self.parameter.grad = self.memory.gradient
        self.zero_grad()
        for p, gradient in zip(parts, _views(self.parameter.grad, parts)):
            p.grad = gradient
        all_a = _views(self._cast, [layer.lora_a for layer in adapters])
        all_b = _views(self._cast[self._copied_a :], [layer.lora_b for layer in adapters])
        for layer, *casts in zip(adapters, all_a, all_b):
            layer.casts, layer.noise = tuple(casts), self.memory.noise
        for layer, scale in zip(_adapters(layers), self.memory.scalings):
            layer.scale = scale
        self._scaled_runs = _runs_of_one_scaling(adapters)
        start = 0
        for layer in self._dora:
            part = slice(start, start + layer.out_features)
            layer.gain, layer.norm, start = self.memory.gains[part], self.memory.norms[part], part.stop
        self._runs = _runs_of_one_rank(self._dora, self.num_a)
        self._is_silent = False
        self.refresh()

    @property
    def num_trainable(self) -> int:
        """Return the number of values that change in training."""
        return self.parameter.numel() - sum(tensor.numel() for tensor in self._frozen_parts())

    def freeze(self, decays: bool) -> None:
        """Take the frozen values' gradients off, before the optimizer's step.

        decays: the step has weight decay, so `refresh` puts the values back.
        """
        if self._frozen:
            torch._foreach_zero_(self._frozen_parts(of_gradient=True))
            if decays and not self._kept:
                self._kept = [part.clone() for part in self._frozen_parts()]

    def _frozen_parts(self, of_gradient: bool = False) -> list[torch.Tensor]:
        parts = []
        for a_RD, b_OR, count in self._frozen:
            a, b = (a_RD.grad, b_OR.grad) if of_gradient else (a_RD.detach(), b_OR.detach())
            parts += [a[-count:], b[:, -count:]]
        return parts

    def refresh(self) -> None:
        """Update the copy of A and scaling * B after the parameter has changed. Frozen values do not decay."""
        if self._kept:
            torch._foreach_copy_(self._frozen_parts(), self._kept)
        values = self.parameter.detach()
        a, b = self._copied_a, self._copied_b
        self._cast[:a].copy_(values[:a])
        values_b, cast_b = values[self.num_a : self.num_a + b], self._cast[a : a + b]
        for part, _, scale in self._scaled_runs:
            torch.mul(values_b[part], scale, out=cast_b[part])
        if self._dora:
            self._refresh_gains(values)

    def _refresh_gains(self, values: torch.Tensor) -> None:
        """Find the rows' lengths and gains, and put the gains into the copy of scaling * B.

        One launch a layer for the lengths, and one for each run of layers of one rank.
        """
        gains, norms = self.memory.gains, self.memory.norms
        for layer in self._dora:
            layer.weight_norm(layer.norm)
        torch.div(norms if self._is_silent else values[self._past_b :], norms, out=gains)
        factors = torch.empty_like(gains)
        for _, rows, scale in self._scaled_runs:  # DoRA is on all linear layers or none
            torch.mul(gains[rows], scale, out=factors[rows])
        for rank, b, rows in self._runs:
            torch.mul(values[b].view(-1, rank), factors[rows, None], out=self._cast[b].view(-1, rank))

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Have the adapter add nothing while the block runs. Rows of trained tokens are as they start."""
        b = self.parameter.detach()[self.num_a : self._past_b]
        kept, kept_rows = b.clone(), [layer.rows.detach().clone() for layer in self._rows]
        try:
            b.zero_()
            for layer in self._rows:
                layer.rows.detach().copy_(layer.first_rows())
            self._is_silent = True
            self.refresh()
            yield
        finally:
            b.copy_(kept)
            for layer, rows_ND in zip(self._rows, kept_rows, strict=True):
                layer.rows.detach().copy_(rows_ND)
            self._is_silent = False
            self.refresh()

    def zero_grad(self) -> None:
        self.parameter.grad.zero_()

    def draw_masks(self, *place: int) -> None:
        """Set the dropout masks and the embeddings' noise of the next pass.

        place: seed of the trial, step and micro-batch, say. They are functions of it alone.
        """
        digest = hashlib.sha256(":".join(map(str, place)).encode()).digest()
        self.memory.noise[0].fill_(int.from_bytes(digest[:8], "little") >> 1)


def _views(flat: torch.Tensor, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the beginning of a flat tensor cut into tensors of the shapes of `parts`."""
    sizes = [part.numel() for part in parts]
    return [view.view(part.shape) for view, part in zip(flat[: sum(sizes)].split(sizes), parts)] if parts else []


def _adapters(layers: dict[str, AnyLora]) -> list[LoraLinear | LoraExperts]:
    """Return the layers with A and B."""
    return [layer for layer in layers.values() if not isinstance(layer, TokenRows)]


def _with_lengths(layers: dict[str, AnyLora]) -> list[LoraLinear]:
    """Return the layers with DoRA's magnitudes."""
    return [layer for layer in layers.values() if isinstance(layer, LoraLinear) and layer.magnitude is not None]


def _runs_of_one_rank(layers: list[LoraLinear], start: int) -> list[tuple[int, slice, slice]]:
    """Return rank, elements of all B in the flat parameter, and rows of all gains, of consecutive layers of one rank.

    start: of the first layer's B. DoRA is on all layers or none, so their B follow each other.
    """
    runs, end = [], 0
    for rank, group in itertools.groupby(layers, lambda layer: layer.rank):
        first, place = end, start
        end += sum(layer.out_features for layer in group)
        start += rank * (end - first)
        runs.append((rank, slice(place, start), slice(first, end)))
    return runs


def _runs_of_one_scaling(layers: list[LoraLinear]) -> list[tuple[slice, slice, torch.Tensor]]:
    """Return elements of all B, their rows, and the scaling, of consecutive layers of one scaling.

    It is one run unless alphas differ.
    """
    runs, element, row = [], 0, 0
    for _, group in itertools.groupby(layers, lambda layer: layer.scaling):
        same = list(group)
        elements, rows = sum(layer.lora_b.numel() for layer in same), sum(layer.out_features for layer in same)
        runs.append((slice(element, element + elements), slice(row, row + rows), same[0].scale))
        element, row = element + elements, row + rows
    return runs
