"""Count the bytes of the tensors that live in one pass through a fused decoder layer. No torch.

Each method of `Pass` stands for the function of that name in engine/layers (decoder_layer, mlp,
structure), and allocates and frees in the same order. If you change a tensor's life there, change
it here too: a test compares both. Vectors of one value a token (rstd) and the allocator's rounding
are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from engine.planning.families import HalfNorms
from engine.planning.layer_plan import LayerPlan
from engine.planning.live_bytes import ATTENTION, BOUNDARY, KEPT, LOW, TRANSIENT, WEIGHTS, HostStack, LiveBytes, Sizes
from engine.planning.model_shape import ModelShape
from engine.planning.policies import Policy

AttentionName = Literal["flash", "cudnn", "eager"]
HalfName = Literal["attention", "mlp"]


@dataclass(frozen=True)
class Pass:
    """One pass through layer `i` of a model of this shape."""

    i: int
    plan: LayerPlan
    shape: ModelShape
    sizes: Sizes
    attention: AttentionName
    dropout: bool
    live: LiveBytes
    host_stack: HostStack

    def forward(self, trains: bool) -> None:
        """Walk from x to y, the next layer's x; `trains` says that a backward pass follows."""
        live, s, policy = self.live, self.sizes, self.plan.policy
        graph = trains and policy.keeps_attention
        keeps_mlp = trains and (policy is Policy.KEEP or (policy is Policy.HOST and s.tile is None))
        self._to_mlp(graph)
        y = f"{self.i + 1}.x"
        if keeps_mlp or s.tile is None:
            self._mlp(y, KEPT if keeps_mlp else TRANSIENT)
        else:
            live.hold(y, s.x, BOUNDARY)
            with self._tile() as tile:
                tile._mlp("tile", TRANSIENT)
        live.drop("normed", "normed_mlp")
        if not graph:
            live.drop(*map(self._own, ("qkv", "o_out", "x_mid")))
        if not keeps_mlp:
            live.drop(*map(self._own, ("gate_up", "down_out")))
        if not trains or policy is Policy.OFFLOAD:
            live.drop(*(self._own(f"low.{group}") for group in self.plan.ranks))
        if not trains:
            return live.drop(self._own("x"))
        self.host_stack.advance()
        if policy.is_on_host:
            self.host_stack.push(self._names())

    def backward(self) -> None:
        """Walk from dy to dx, which is renamed dy; no tensor of the layer is left."""
        live = self.live
        if self.plan.policy.is_on_host:
            self.host_stack.pop()
        self._mlp_backward()
        live.drop(self._own("x_mid"))
        self._attention_backward()
        grads = [name for name in live.alive if name.startswith("grads.")]
        live.drop(*self._names(), *grads, "normed", "dx_mid")
        live.rename("dx", "dy")

    def _to_mlp(self, graph: bool) -> None:
        """Make x_mid, and normed_mlp, which is x_mid normalised."""
        self._attention_half(graph)
        self.live.hold(self._own("x_mid"), self.sizes.x, self._component(graph))
        self.live.hold("normed_mlp", self._normed("mlp"))
        self.live.drop("delta")

    def _normed(self, half: HalfName) -> int:
        """Return the bytes of a half's normalised input: 0 if no norm stands before the half."""
        return self.sizes.x if self._norms(half).before else 0

    def _norms(self, half: HalfName) -> HalfNorms:
        return self.shape.layer.attention if half == "attention" else self.shape.layer.mlp

    def _hold_branch_gradient(self, name: str, half: HalfName) -> None:
        """Make the gradient of what norm and multiplier after a half received, if there is one."""
        if self._norms(half).after or self.shape.layer.multiplier:
            self.live.hold(name, self.sizes.x)

    def _hold_input_gradient(self, name: str, half: HalfName) -> None:
        """Make the gradient of a half's input; without a norm before it, in place of `dnormed`."""
        if self._norms(half).before:
            self.live.hold(name, self.sizes.x)
        else:
            self.live.rename("dnormed", name)

    @contextmanager
    def _tile(self) -> Iterator[Pass]:
        """Yield the pass through one tile of the MLP; the weights live through all tiles."""
        mine = ("gate_up", "down")
        with self.live.holding(sum(map(self._weights, mine)), WEIGHTS):
            yield replace(self, sizes=self.sizes.tile, plan=replace(self.plan, cached=self.plan.cached.union(mine)))
            self.live.drop("tile", *map(self._own, ("gate_up", "down_out", "low.gate_up", "low.down")))

    def _component(self, graph: bool) -> str:
        """Return the component of what backward passes read: kept, or made again for one pass."""
        return KEPT if graph and self.plan.policy.keeps_attention else TRANSIENT

    def _names(self) -> list[str]:
        """Return the names of the layer's tensors that are alive."""
        return [name for name in self.live.alive if name.startswith(self._own(""))]

    def _own(self, tensor: str) -> str:
        return f"{self.i}.{tensor}"

    def _attention_half(self, graph: bool) -> None:
        live, s = self.live, self.sizes
        component = self._component(graph)
        live.hold("normed", self._normed("attention"))
        self._project("qkv", s.x, self._own("qkv"), s.qkv, component)
        if self.shape.layer.qk_norm != "none":
            rstd = s.heads + s.heads * s.k // s.q if self.shape.layer.qk_norm == "head" else 0
            live.hold(self._own("rotated"), s.q + s.k + rstd, component)
        if self.attention == "eager":
            live.briefly(12 * s.sample_scores, ATTENTION)  # scores, masked scores and weights, fp32
        live.hold(self._own("attention"), s.q + s.heads + (self._eager_graph() if graph else 0), component)
        self._project("o", s.q, "delta", s.x)
        if not graph:
            live.drop(self._own("attention"), self._own("rotated"))
        if self._norms("attention").after:
            live.drop("delta")
            live.hold(self._own("o_out"), s.x, component)
            live.hold("delta", s.x)

    def _eager_graph(self) -> int:
        """Return the bytes that autograd keeps of eager attention.

        They are tanh and softmax in fp32, the rounded weights, and keys and values repeated for all
        heads.
        """
        s = self.sizes
        repeated = 2 * s.q if s.q != s.k else 0
        return (8 + s.element) * s.scores + repeated if self.attention == "eager" else 0

    def _mlp(self, output: str, kept: str) -> None:
        """Walk the MLP; `kept` is the component of gate, up and, with a norm after, down's output."""
        self._gate_up(kept, self._weights("gate_up"))
        self._down(output, kept)

    def _gate_up(self, kept: str, weights: int) -> None:
        s = self.sizes
        with self.live.holding(weights, WEIGHTS):
            self.live.hold(self._own("gate_up"), 2 * s.f, kept)
            two = not s.packed and len(self.shape.groups["gate_up"]) == 2  # plain weights take a matmul each
            self.live.briefly(s.f if two else 0)
        self._low("gate_up", s.x)

    def _down(self, output: str, kept: str) -> None:
        s = self.sizes
        with self.live.holding(s.f):  # act(gate) * up
            self._project("down", s.f, output, s.x, BOUNDARY)
        if self._norms("mlp").after:
            self.live.drop(output)
            self.live.hold(self._own("down_out"), s.x, kept)
            self.live.hold(output, s.x, BOUNDARY)

    def _project(self, group: str, input_size: int, output: str, output_size: int, component: str = TRANSIENT) -> None:
        self._low(group, input_size)
        with self.live.holding(self._weights(group), WEIGHTS):
            self.live.hold(output, output_size, component)

    def _low(self, group: str, input_size: int) -> None:
        name, rank = self._own(f"low.{group}"), self.plan.ranks[group]
        if rank and name not in self.live.alive:
            self._dropped(group, input_size)
            self.live.hold(name, rank * self.sizes.low, LOW)

    def _dropped(self, group: str, input_size: int) -> None:
        """Make the dropout mask and the masked input for a moment."""
        if self.dropout and self.plan.ranks[group]:
            self.live.briefly(2 * input_size)

    def _weights(self, group: str) -> int:
        return 0 if group in self.plan.cached else self.sizes.weights[group]

    def _mlp_backward(self) -> None:
        live, s = self.live, self.sizes
        if self._own("x_mid") not in live.alive:
            self._to_mlp(graph=True)
        else:
            live.hold("normed_mlp", self._normed("mlp"))
        if s.tile is None or self._own("gate_up") in live.alive:
            self._mlp_gradient("dx_mid")
        else:
            live.hold("dx_mid", s.x)
            with self._tile() as tile:
                tile._mlp_gradient("tile")
        live.drop("normed_mlp")

    def _mlp_gradient(self, output: str) -> None:
        live, s = self.live, self.sizes
        with live.holding(self._weights("gate_up"), WEIGHTS):
            if self._own("gate_up") not in live.alive:
                self._gate_up(TRANSIENT, weights=0)
                if self._norms("mlp").after:
                    self._down("unused", TRANSIENT)
                    live.drop("unused")
            self._hold_branch_gradient("ddown", "mlp")
            live.drop(self._own("down_out"))
            self._activation_backward()
            self._group_backward("gate_up", s.x, "dnormed", weights_are_there=True)
            self._hold_input_gradient(output, "mlp")
        live.drop("dnormed", "ddown", self._own("gate_up"))

    def _activation_backward(self) -> None:
        live, s = self.live, self.sizes
        with live.holding(self.plan.ranks["down"] * s.low):
            with live.holding(self._weights("down"), WEIGHTS):
                live.hold("dhidden", s.f)
            self._dropped("down", s.f)
            self._low("down", s.f)
            live.hold("grads.down", 4 * self.plan.adapter["down"])
            live.drop("dhidden")

    def _group_backward(self, group: str, input_size: int, dx: str, weights_are_there: bool = False) -> None:
        with self.live.holding(self.plan.ranks[group] * self.sizes.low):
            self._dropped(group, input_size)
            self.live.hold(f"grads.{group}", 4 * self.plan.adapter[group])
            with self.live.holding(0 if weights_are_there else self._weights(group), WEIGHTS):
                self.live.hold(dx, input_size)
            self._dropped(group, input_size)

    def _attention_backward(self) -> None:
        live, s, plan = self.live, self.sizes, self.plan
        self._hold_branch_gradient("ddelta", "attention")
        if not plan.needs_dx and not plan.ranks["qkv"]:
            return live.drop("ddelta")
        self._group_backward("o", s.q, "dout")
        live.hold("dqkv", s.qkv)
        live.briefly(self._attention_workspace(), ATTENTION)
        if self.shape.layer.qk_norm != "none":
            live.briefly(s.q)
        if "normed" not in live.alive:
            live.hold("normed", self._normed("attention"))
        live.hold("dqkv_cat", s.qkv)
        if plan.needs_dx:
            self._group_backward("qkv", s.x, "dnormed")
            self._hold_input_gradient("dx", "attention")
        live.drop("ddelta", "dout", "dqkv", "dqkv_cat", "dnormed")

    def _attention_workspace(self) -> int:
        """Return the workspace of attention's backward pass.

        Flash attention and cuDNN need dq in fp32, dk and dv of each query head, and dout * out
        summed over K. Eager attention needs a sample's gradients of scores, and those of q and the
        repeated k and v, whole and in parts.
        """
        s = self.sizes
        if self.attention == "eager":
            return 12 * s.sample_scores + 6 * s.q
        expanded = 2 * s.q if s.q != s.k else 0
        return 4 * s.q // s.element + expanded + s.heads
