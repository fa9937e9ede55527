"""Count the bytes that live in the mixture of a fused decoder layer. No torch.

Each method stands for the function of that name in engine/layers/library/experts_half.py, with the
experts of engine/quant/frozen_experts.py inside. Room for dequantised experts belongs to the weight
cache. What the library's router and shared expert make is an estimate.

Shape letters: T tokens, K experts a token, S = T * K rows, E experts, D hidden, F expert hidden.
"""

from __future__ import annotations

from engine.config.targets import EXPERTS
from engine.memory.layer_walk import LayerWalk
from engine.memory.live_bytes import BOUNDARY, WEIGHTS
from engine.shape.experts_shape import SHARED

ROUTER_VALUES = 3  # tensors [T, E] in fp32 that a router makes at once
SHARED_HIDDEN = 4  # gate and up of a shared expert, the activation and the product
CHOICE_BYTES = 64  # of one choice of an expert: its index, weight, place and their sorting


class ExpertsWalk(LayerWalk):
    """The mixture's part of a walk."""

    def _experts_half(self, output: str, component: str, graph: bool) -> None:
        """Walk the block and make the layer's output. component: of what the graph keeps."""
        live, s = self.live, self.sizes
        self._block(component, reads_output=True)
        live.hold(output, s.x, BOUNDARY)
        if not graph:
            live.drop(*map(self._own, ("experts", "block out", "block input")))

    def _block(self, component: str, reads_output: bool) -> None:
        """Make what the graph of the block keeps: gate and up of each row, copies of the adapters, routing, its output."""
        live, s = self.live, self.sizes
        rows, hidden = self._rows
        values, ranks = self.plan.adapter[EXPERTS], self.plan.ranks[EXPERTS]
        with live.holding(self._router):
            kept = 2 * hidden + s.element * values + self._choices + ranks * self._choice_rows * s.element
            with live.holding(rows + self._shared_weight, WEIGHTS):
                live.hold(self._own("experts"), kept + self._router // ROUTER_VALUES + self._shared, component)
        if reads_output:
            live.briefly(hidden + rows + s.x)
        live.hold(self._own("block out"), s.x, component)
        live.rename("normed_mlp", self._own("block input"))

    def _experts_gradient(self, output: str) -> None:
        live, s, plan = self.live, self.sizes, self.plan
        rows, hidden = self._rows
        if self._own("experts") not in live.alive:
            self._block("transients", reads_output=False)
        self._hold_branch_gradient("ddelta", "mlp")
        with live.holding(2 * hidden):
            live.hold("grads.experts", 4 * plan.adapter[EXPERTS])
            live.briefly(rows + self._turned + plan.ranks[EXPERTS] * self._choice_rows * s.element)
            live.briefly(hidden)
        live.briefly(rows + 4 * plan.adapter[EXPERTS])
        live.briefly(rows + s.x)
        live.hold("dnormed", s.x)
        live.briefly(s.x + self._router)
        self._shared_gradient()
        live.drop(*map(self._own, ("experts", "block out", "block input")))
        self._hold_input_gradient(output, "mlp")
        live.drop("dnormed", "ddelta")

    @property
    def _turned(self) -> int:
        """Return the bytes of B's gradient of the down projection as it is turned, where both weights' do not cover it."""
        experts, rank = self.shape.experts, self.plan.ranks[EXPERTS]
        names = experts.weights(self.shape.hidden_size)
        both = experts.adapter_values(dict.fromkeys(names, rank // 2), self.shape.hidden_size)
        return 0 if self.plan.adapter[EXPERTS] == both else 4 * rank * experts.number * self.shape.hidden_size

    def _shared_gradient(self) -> None:
        """Walk the gradients of the shared expert: of its output, gate and up, and of the input."""
        s = self.sizes
        if self.shape.experts.shared:
            self.live.hold("grads.shared", 4 * self.plan.adapter[SHARED])
            self.live.briefly(2 * s.x + SHARED_HIDDEN * self._shared_hidden + self._shared_weight, WEIGHTS)

    @property
    def _shared(self) -> int:
        """Return the bytes that the graph of a shared expert keeps: its hidden, output and gated output, and its adapters."""
        s, plan = self.sizes, self.plan
        if not self.shape.experts.shared:
            return 0
        kept = SHARED_HIDDEN * self._shared_hidden + 2 * s.x
        if plan.ranks[SHARED]:
            kept += 2 * plan.ranks[SHARED] * s.low + s.element * plan.adapter[SHARED]
            kept += 2 * (2 * self._shared_hidden + s.x) if plan.dora else 0  # both of what each output's gain multiplies
        return kept + (2 * (3 * s.x + self._shared_hidden) if self.dropout and plan.ranks[SHARED] else 0)

    @property
    def _shared_hidden(self) -> int:
        """Return the bytes of the shared expert's hidden [T, F]."""
        return self.sizes.low * self.shape.experts.shared

    @property
    def _shared_weight(self) -> int:
        """Return the bytes of one of its weights while it is dequantised."""
        return self.sizes.element * self.shape.hidden_size * self.shape.experts.shared if self.sizes.packed else 0

    @property
    def _choice_rows(self) -> int:
        return self.shape.experts.active * self.sizes.tokens

    @property
    def _rows(self) -> tuple[int, int]:
        """Return the bytes of the rows [S, D], and of their hidden [S, F]."""
        number = self.sizes.element * self._choice_rows
        return number * self.shape.hidden_size, number * self.shape.experts.width

    @property
    def _router(self) -> int:
        return ROUTER_VALUES * 4 * self.sizes.tokens * self.shape.experts.number

    @property
    def _choices(self) -> int:
        return CHOICE_BYTES * self._choice_rows
