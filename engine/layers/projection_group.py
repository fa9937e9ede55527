"""Compute linear projections of one input with their adapters: the building block of a fused layer.

For each projection i of the group, with forward and backward written by hand:

    y_i = x W_i^T + b_i + scaling * (dropout(x) A_i^T) B_i^T

Frozen weights get no gradient. Each use dequantises them side by side into one matrix, so a group
is one matmul. The A_i are side by side too, so x is read once for all of them. The members share
one dropout mask.

`low` is dropout(x) A^T of all members, [T, R_1 + R_2 ...]. It is a few bytes a token, and kept from
forward to backward, except under OFFLOAD and in host layers of rows above one MLP tile. If the
caller's next kernel reads y anyway, it can add low B^T itself (`terms`), which saves a pass over y.

With DoRA the rows of W_i and of B_i are multiplied by a gain first, W_i anew at each use. Under
dropout the gain's part of W_i reads dropout(x), as in PEFT, which is one more matmul:

    y_i = x W_i^T + b_i + dropout(x) ((gain - 1) W_i)^T + gain * scaling * (dropout(x) A_i^T) B_i^T

The gradient of a magnitude is a sum over dy^T x times W_i, so each group has one more matmul.

Shape letters: T tokens, D input features, O output features of all members, R rank of all members.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.adapter.lora import TILES, LoraLinear
from engine.kernels import ops
from engine.kernels.eight_bit.int8_ops import Int8Rows, can_split
from engine.kernels.ops import LowRank
from engine.quant.frozen_linear import FrozenLinear
from engine.quant.int8_weight import Int8Group
from engine.quant.matrices import merged_bias, merged_weight, product, slices, stacked
from engine.shape.compute_limits import MAGNITUDE_ROWS

Weights = list[tuple[slice, Tensor]]  # blocks of consecutive output features, each with its weight [O, D]


@dataclass
class ProjectionGroup:
    """The parts of a group of projections, for one call.

    `dtype` is that of activations and adapters. `adapters` holds A [R, D] and scaling * B [O, R] of
    each member, or None. `scalings` has a number of each adapter, or a tensor of one value.

    With dropout, `noise` holds seed and rate (`ops.dropout`), and `stream` numbers the group's mask
    among those of one seed. The seed changes between passes only, so recomputation and backward use
    the mask of the forward pass. `dora` holds the members with magnitudes, or None; `scaled` the
    weights times the gains, if they are held.
    """

    dtype: torch.dtype
    bases: list[FrozenLinear]
    adapters: list[tuple[Tensor, Tensor] | None]
    scalings: list[float | Tensor] = field(default_factory=list)
    noise: Tensor | None = None
    stream: int = 0
    cached: Tensor | None = None
    int8: Int8Group | None = None
    dora: list[LoraLinear | None] = field(default_factory=list)
    scaled: Tensor | None = None

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
            group.dora.append(layer if adapted and layer.magnitude is not None else None)
            group.scalings.append((layer.scaling if layer.scale is None else layer.scale) if adapted else 0.0)
            if adapted:
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
        return slices(*(base.out_features for base in self.bases))

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

    @property
    def has_gains(self) -> bool:
        return any(layer is not None for layer in self.dora)

    def weights(self) -> Weights:
        """Return the weights that x is multiplied by: with DoRA, but for dropout, those times the gains."""
        if self.scaled is not None:
            return [(slice(0, self.outputs[-1].stop), self.scaled)]
        return self._times_gains(0.0) if self.has_gains and self.noise is None else self.raw_weights()

    def _times_gains(self, minus: float) -> Weights:
        """Return the weights times gain - minus; of members without a gain, times 1 - minus."""
        factors_O = torch.cat([self._gain(i) for i in range(len(self.bases))]) - minus
        if self.cached is None and self.is_packed:
            return [(slice(0, self.outputs[-1].stop), merged_weight(self.bases, self.dtype, factors_O))]
        return [(part, weight_OD * factors_O[part, None].to(weight_OD.dtype)) for part, weight_OD in self.raw_weights()]

    def _gain(self, i: int) -> Tensor:
        base, layer = self.bases[i], self.dora[i]
        return torch.ones(base.out_features, device=base.weight.device) if layer is None else layer.pass_gain()[0]

    def raw_weights(self) -> Weights:
        """Return the frozen weights: packed ones dequantised into one matrix, else one block a member."""
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
        if weights is None:
            return held
        place = "scaled" if self.has_gains and self.noise is None else "cached"
        return replace(held, **{place: weights[0][1]})

    def low(self, x_TD: Tensor) -> Tensor | None:
        """Return dropout(x) A^T [T, R] of all members, or None if none is adapted."""
        return self._dropped(x_TD) @ self._stacked_a().t() if self.is_adapted else None

    def bare(self, x_TD: Tensor, weights: Weights | None = None) -> Tensor:
        """Return x W^T + b [T, O] without the adapters, as a new tensor."""
        biases, outputs = [base.bias for base in self.bases], self.outputs
        if self.is_int8_forward:
            return self.int8.product(x_TD, "forward", bias_N=merged_bias(biases, outputs, x_TD))
        blocks = self.weights() if weights is None else weights
        if len(blocks) == 1:
            y_TO = F.linear(x_TD, blocks[0][1], merged_bias(biases, outputs, x_TD))
        else:
            y_TO = x_TD.new_empty(x_TD.shape[0], outputs[-1].stop)
            for (part, weight_OD), bias in zip(blocks, biases):
                y_TO[:, part] = F.linear(x_TD, weight_OD, None if bias is None else bias.to(x_TD.dtype))
        if self.has_gains and self.noise is not None:
            dropped_TD = self._dropped(x_TD)
            for part, weight_OD in self._times_gains(1.0):
                y_TO[:, part].addmm_(dropped_TD, weight_OD.t())
        return y_TO

    def forward(self, x_TD: Tensor, low_TR: Tensor | None) -> Tensor:
        """Return y [T, O] as a new tensor.

        One matmul a member adds its low-rank part, so the sum is rounded once.
        """
        if self.adds_terms:
            biases, outputs = [base.bias for base in self.bases], self.outputs
            merged = LowRank(low_TR, stacked([adapter[1] for adapter in self.adapters]))
            return self.int8.product(x_TD, "forward", merged, merged_bias(biases, outputs, x_TD), self._firsts())
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

    def input_gradient(
        self, dy_TO: Tensor, dlow_TR: Tensor | None, weights: Weights | None = None, rows: Int8Rows | None = None
    ) -> Tensor:
        """Return dL/dx [T, D]. rows: dy's codes, if there are some."""
        if self.is_int8_backward and self.noise is None:
            return self.int8.product(dy_TO, "backward", self.input_term(dlow_TR), rows=rows)
        dx_TD = self.bare_input_gradient(dy_TO, weights, rows)
        if dlow_TR is None:
            return dx_TD
        if self.noise is not None:
            dropped_TD = dlow_TR @ self._stacked_a()
            for part, weight_OD in self._times_gains(1.0) if self.has_gains else ():
                dropped_TD.addmm_(dy_TO[:, part], weight_OD)
            return dx_TD.add_(ops.dropout(dropped_TD, self.noise, self.stream, in_place=True))
        return dx_TD.addmm_(dlow_TR, self._stacked_a())

    def bare_input_gradient(self, dy_TO: Tensor, weights: Weights | None = None, rows: Int8Rows | None = None) -> Tensor:
        """Return dy W [T, D], without the adapters' part."""
        if self.is_int8_backward:
            return self.int8.product(dy_TO, "backward", rows=rows)
        (part, weight_OD), *others = self.weights() if weights is None else weights
        dx_TD = dy_TO[:, part] @ weight_OD
        for part, weight_OD in others:
            dx_TD.addmm_(dy_TO[:, part], weight_OD)
        return dx_TD

    def input_term(self, dlow_TR: Tensor | None) -> LowRank | None:
        """Return the low-rank term to add to `bare_input_gradient`. Valid without dropout only."""
        return None if dlow_TR is None else LowRank(dlow_TR, self._stacked_a().t())

    def adapter_gradients(self, dy_TO: Tensor, dlow_TR: Tensor | None, x_TD: Tensor, low_TR: Tensor | None) -> tuple[Tensor, ...]:
        """Return dA, dB, and with DoRA dm, of each adapted member, in turn. On CUDA, 16-bit inputs give fp32."""
        if dlow_TR is None:
            return ()
        dropped_TD = self._dropped(x_TD)
        da_RD = product(dlow_TR.t(), dropped_TD)
        along_O = self._along_weights(dy_TO, dropped_TD) if self.has_gains else None
        gradients = []
        for part, rank, adapter, scaling, dora in zip(self.outputs, self._ranks(), self.adapters, self.scalings, self.dora):
            if adapter is None:
                continue
            db_OR = product(dy_TO[:, part].t(), low_TR[:, rank]).mul_(scaling)
            gradients += [da_RD[rank], db_OR]
            if dora is not None:
                gain, norm = dora.pass_gain()
                gradients.append((along_O[part] + (db_OR * dora.lora_b.detach()).sum(1)) / norm)
                db_OR.mul_(gain[:, None])
        return tuple(gradients)

    def _along_weights(self, dy_TO: Tensor, x_TD: Tensor) -> Tensor:
        """Return the sum over tokens of dy times x W^T, of each output feature, fp32 [O]."""
        found_O = torch.empty(dy_TO.shape[1], device=dy_TO.device)
        for i, part in enumerate(self.outputs):
            if self.dora[i] is None:
                continue
            weight = self.bases[i].operand() if self.cached is None else self.cached[part]
            for start in range(part.start, part.stop, MAGNITUDE_ROWS):
                rows = slice(start, min(start + MAGNITUDE_ROWS, part.stop))
                ops.row_dots(weight, product(dy_TO[:, rows].t(), x_TD).float(), start - part.start, found_O[rows])
        return found_O

    def _ranks(self) -> list[slice]:
        return slices(*(0 if a is None else a[0].shape[0] for a in self.adapters))

    def _stacked_a(self) -> Tensor:
        return stacked([adapter[0] for adapter in self.adapters if adapter is not None])

    def _dropped(self, x_TD: Tensor) -> Tensor:
        return x_TD if self.noise is None else ops.dropout(x_TD, self.noise, self.stream)
