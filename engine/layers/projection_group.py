"""Compute linear projections of one input with their adapters: the building block of a fused layer.

For each projection i of the group, with forward and backward written by hand:

    y_i = x W_i^T + b_i + scaling * (dropout(x) A_i^T) B_i^T

Frozen weights get no gradient. Each use dequantises them side by side into one matrix, so a group
is one matmul. The A_i are side by side too, so x is read once for all of them. The members share
one dropout mask.

`low` is dropout(x) A^T of all members, [T, R_1 + R_2 ...]. It is a few bytes a token, and kept from
forward to backward, except under OFFLOAD and in host layers of rows above one MLP tile. If the
caller's next kernel reads y anyway, it can add low B^T itself (`terms`), which saves a pass over y.

Shape letters: T tokens, D input features, O output features of all members, R rank of all members.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.adapter.lora import TILES, LoraLinear
from engine.kernels import ops
from engine.kernels.eight_bit.int8_ops import can_split
from engine.kernels.ops import LowRank
from engine.quant.frozen_linear import FrozenLinear
from engine.quant.int8_weight import Int8Group

Weights = list[tuple[slice, Tensor]]  # blocks of consecutive output features, each with its weight [O, D]


@dataclass
class ProjectionGroup:
    """The parts of a group of projections, for one call.

    `dtype` is that of activations and adapters. `adapters` holds A [R, D] and scaling * B [O, R] of
    each member, or None. `scaling` is a number, or a tensor of one value.

    With dropout, `noise` holds seed and rate (`ops.dropout`), and `stream` numbers the group's mask
    among those of one seed. The seed changes between passes only, so recomputation and backward use
    the mask of the forward pass.
    """

    dtype: torch.dtype
    bases: list[FrozenLinear]
    adapters: list[tuple[Tensor, Tensor] | None]
    scaling: float | Tensor = 0.0
    noise: Tensor | None = None
    stream: int = 0
    cached: Tensor | None = None
    int8: Int8Group | None = None

    @classmethod
    def of(
        cls, layers: list[nn.Module], dtype: torch.dtype, cached: Tensor | None = None, int8: Int8Group | None = None
    ) -> ProjectionGroup:
        """Build a group from FrozenLinears or LoraLinears that read the same input.

        `cached` holds their dequantised weights [O, D], if they are kept. `int8` computes products
        in INT8, if some are. Raises TypeError for another kind of layer.
        """
        group = cls(dtype, [], [], cached=cached, int8=int8)
        dropping = []
        for layer in layers:
            if not isinstance(layer, FrozenLinear | LoraLinear):
                raise TypeError(f"a fused layer needs FrozenLinear or LoraLinear, not {type(layer).__name__}")
            adapted = isinstance(layer, LoraLinear)
            group.bases.append(layer.base if adapted else layer)
            group.adapters.append(layer.cast(dtype) if adapted else None)
            if adapted:
                group.scaling = layer.scaling if layer.scale is None else layer.scale
                dropping += [layer] if layer.dropout and layer.training else []
        if dropping:
            group.noise, group.stream = dropping[0].noise_of_pass(), TILES * dropping[0].number
        return group

    def of_tile(self, i: int) -> ProjectionGroup:
        """Return the same group for tile `i` of a row, with its own dropout mask."""
        return replace(self, stream=self.stream + i)

    @property
    def is_adapted(self) -> bool:
        return any(adapter is not None for adapter in self.adapters)

    @property
    def is_packed(self) -> bool:
        return all(base.is_packed for base in self.bases)

    @property
    def outputs(self) -> list[slice]:
        """Return each member's output features, as a slice of y."""
        return _slices(*(base.out_features for base in self.bases))

    @property
    def is_int8_forward(self) -> bool:
        return self.int8 is not None and self.int8.mode.is_int8_forward

    @property
    def is_int8_backward(self) -> bool:
        return self.int8 is not None and self.int8.mode.is_int8_backward

    @property
    def adds_terms(self) -> bool:
        """Return True if the product in INT8 adds the adapters' parts by itself: all have one rank, and widths fit."""
        ranks = {0 if adapter is None else adapter[0].shape[0] for adapter in self.adapters}
        return self.is_int8_forward and 0 not in ranks and len(ranks) == 1 and can_split(self.outputs[-1].stop, self._firsts())

    def _firsts(self) -> tuple[int, ...]:
        """Return the first output feature of each member but the first."""
        return tuple(part.start for part in self.outputs[1:])

    def weights_for(self, *, forward: bool, backward: bool) -> Weights | None:
        """Return `weights` if one of these products reads them; else None."""
        is_read = (forward and not self.is_int8_forward) or (backward and not self.is_int8_backward)
        return self.weights() if is_read else None

    def weights(self) -> Weights:
        """Return the weights: packed ones dequantised into one matrix, else one block a member."""
        whole = slice(0, self.outputs[-1].stop)
        if self.cached is not None:
            return [(whole, self.cached)]
        if not self.is_packed:
            return [(part, base.dequantized(self.dtype)) for part, base in zip(self.outputs, self.bases)]
        if len(self.bases) == 1:
            return [(whole, self.bases[0].dequantized(self.dtype))]
        return [(whole, merged_weight(self.bases, self.dtype))]

    def with_weights(self, *, forward: bool, backward: bool) -> ProjectionGroup:
        """Return the same group with its weights dequantised once, for several uses in these products."""
        held = self if self.int8 is None else replace(self, int8=self.int8.held())
        is_read = self.cached is None and self.is_packed
        weights = self.weights_for(forward=forward, backward=backward) if is_read else None
        return held if weights is None else replace(held, cached=weights[0][1])

    def low(self, x_TD: Tensor) -> Tensor | None:
        """Return dropout(x) A^T [T, R] of all members, or None if none is adapted."""
        return self._dropped(x_TD) @ self._stacked_a().t() if self.is_adapted else None

    def bare(self, x_TD: Tensor, weights: Weights | None = None) -> Tensor:
        """Return x W^T + b [T, O] without the adapters, as a new tensor."""
        biases = [base.bias for base in self.bases]
        outputs = self.outputs
        if self.is_int8_forward:
            return self.int8.product(x_TD, "forward", bias_N=_merged_bias(biases, outputs, x_TD))
        blocks = self.weights() if weights is None else weights
        y_TO = None
        if len(blocks) == 1:
            y_TO = F.linear(x_TD, blocks[0][1], _merged_bias(biases, outputs, x_TD))
        else:
            y_TO = x_TD.new_empty(x_TD.shape[0], outputs[-1].stop)
            for (part, weight_OD), bias in zip(blocks, biases):
                y_TO[:, part] = F.linear(x_TD, weight_OD, None if bias is None else bias.to(x_TD.dtype))
        return y_TO

    def forward(self, x_TD: Tensor, low_TR: Tensor | None) -> Tensor:
        """Return y [T, O] as a new tensor.

        One matmul a member adds its low-rank part, so the sum is rounded once.
        """
        if self.adds_terms:
            biases, outputs = [base.bias for base in self.bases], self.outputs
            merged = LowRank(low_TR, _stacked([adapter[1] for adapter in self.adapters]))
            return self.int8.product(x_TD, "forward", merged, _merged_bias(biases, outputs, x_TD), self._firsts())
        y_TO = self.bare(x_TD)
        for part, term in zip(self.outputs, self.terms(low_TR)):
            if term is not None:
                y_TO[:, part].addmm_(term.low_TR, term.b_FR.t())
        return y_TO

    def before_terms(self, x_TD: Tensor, low_TR: Tensor | None, weights: Weights | None = None) -> Tensor:
        """Return y [T, O] as a new tensor, to which `terms` must still be added: `bare`, or all if `adds_terms`."""
        return self.forward(x_TD, low_TR) if self.adds_terms else self.bare(x_TD, weights)

    def terms(self, low_TR: Tensor | None) -> list[LowRank | None]:
        """Return the term to add to each member's part of `bare`; None without an adapter."""
        return [a and LowRank(low_TR[:, part], a[1]) for part, a in zip(self._ranks(), self.adapters)]

    def low_gradient(self, dy_TO: Tensor) -> Tensor | None:
        """Return dL / d(dropout(x) A^T) [T, R], or None if none is adapted."""
        if not self.is_adapted:
            return None
        ranks = self._ranks()
        dlow_TR = dy_TO.new_empty(dy_TO.shape[0], ranks[-1].stop)
        for part, rank, adapter in zip(self.outputs, ranks, self.adapters):
            if adapter is not None:
                torch.mm(dy_TO[:, part], adapter[1], out=dlow_TR[:, rank])
        return dlow_TR

    def input_gradient(self, dy_TO: Tensor, dlow_TR: Tensor | None, weights: Weights | None = None) -> Tensor:
        """Return dL/dx [T, D]."""
        if self.is_int8_backward and self.noise is None:
            return self.int8.product(dy_TO, "backward", self.input_term(dlow_TR))
        dx_TD = self.bare_input_gradient(dy_TO, weights)
        if dlow_TR is None:
            return dx_TD
        if self.noise is not None:
            return dx_TD.add_(ops.dropout(dlow_TR @ self._stacked_a(), self.noise, self.stream, in_place=True))
        return dx_TD.addmm_(dlow_TR, self._stacked_a())

    def bare_input_gradient(self, dy_TO: Tensor, weights: Weights | None = None) -> Tensor:
        """Return dy W [T, D], without the adapters' part."""
        if self.is_int8_backward:
            return self.int8.product(dy_TO, "backward")
        (part, weight_OD), *others = self.weights() if weights is None else weights
        dx_TD = dy_TO[:, part] @ weight_OD
        for part, weight_OD in others:
            dx_TD.addmm_(dy_TO[:, part], weight_OD)
        return dx_TD

    def input_term(self, dlow_TR: Tensor | None) -> LowRank | None:
        """Return the low-rank term to add to `bare_input_gradient`. Valid without dropout only."""
        return None if dlow_TR is None else LowRank(dlow_TR, self._stacked_a().t())

    def adapter_gradients(self, dy_TO: Tensor, dlow_TR: Tensor | None, x_TD: Tensor, low_TR: Tensor | None) -> tuple[Tensor, ...]:
        """Return dA, dB of each adapted member, in turn. On CUDA, 16-bit inputs give fp32."""
        if dlow_TR is None:
            return ()
        da_RD = _product(dlow_TR.t(), self._dropped(x_TD))
        gradients = []
        for part, rank, adapter in zip(self.outputs, self._ranks(), self.adapters):
            if adapter is not None:
                gradients += [da_RD[rank], _product(dy_TO[:, part].t(), low_TR[:, rank]).mul_(self.scaling)]
        return tuple(gradients)

    def _ranks(self) -> list[slice]:
        return _slices(*(0 if a is None else a[0].shape[0] for a in self.adapters))

    def _stacked_a(self) -> Tensor:
        return _stacked([adapter[0] for adapter in self.adapters if adapter is not None])

    def _dropped(self, x_TD: Tensor) -> Tensor:
        return x_TD if self.noise is None else ops.dropout(x_TD, self.noise, self.stream)


def merged_weight(bases: list[FrozenLinear], dtype: torch.dtype) -> Tensor:
    """Return the dequantised weights of packed layers with one input, side by side, [O, D]."""
    parts = _slices(*(base.out_features for base in bases))
    merged_OD = torch.empty(parts[-1].stop, bases[0].in_features, dtype=dtype, device=bases[0].weight.device)
    for part, base in zip(parts, bases):
        base.dequantized(dtype, out=merged_OD[part])
    return merged_OD


@functools.cache
def _slices(*sizes: int) -> list[slice]:
    """Return consecutive slices of these sizes.

    Cached, because a step asks for the same few hundreds of times.
    """
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [slice(end - size, end) for end, size in zip(ends, sizes)]


def _stacked(matrices: list[Tensor]) -> Tensor:
    """Return the matrices one below the other.

    The result is a view if they follow each other in memory, as `FlatAdapter` lays them out. Else
    it is a copy.
    """
    first = matrices[0]
    if len(matrices) == 1:
        return first
    place, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for matrix in matrices:
        if matrix.untyped_storage().data_ptr() != storage or matrix.storage_offset() != place or not matrix.is_contiguous():
            return torch.cat(matrices)
        place += matrix.numel()
    return first.as_strided((sum(m.shape[0] for m in matrices), first.shape[1]), first.stride())


def _merged_bias(biases: list[Tensor | None], outputs: list[slice], x: Tensor) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    zeros = [x.new_zeros(part.stop - part.start) if bias is None else bias.to(x.dtype) for part, bias in zip(outputs, biases)]
    return zeros[0] if len(zeros) == 1 else torch.cat(zeros)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b; 16-bit operands on CUDA give fp32.

    The product is added into an fp32 gradient, so this saves a rounding and a launch.
    """
    wide = a.is_cuda and a.dtype in (torch.bfloat16, torch.float16)
    return torch.mm(a, b, out_dtype=torch.float32) if wide else a @ b
