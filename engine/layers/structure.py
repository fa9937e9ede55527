"""Define the parts of a fused decoder layer: norms, specs of its halves, call, saved tensors.

Shape letters: T tokens, D hidden, H heads, K head dim, R features of a head that rotate.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from engine.config.targets import EXPERTS
from engine.kernels import ops
from engine.kernels.eight_bit.int8_ops import Int8Rows
from engine.layers.attention import AttentionOptions, Documents
from engine.layers.host_stash import HostStash
from engine.layers.library.library_mixer import LibraryMixer
from engine.layers.library.library_module import LibraryModule
from engine.layers.projection_group import ProjectionGroup, Weights
from engine.shape.mixer_shape import MIXER
from engine.shape.policies import Policy

Gradients = dict[str, tuple[Tensor, ...]]
"""Gradients of the adapters, by group."""


@dataclass(frozen=True)
class Norm:
    """RMSNorm: x / rms(x) * (offset + weight), as `ops.rms_norm` defines it.

    A row is as wide as the weight. Heads [T, H, K] are one row each with a weight of K values, and
    one row together with a weight of H * K.
    """

    weight: Tensor
    eps: float
    offset: float
    round_once: bool = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalised x and the reciprocal root mean square of each row, [rows]."""
        y, rstd = ops.rms_norm(self._rows(x), self.weight, self.eps, self.offset, self.round_once)
        return y.view(x.shape), rstd

    def backward(self, dy: Tensor, x: Tensor, rstd: Tensor, residual: Tensor | None = None) -> Tensor:
        rows = (self._rows(t) for t in (dy, x))
        extra = None if residual is None else self._rows(residual)
        return ops.rms_norm_backward(*rows, self.weight, rstd, self.offset, extra).view(x.shape)

    def _rows(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.weight.shape[0])


def normalize(x: Tensor, norm: Norm) -> Tensor:
    """Return the normalised x [..., D]. Differentiable in x."""
    return _Normalize.apply(x, norm) if torch.is_grad_enabled() else norm.forward(x)[0]


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> Tensor:
        y, rstd = norm.forward(x)
        ctx.save_for_backward(x, rstd)
        ctx.norm = norm
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        x, rstd = ctx.saved_tensors
        return ctx.norm.backward(dy, x, rstd), None


@dataclass(frozen=True, kw_only=True)
class HalfSpec:
    """The frame of a half: x + multiplier * after(half(before(x))). Missing parts are None."""

    before: Norm | None = None
    after: Norm | None = None
    multiplier: float | None = None

    def enter(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the input of the half and the norm's rstd."""
        return (x, None) if self.before is None else self.before.forward(x)

    def inner_gradient(self, dy: Tensor, out: Tensor | None, rstd: Tensor | None) -> Tensor:
        """Return the gradient of the half's output before norm and multiplier; may be dy itself."""
        if self.after is None:
            return dy if self.multiplier is None else dy * self.multiplier
        dout = self.after.backward(dy, out, rstd)
        return dout if self.multiplier is None else dout.mul_(self.multiplier)

    def input_gradient(self, dnormed: Tensor, x: Tensor, rstd: Tensor | None, dy: Tensor) -> Tensor:
        """Return the gradient of x, with dy through the residual stream. It may overwrite dnormed."""
        if self.before is None:
            return dnormed.add_(dy)
        return self.before.backward(dnormed, x, rstd, residual=dy)


@dataclass(frozen=True, kw_only=True)
class AttentionSpec(HalfSpec):
    """The attention half.

    - features: output features of the qkv group that are queries, keys and values. Without some
      for values, they are the keys as projected. Without some for keys, keys and values come from
      an earlier layer, normalised and rotated.
    - stores: True if later layers read its keys and values.
    - norms_rotated: q_norm and k_norm follow the rotation instead of preceding it.
    - rotary: which features turn together; None without rotation.
    - query_scale: how queries grow with their position in the sample.
    - output_gate: True if each head's queries are followed by a gate, whose sigmoid scales its output.
    - sinks: a score of each head that belongs to no token. half_tables: cos and sin come without
      their second, equal half.
    """

    head_dim: int
    features: tuple[int, int, int]
    options: AttentionOptions
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    norms_rotated: bool = False
    v_norm: Norm | None = None
    stores: bool = False
    rotary: Literal["halves", "pairs"] | None = "halves"
    query_scale: QueryScale | None = None
    output_gate: bool = False
    sinks: Tensor | None = None
    half_tables: bool = False

    @property
    def reads(self) -> bool:
        """Return True if keys and values come from an earlier layer."""
        return self.features[1] == 0


@dataclass(frozen=True, kw_only=True)
class MixerSpec(HalfSpec):
    """The half whose token mixer is the library's own module, under this name in the layer."""

    name: str
    reads: ClassVar[bool] = False
    stores: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class MlpSpec(HalfSpec):
    """The MLP half: down(activation(gate) * up)."""

    activation: str


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec(HalfSpec):
    """The MLP half that is a mixture: the library's own block of router and experts, under this name in the layer."""

    name: str


@dataclass(frozen=True)
class QueryScale:
    """Multiply queries by 1 + beta * log(1 + position // length), as Llama 4 does.

    The position is that within the sample, so samples of up to `length` tokens stay as they are.
    """

    beta: float
    length: int

    def factors(self, position_ids: Tensor) -> Tensor:
        """Return the factor of each position, in fp32."""
        return 1 + self.beta * torch.log(1 + torch.floor(position_ids / self.length))


@dataclass(frozen=True)
class TailSpec:
    """What follows the MLP half: scalar * (h + norm(projection(activation(gate(h)) * input))).

    `input` is the layer's own embedding of each token. Without a norm there is only the scalar.
    """

    norm: Norm | None = None
    activation: str = ""
    scalar: Tensor | None = None


@dataclass(frozen=True)
class LayerSpec:
    """The part of a layer that calls do not change: two halves, one after the other, and a tail.

    groups: the paths of each group's projections, from the decoder layer on.
    """

    attention: AttentionSpec | MixerSpec
    mlp: MlpSpec | ExpertsSpec
    groups: dict[str, tuple[str, ...]]
    tail: TailSpec | None = None


@dataclass
class Call:
    """One pass through one layer.

    `groups` are its projections. `cos_TR`, `sin_TR` and `documents` place the tokens; only the
    first R features of a head rotate. `query_factors_T` scale the queries. The policies on the host
    store in `stash`. `shared` are keys and values [T, G, K] of an earlier layer. `input_TP` is the
    layer's own embedding of each token. `mixer` and `block` are the library's token mixer and experts,
    if the spec asks for them, and their seeds decide the dropout inside.
    """

    spec: LayerSpec
    policy: Policy
    groups: dict[str, ProjectionGroup]
    cos_TR: Tensor | None
    sin_TR: Tensor | None
    documents: Documents
    stash: HostStash
    query_factors_T: Tensor | None = None
    shared: tuple[Tensor, ...] = ()
    input_TP: Tensor | None = None
    mixer: LibraryMixer | None = None
    mixer_seed: int | None = None
    block: LibraryModule | None = None
    block_seed: int | None = None

    @property
    def ordered(self) -> list[str]:
        """Return the names of what is adapted, in the order of the adapters."""
        first, last = [MIXER] * (self.mixer is not None), [EXPERTS] * (self.block is not None)
        return [*first, *self.groups, *last]


@dataclass
class Saved:
    """The intermediates between forward and backward.

    - `x` is the layer's input; under OFFLOAD and HOST it becomes its number in the stash.
    - `q`, `k`, `v` are as projected, but rotated in place if the family has no q and k norms.
    - `attention` is the small autograd graph of attention or mixer: its leaves and its output. Under HOST
      `graph` holds what that graph saved, and `inputs` the queries, keys and values that it reads.
    - `block` is that of the block of experts, in the same form.
    - `low` holds each group's low-rank hidden, which all policies but OFFLOAD keep.
    - `stored` are the keys and values that later layers read.
    - `dinput` receives the gradient of the layer's own embedding, if it is wanted.
    """

    x: Tensor | int
    low: dict[str, Tensor | None] = field(default_factory=dict)
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    gate: Tensor | None = None
    attention: tuple[Tensor, ...] = ()
    block: tuple[Tensor, ...] = ()
    graph: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    o_out: Tensor | None = None
    x_mid: Tensor | None = None
    gate_up: Tensor | None = None
    tail_gate: Tensor | None = None
    stored: tuple[Tensor, ...] = ()
    dinput: Tensor | None = None
    down_out: Tensor | None = None
    rstd: dict[str, Tensor] = field(default_factory=dict)
    normed: Tensor | None = None  # normalised x, within one pass only

    def kept(self) -> list[Tensor]:
        """Return all tensors but x and the vectors of one value a token."""
        single = (self.q, self.k, self.v, self.gate, self.o_out, self.x_mid, self.gate_up, self.tail_gate, self.down_out)
        return [t for t in (*single, *self.attention, *self.graph, *self.low.values()) if t is not None]


def project(name: str, x: Tensor, call: Call, saved: Saved) -> Tensor:
    """Return a group's output [T, O], with its adapters."""
    return call.groups[name].forward(x, low_rank_hidden(name, x, call, saved))


def low_rank_hidden(name: str, x: Tensor, call: Call, saved: Saved) -> Tensor | None:
    """Return a group's low-rank hidden [T, R]; compute and save it if it is not saved."""
    if name not in saved.low:
        saved.low[name] = call.groups[name].low(x)
    return saved.low[name]


def group_backward(
    name: str,
    dy: Tensor,
    x: Tensor,
    call: Call,
    saved: Saved,
    grads: Gradients,
    weights: Weights | None = None,
    wants_dx: bool = True,
    rows: Int8Rows | None = None,
) -> Tensor | None:
    """Set a group's adapter gradients in `grads`; return the gradient of x [T, D] if wanted.

    rows: dy's codes, if there are some.
    """
    group = call.groups[name]
    dlow = group.low_gradient(dy)
    grads[name] = group.adapter_gradients(dy, dlow, x, saved.low[name])
    return group.input_gradient(dy, dlow, weights, rows) if wants_dx else None
