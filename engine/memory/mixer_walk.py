"""Count the bytes that live around a library's token mixer in a fused decoder layer. No torch.

Each method stands for the function of that name in engine/layers/library/mixer_half.py. The mixer itself is
an estimate (engine/memory/mixer_bytes.py).
"""

from __future__ import annotations

from engine.memory.layer_walk import LayerWalk
from engine.memory.live_bytes import KEPT, TRANSIENT
from engine.shape.mixer_shape import MIXER
from engine.shape.policies import Policy

MIXERS = "linear attention"


class MixerWalk(LayerWalk):
    """The mixer's part of a walk."""

    def _mixer_half(self, graph: bool) -> None:
        self.live.hold("normed", self._normed("attention"))
        if graph and self.plan.policy is not Policy.HOST:
            self._with_graph(KEPT if self.plan.policy.keeps_attention else MIXERS)
            return
        with self.live.holding(self._largest_weight()):
            self.live.briefly(self.sizes.mixer.alone, MIXERS)
        self.live.hold("delta", self.sizes.x)
        self.live.drop("normed")

    def _with_graph(self, component: str) -> None:
        """Keep what the mixer's graph saves; its input is the normalised input, its output the delta."""
        self.live.hold(self._own("mixer"), self.sizes.mixer.graph + self._adapter_bytes(), component)
        if "normed" in self.live.alive:
            self.live.rename("normed", self._own("mixer input"))
        with self.live.holding(self._largest_weight()):
            self.live.briefly(self.sizes.mixer.extra, MIXERS)

    def _mixer_gradient(self) -> None:
        live, plan = self.live, self.plan
        if not plan.needs_dx and not plan.ranks[MIXER]:
            return live.drop(self._own("mixer"), self._own("mixer input"))
        if self._own("mixer") not in live.alive:
            live.hold("normed", self._normed("attention"))
            self._with_graph(TRANSIENT)
        live.hold("grads.mixer", 4 * plan.adapter[MIXER])
        with live.holding(self._largest_weight()):
            live.briefly(self.sizes.mixer.extra, MIXERS)
        live.drop(self._own("mixer"), self._own("mixer input"))
        live.hold("dnormed", self.sizes.x)
        if plan.needs_dx:
            self._hold_input_gradient("dx", "attention")
        live.drop("dnormed")

    def _largest_weight(self) -> int:
        """Return the bytes of the largest dequantised weight: each linear layer dequantises its own."""
        features = self.shape.mixer.projections(self.shape.hidden_size).values()
        return self.sizes.element * max(out * width for out, width in features) if self.sizes.packed else 0

    def _adapter_bytes(self) -> int:
        """Return what the adapters add to the graph: casts, hidden [T, R], with dropout masks and masked inputs.

        With DoRA they add both of what each output's gain multiplies.
        """
        s, plan = self.sizes, self.plan
        if not plan.ranks[MIXER]:
            return 0
        inputs = 4 * s.x + s.element * s.tokens * self.shape.mixer.values
        masked = 2 * inputs if self.dropout else 0
        outs = sum(out for out, _ in self.shape.mixer.projections(self.shape.hidden_size).values())
        gained = 2 * s.element * s.tokens * outs if plan.dora else 0
        return 2 * plan.ranks[MIXER] * s.low + s.element * plan.adapter[MIXER] + masked + gained
