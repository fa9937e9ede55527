"""Count the bytes of the tensors that live in one pass through a fused decoder layer. No torch.

Each method of `Pass` stands for the function of that name in engine/layers (decoder_layer, mlp,
structure), and allocates and frees in the same order. If you change a tensor's life there, change
it here too: a test compares both. Vectors of one value a token (rstd) and the allocator's rounding
are left out.
"""

from __future__ import annotations

from engine.memory.experts_walk import ExpertsWalk
from engine.memory.live_bytes import ATTENTION, BOUNDARY, KEPT, TRANSIENT
from engine.memory.mixer_walk import MixerWalk
from engine.memory.mlp_walk import MlpWalk
from engine.shape.policies import Policy


class Pass(MlpWalk, MixerWalk, ExpertsWalk):
    """One pass through a layer."""

    def forward(self, trains: bool) -> None:
        """Walk from x to y, the next layer's x; `trains` says that a backward pass follows."""
        self.on_device(trains)
        if trains:
            self.to_host()

    def on_device(self, trains: bool) -> None:
        """Walk forward, but store nothing on the host."""
        live, s, policy = self.live, self.sizes, self.plan.policy
        graph = trains and policy.keeps_attention
        keeps_mlp = trains and (policy is Policy.KEEP or (policy is Policy.HOST and self._is_whole))
        self._to_mlp(graph)
        y = f"{self.i + 1}.x"
        if self.shape.experts is not None:
            self._experts_half(y, KEPT if keeps_mlp else TRANSIENT, keeps_mlp)
        elif keeps_mlp or s.tile is None:
            self._mlp(y, KEPT if keeps_mlp else TRANSIENT)
        else:
            live.hold(y, s.x, BOUNDARY)
            with self._tile(backward=False) as tile:
                tile._mlp("tile", TRANSIENT)
        live.drop("normed", "normed_mlp")
        output_alone = trains and self._keeps_output_alone()
        if not graph or output_alone:
            live.drop(*map(self._own, ("qkv", "rotated", "keys", "o_out", "x_mid", "rstd")))
        if not keeps_mlp:
            live.drop(*map(self._own, ("gate_up", "tail_gate", "down_out")))
        if not trains or policy is Policy.OFFLOAD or output_alone:
            live.drop(*(self._own(f"low.{group}") for group in self.plan.ranks))
        if not trains:
            live.drop(self._own("x"))

    def to_host(self) -> None:
        """Store what the layer keeps, if its policy says so; free what layers before it have stored by now."""
        self.host_stack.advance()
        if self.plan.policy.is_on_host:
            self.host_stack.push([name for name in self._names() if name != self._own("rstd")])

    def backward(self) -> None:
        """Walk from dy to dx, which is renamed dy; no tensor of the layer is left."""
        self.from_host()
        self.on_device_backward()

    def from_host(self) -> None:
        """Bring back what the layer stored on the host."""
        if self.plan.policy.is_on_host:
            self.host_stack.pop()

    def on_device_backward(self) -> None:
        """Walk backward, with all that the layer kept on the device."""
        live = self.live
        if self.plan.needs_dinput:
            live.hold("dinput", self.sizes.p)
        self._mlp_backward()
        live.drop(self._own("x_mid"))
        gradient = self._attention_backward if self.shape.mixer is None else self._mixer_gradient
        gradient()
        grads = [name for name in live.alive if name.startswith("grads.")]
        live.drop(*self._names(), *grads, "normed", "dx_mid")
        live.rename("dx", "dy")
        if self.plan.needs_dinput:  # selecting a layer's part makes a gradient of all parts
            live.hold("dinputs", self.sizes.inputs)
            live.briefly(self.sizes.inputs)
            live.drop("dinput")

    def _to_mlp(self, graph: bool) -> None:
        """Make x_mid, and normed_mlp, which is x_mid normalised."""
        half = self._attention_half if self.shape.mixer is None else self._mixer_half
        half(graph)
        self.live.hold(self._own("x_mid"), self.sizes.x, self._component(graph))
        self.live.hold("normed_mlp", self._normed("mlp"))
        self.live.drop("delta")

    def _keeps_output_alone(self) -> bool:
        """Return True if the layer keeps its input and attention's output, and makes the rest again."""
        return self.plan.policy is Policy.HOST and not self._is_whole and self.shape.mixer is None

    @property
    def _is_whole(self) -> bool:
        """Return True if the MLP may be kept on the host: it runs in one piece, and is no mixture."""
        return self.sizes.tile is None and self.shape.experts is None

    def _component(self, graph: bool) -> str:
        """Return the component of what backward passes read: kept, or made again for one pass."""
        return KEPT if graph and self.plan.policy.keeps_attention else TRANSIENT

    def _attention_half(self, graph: bool) -> None:
        live, s = self.live, self.sizes
        component = self._component(graph)
        gated = s.q if self.shape.layer.output_gate else 0
        if self._own("attention") not in live.alive:
            self._attend(component, graph)
        elif gated:
            self._queries_keys_values(component, graph)
        live.briefly(2 * gated)
        with live.holding(gated):
            self._project("o", s.q, "delta", s.x)
        if not graph:
            live.drop(*map(self._own, ("attention", "rotated", "keys")))
        if self._norms("attention").after:
            live.drop("delta")
            live.hold(self._own("o_out"), s.x, component)
            live.hold("delta", s.x)

    def _attend(self, component: str, graph: bool) -> None:
        live, s = self.live, self.sizes
        self._queries_keys_values(component, graph)
        if self.attention == "eager":
            live.briefly(12 * s.sample_scores, ATTENTION)  # scores, masked scores and weights, fp32
        kept = s.eager_graph if graph and self.attention == "eager" else 0
        live.hold(self._own("attention"), s.q + s.heads + kept, component)

    def _queries_keys_values(self, component: str, graph: bool) -> None:
        live, s = self.live, self.sizes
        live.hold("normed", self._normed("attention"))
        self._project("qkv", s.x, self._own("qkv"), s.qkv, component)
        if self.shape.layer.qk_norm != "none":
            rstd = s.heads if self.shape.layer.qk_norm == "head" else 0
            live.hold(self._own("rotated"), s.q, component)
            live.hold(self._own("rstd"), rstd, component)
            self._keys(rstd, component, graph)

    def _keys(self, rstd: int, component: str, graph: bool) -> None:
        """Make normalised keys, and values if their norm makes new ones; others may read them.

        Those of a layer that keeps none for itself are lent: they go with the backward pass of the
        first layer that reads them.
        """
        s, shape = self.sizes, self.shape
        if shape.keys == "shared":
            return
        number = 2 if shape.layer.normalises_values else 1
        self.live.hold(self._own("rstd"), rstd + number * rstd * s.k // s.q, component)
        own = self._own("keys") if shape.source is None else f"{'' if graph else 'lent '}keys of {self.i}"
        self.live.hold(own, number * s.k, component if shape.source is None else BOUNDARY)

    def _mlp_backward(self) -> None:
        live, s = self.live, self.sizes
        if self._own("x_mid") not in live.alive:
            self._to_mlp(graph=True)
        else:
            live.hold("normed_mlp", self._normed("mlp"))
        if self.shape.experts is not None:
            self._experts_gradient("dx_mid")
        elif s.tile is None or self._own("gate_up") in live.alive:
            self._mlp_gradient("dx_mid")
        else:
            live.hold("dx_mid", s.x)
            sums = 4 * sum(self.plan.adapter[group] for group in self._mlp_groups)
            with live.holding(sums), self._tile(backward=True) as tile:  # gradients over the tiles before
                tile._mlp_gradient("tile")
        live.drop("normed_mlp")

    def _attention_backward(self) -> None:
        live, s, plan = self.live, self.sizes, self.plan
        self._hold_branch_gradient("ddelta", "attention")
        if not plan.needs_dx and not plan.ranks["qkv"]:
            return live.drop("ddelta")
        self._gate_backward()
        if self._own("qkv") not in live.alive:
            self._queries_keys_values(TRANSIENT, graph=True)
        live.hold("dqkv", s.q + 2 * s.k)
        live.briefly({"eager": s.eager_workspace, "tiled": s.tiled_workspace}.get(self.attention, s.flash_workspace), ATTENTION)
        if self._keeps_output_alone():
            live.drop(*map(self._own, ("rotated", "keys")))
        if self.shape.layer.qk_norm != "none":
            copies = self.shape.layer.qk_norm == "head" and self.shape.keys != "shared"  # rows beside those of keys
            live.briefly(2 * s.q if copies else s.q)
        self._shared_gradients()
        if self.shape.layer.output_gate:  # gradients of queries and gates are laid head by head
            live.hold("dq and dgate", 2 * s.q)
            live.drop("dqkv")
            live.hold("dqkv", 2 * s.k)
        if "normed" not in live.alive:
            live.hold("normed", self._normed("attention"))
        live.hold("dqkv_cat", s.qkv)
        if plan.needs_dx:
            self._group_backward("qkv", s.x, s.qkv, "dnormed")
            self._hold_input_gradient("dx", "attention")
        live.drop("ddelta", "dout", "dqkv", "dqkv_cat", "dnormed", "gated", "dgate", "dq and dgate")
        if self.shape.source == self.i:
            live.drop(f"keys of {self.i}", f"dkeys of {self.i}")

    def _gate_backward(self) -> None:
        """Walk from the gradient of the half's output to those of attention's output and its gate."""
        live, gated = self.live, self.sizes.q if self.shape.layer.output_gate else 0
        live.hold("gated", gated)
        live.briefly(gated)
        self._group_backward("o", self.sizes.q, self.sizes.x, "dout")
        live.hold("dgate", gated)
        live.briefly(3 * gated)

    def _shared_gradients(self) -> None:
        """Hand on, or take up, the gradients of keys and values that layers share."""
        live, s, source = self.live, self.sizes, self.shape.source
        if source == self.i:
            live.briefly(s.k)
        elif source is not None:
            live.hold("dqkv", s.q)
            live.hold(f"dkeys of {source}", 2 * s.k)
            live.briefly(2 * s.k)
            if self.shape.reads_first:
                live.drop(f"lent keys of {source}")
