"""Multiply by frozen NF4 weights in INT8: the products of one group of linear layers.

A product sums over the last dimension of both operands. The forward pass sums over input features
and the input gradient over output features, so they take two sets of codes of the same weights:

    y  [T, O] = x W^T:  codes [O, D], a scale for each output feature
    dx [T, D] = dy W:   codes [D, O], a scale for each input feature

The other operand has a scale for each token. For y, a Hadamard matrix rotates groups of 64 input
features of both operands. This leaves y as it is, and spreads the outliers of x over their group:
they cost INT8 most of its accuracy. Gradients have no such outliers.

Codes are made at each use, or kept. Scales are made once, because they need all of a weight.

Shape letters: T tokens, D input features, O output features, N and K those of a product.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from engine.config.matmul import Matmul
from engine.kernels.eight_bit import int8_ops
from engine.kernels.eight_bit.int8_ops import HIGHEST_RANK, Int8Rows, WeightScales
from engine.kernels.ops import LowRank
from engine.quant.frozen_linear import FrozenLinear
from engine.shape.compute_limits import takes_int8

Direction = Literal["forward", "backward"]
TINY = 1e-30


@dataclass(frozen=True)
class Int8Group:
    """The packed weights of linear layers with one input, as operands of INT8 products.

    kept: codes that stay. With `is_held`, codes stay once they are made.
    """

    bases: list[FrozenLinear]
    mode: Matmul
    scales: WeightScales
    kept: dict[Direction, Int8Rows] = field(default_factory=dict)
    is_held: bool = False

    @classmethod
    def of(cls, bases: list[FrozenLinear], mode: Matmul) -> Int8Group | None:
        """Return the group, or None if its products stay in the working dtype.

        They do in mode BF16, if a weight is not packed, or if the kernels do not take its sizes.
        """
        features_in, features_out = bases[0].in_features, sum(base.out_features for base in bases)
        if not takes_int8(mode, features_in, features_out) or not all(base.is_packed for base in bases):
            return None
        return cls(bases, mode, int8_ops.weight_scales([base.nf4 for base in bases], mode.is_int8_forward))

    def keep(self, *directions: Direction) -> None:
        """Keep the codes for these products, and for no others."""
        found = {direction: self.weight(direction) for direction in directions}
        self.kept.clear()
        self.kept.update(found)

    def held(self) -> Int8Group:
        """Return the same group for several uses: it keeps the codes that it makes."""
        return replace(self, kept=dict(self.kept), is_held=True)

    def weight(self, direction: Direction) -> Int8Rows:
        """Return the codes for a product: [O, D] forward, [D, O] backward."""
        found = self.kept.get(direction)
        if found is None:
            unpack = int8_ops.unpack_rows if direction == "forward" else int8_ops.unpack_columns
            found = unpack([base.nf4 for base in self.bases], self.scales)
            if self.is_held:
                self.kept[direction] = found
        return found

    def product(
        self,
        x_TK: Tensor,
        direction: Direction,
        term: LowRank | None = None,
        bias_N: Tensor | None = None,
        firsts: tuple[int, ...] = (),
        rows: Int8Rows | None = None,
    ) -> Tensor:
        """Return x W^T + bias [T, O], or with direction "backward" dy W [T, D], plus a low-rank term, in x's dtype.

        firsts: as `int8_ops.matmul` takes it, for the terms of several layers. rows: the codes of x, if there are some.
        """
        if rows is None:
            rows = int8_ops.quantize_rows(x_TK, is_rotated=direction == "forward")
        fits = term is None or term.b_FR.shape[1] <= HIGHEST_RANK
        own, more = (term, None) if fits else (None, term)
        y_TN = int8_ops.matmul(rows, self.weight(direction), x_TK.dtype, own, bias_N, firsts)
        return y_TN if more is None else _with_term(y_TN, more, firsts)


@dataclass(frozen=True)
class ProbedGroup(Int8Group):
    """Multiply in the working dtype, and note how far INT8 is from that.

    errors: direction -> for each product the mean over tokens of |int8 - exact| / |exact|, scalars on
    the device. A token whose product is zero counts as exact if its codes are.
    """

    errors: dict[Direction, list[Tensor]] = field(default_factory=dict)

    def product(
        self,
        x_TK: Tensor,
        direction: Direction,
        term: LowRank | None = None,
        bias_N: Tensor | None = None,
        firsts: tuple[int, ...] = (),
        rows: Int8Rows | None = None,
    ) -> Tensor:
        """Return the product in the working dtype."""
        weight_OD = torch.cat([base.dequantized(x_TK.dtype) for base in self.bases])
        exact_TN = x_TK @ (weight_OD.t() if direction == "forward" else weight_OD)
        gap_TN = super().product(x_TK, direction).float() - exact_TN.float()
        relative_T = gap_TN.norm(dim=1) / exact_TN.float().norm(dim=1).clamp_min(TINY)
        self.errors.setdefault(direction, []).append(relative_T.mean())
        if bias_N is not None:
            exact_TN += bias_N
        return exact_TN if term is None else _with_term(exact_TN, term, firsts)

    def mean_errors(self) -> dict[Direction, float]:
        """Return the error of each direction in the mean over products."""
        return {direction: float(torch.stack(found).mean()) for direction, found in self.errors.items()}


def _with_term(y_TN: Tensor, term: LowRank, firsts: tuple[int, ...]) -> Tensor:
    """Return y plus the term of each of the layers that begin at `firsts`, in place."""
    rank, ends = term.b_FR.shape[1], (0, *firsts, y_TN.shape[1])
    for i, (first, after) in enumerate(pairwise(ends)):
        y_TN[:, first:after].addmm_(term.low_TR[:, i * rank : (i + 1) * rank], term.b_FR[first:after].t())
    return y_TN
