"""Count the bytes of the tensors that live in the MLP of a fused decoder layer. No torch.

Each method stands for the function of that name in engine/layers/mlp.py, as engine/memory/layer_memory.py
tells. The per-layer input behind the MLP (the `tail`) belongs to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Self

from engine.config.matmul import FORMS, Matmul
from engine.memory.layer_walk import LayerWalk
from engine.memory.live_bytes import BOUNDARY, TRANSIENT, WEIGHTS
from engine.shape.families import INPUT_GATE, INPUT_PROJECTION
from engine.shape.layer_plan import kept_name
from engine.shape.mixer_shape import MIXER


class MlpWalk(LayerWalk):
    """The MLP's part of a walk."""

    @property
    def _mlp_groups(self) -> list[str]:
        return [group for group in self.shape.groups if group not in ("qkv", "o", MIXER)]

    @contextmanager
    def _tile(self, backward: bool) -> Iterator[Self]:
        """Yield the pass through one tile of the MLP; what its products read lives through all tiles."""
        mine, mode = self._mlp_groups, self.plan.matmul
        is_unread = backward and mode.is_int8_backward and not self._norms("mlp").after
        forward = [group for group in mine if not (is_unread and group == "down")]
        size = sum(self._codes(group, "forward") if mode.is_int8_forward else self._weights(group) for group in forward)
        size += sum(self._codes(group, "backward") for group in mine) if backward and mode.is_int8_backward else 0
        held = {kept_name(group, form) for group in mine for form in FORMS}
        with self.live.holding(size, WEIGHTS):
            yield replace(self, sizes=self.sizes.tile, plan=replace(self.plan, cached=self.plan.cached | held))
            self.live.drop("tile", *map(self._own, ("gate_up", "tail_gate", "down_out", *(f"low.{group}" for group in mine))))

    def _mlp(self, output: str, kept: str) -> None:
        """Walk the MLP; `kept` is the component of gate, up and, with a norm after, down's output."""
        self._gate_up(kept, self._forward_needs("gate_up", self.sizes.x))
        self._down(output, kept)
        self._tail(kept)

    def _gate_up(self, kept: str, needs: int) -> None:
        s = self.sizes
        with self.live.holding(needs, WEIGHTS):
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

    def _tail(self, kept: str) -> None:
        """Walk the per-layer input; the layer's output is changed in place."""
        s = self.sizes
        if s.p:
            self._project(INPUT_GATE, s.x, self._own("tail_gate"), s.p, kept)
            with self.live.holding(s.p):
                self._project(INPUT_PROJECTION, s.p, "tail_out", s.x)
            self.live.briefly(s.x)
            self.live.drop("tail_out")

    def _mlp_gradient(self, output: str) -> None:
        live, s, mode = self.live, self.sizes, self.plan.matmul
        weights = self._weights("gate_up")
        with live.holding(0 if mode.is_int8_backward else weights, WEIGHTS):
            if self._own("gate_up") not in live.alive:
                with live.holding(weights if mode is Matmul.INT8_BACKWARD else 0, WEIGHTS):
                    self._gate_up(TRANSIENT, self._forward_needs("gate_up", s.x) if mode.is_int8_forward else 0)
                    if self._norms("mlp").after:
                        self._down("unused", TRANSIENT)
                        live.drop("unused")
            if self.shape.layer.scalar:
                self._tail_gradient()
            self._hold_branch_gradient("ddown", "mlp")
            live.drop(self._own("down_out"))
            self._activation_backward()
            unread = 0 if "codes of dgate_up" in live.alive else s.gate_up
            self._group_backward("gate_up", s.x, unread, "dnormed", weights_are_there=not mode.is_int8_backward)
            live.drop("codes of dgate_up")
            self._hold_input_gradient(output, "mlp")
        live.drop("dnormed", "ddown", "dh", self._own("gate_up"))

    def _tail_gradient(self) -> None:
        """Walk from dy to dh, the gradient of the residual stream before the tail."""
        live, s, group = self.live, self.sizes, INPUT_GATE
        live.hold("dh", s.x)  # dy times the scalar
        if not s.p:
            return
        if self._own("tail_gate") not in live.alive or self.plan.ranks[group]:
            live.hold("h", s.x)
        again = self._own("tail_gate") not in live.alive
        if again:
            self._project(group, s.x, self._own("tail_gate"), s.p)
        live.hold("tail_hidden", s.p)
        self._project(INPUT_PROJECTION, s.p, "tail_out", s.x)
        live.briefly(s.x if again else 0)
        live.hold("tail_dout", s.x)
        self._group_backward(INPUT_PROJECTION, s.p, s.x, "tail_dhidden")
        live.hold("tail_dinput", s.p)
        self._group_backward(group, s.x, s.p, "dh of the tail")
        live.drop(self._own("tail_gate"), *(f"tail_{name}" for name in ("hidden", "out", "dout", "dhidden", "dinput")))
        live.rename("dh of the tail", "dh")
        live.drop("h")

    def _activation_backward(self) -> None:
        live, s = self.live, self.sizes
        with live.holding(self.plan.ranks["down"] * s.low):
            with live.holding(self._backward_needs("down", s.x), WEIGHTS):
                live.hold("dhidden", s.f)
            if self.plan.matmul.is_int8_backward and (self.plan.matmul.is_int8_forward or not self.plan.ranks["gate_up"]):
                live.hold("codes of dgate_up", s.gate_up // s.element)  # the kernel of the activation makes them
            self._low("down", s.f)
            self._adapter_gradients("down", s.f)
            live.drop("dhidden")
