"""Walk through what decoder layers of the library allocate, where a trial does not fuse them. No torch."""

from __future__ import annotations

import math

from engine.config.matmul import Matmul
from engine.config.targets import EXPERTS
from engine.config.trial import TrainConfig
from engine.memory.experts_walk import CHOICE_BYTES, ROUTER_VALUES, SHARED_HIDDEN
from engine.memory.live_bytes import ATTENTION, BOUNDARY, KEPT, WEIGHTS, LiveBytes
from engine.memory.mixer_walk import MIXERS
from engine.memory.tensor_sizes import Sizes
from engine.shape.layer_plan import LayerPlan, adapted_projections, linear_layers
from engine.shape.library_bytes import MEASURED_RANK, LibraryBytes, PassBytes
from engine.shape.model_shape import ModelShape
from engine.shape.policies import Policy

# Bytes a trained value of one layer's experts: its gradient in fp32 as the kernels lay it out, and as PEFT does.
EXPERT_GRADIENT_BYTES = 8
IN_ATTENTION = ("qkv", "o")
"""Groups of linear layers that attention has."""


class LibraryWalk:
    """The part of a trial's walk that goes through layers as the library has them."""

    config: TrainConfig
    shape: ModelShape
    live: LiveBytes
    plans: list[LayerPlan]
    layer_sizes: list[Sizes]
    element: int
    is_eager: bool
    library: LibraryBytes | None

    def _forward_measured(self, tokens: int) -> None:
        """Walk the library's layers by the bytes that they were seen to allocate."""
        measured, live = self._measured(), self.live
        kept = BOUNDARY if measured.recomputes else KEPT
        adapters = 0 if measured.recomputes else sum(self._of_adapters(tokens))
        live.hold("graph", self.shape.num_layers * measured.layer * tokens + adapters, kept)
        live.briefly(measured.forward * tokens + self._largest_weight() + self._row_codes(tokens))
        live.hold("tail", max(0, measured.tail * tokens - self.layer_sizes[-1].x))  # the loss has the hidden states

    def _backward_measured(self, tokens: int) -> None:
        measured, live = self._measured(), self.live
        live.enter("backward, recomputed layers" if measured.recomputes else "backward, kept layers")
        live.drop("tail", "dy")
        again = max(self._of_adapters(tokens)) if measured.recomputes else 0
        again += EXPERT_GRADIENT_BYTES * self._expert_values
        with live.holding(measured.backward * tokens + again + self._row_codes(tokens)):
            live.briefly(self._largest_weight(), WEIGHTS)
        live.drop("graph", "0.x")

    def _of_adapters(self, tokens: int) -> list[int]:
        """Return what each layer's adapters keep: 16-bit copies, and the low-rank hidden beyond the measured rank."""
        alone = self._measured().attention_alone
        adapted = sum(map(len, (names for group, names in self.shape.groups.items() if group in IN_ATTENTION or not alone)))
        beyond = [max(0, sum(plan.ranks.values()) - MEASURED_RANK * adapted) for plan in self.plans]
        return [self.element * (sum(plan.adapter.values()) + tokens * low) for plan, low in zip(self.plans, beyond, strict=True)]

    @property
    def _gained(self) -> list[list[int]]:
        """Return the output features of each layer's adapted projections, if they have DoRA's gains."""
        if not self.config.lora.use_dora:
            return [[] for _ in self.plans]
        adapted = zip(adapted_projections(self.config, self.shape), self.shape.each, strict=True)
        return [[one.projections()[name][0] for name in names] for names, one in adapted]

    def _row_codes(self, tokens: int) -> int:
        """Return the bytes of the largest activation in INT8; codes of weights take less room than dequantised ones."""
        return tokens * max(map(max, linear_layers(self.shape))) if self._is_int8() else 0

    def _measured(self) -> PassBytes:
        recomputes = Policy.of(self.config.train.activation_checkpointing) is not Policy.KEEP
        alone = all(group in IN_ATTENTION for plan in self.plans for group, size in plan.adapter.items() if size)
        return self.library.of(recomputes, self.config.lora.lora_dropout > 0.0, self.config.lora.use_dora, alone)

    def _forward_unfused(self, sizes: Sizes) -> None:
        """Walk transformers' own layers: hold what autograd keeps, or only the inputs."""
        number, recomputes = self.shape.num_layers, Policy.of(self.config.train.activation_checkpointing) is not Policy.KEEP
        for i in range(1, number + 1):
            self.live.hold(f"{i}.x", sizes.x, BOUNDARY)
        gains = 2 * self.element * sizes.tokens * sum(map(sum, self._gained))
        self.live.hold("graph", 0 if recomputes else sum(map(self._unfused_graph, self.layer_sizes)) + gains, KEPT)
        rows = 0 if self.shape.experts is None else self._moved_rows(sizes)
        self.live.briefly(rows + sizes.gate_up + sizes.f + 6 * sizes.x + self._largest_weight())

    def _backward_unfused(self, sizes: Sizes) -> None:
        recomputes = Policy.of(self.config.train.activation_checkpointing) is not Policy.KEEP
        self.live.enter("backward, recomputed layers" if recomputes else "backward, kept layers")
        again = max(map(self._unfused_graph, self.layer_sizes)) if recomputes else 0
        again += 2 * self.element * sizes.tokens * max(map(sum, self._gained)) if recomputes else 0
        again += 0 if self.shape.experts is None else self._moved_rows(sizes) + EXPERT_GRADIENT_BYTES * self._expert_values
        mixers = [size.mixer.extra for size in self.layer_sizes if size.mixer is not None]
        self.live.briefly(again + max(mixers, default=0), MIXERS)
        with self.live.holding(again + 2 * sizes.gate_up + 6 * sizes.x), self.live.holding(self._largest_weight(), WEIGHTS):
            self.live.briefly(2 * sizes.q + 12 * self._eager_scores(sizes), ATTENTION)
        self.live.drop("graph", *(f"{i}.x" for i in range(self.shape.num_layers)))

    def _unfused_graph(self, sizes: Sizes) -> int:
        dropout = self.config.lora.lora_dropout > 0
        experts = 0 if self.shape.experts is None else self._experts_graph(sizes)
        if sizes.mixer is not None:
            mlp = sizes.unfused_graph(self.shape.layer, 0, dropout) - sizes.unfused_attention
            return experts + mlp + sizes.mixer.graph
        return experts + sizes.unfused_graph(self.shape.layer, self._eager_scores(sizes), dropout)

    def _experts_graph(self, sizes: Sizes) -> int:
        """Return the bytes that a mixture keeps, its shared expert and adapters included. An estimate.

        Experts in 16 bits are the library's code, which keeps rows and products too.
        """
        experts, of_rows = self.shape.experts, sizes.element * self.shape.experts.active * sizes.tokens
        kept = 2 * of_rows * experts.width + 4 * sizes.tokens * experts.number * ROUTER_VALUES
        kept += CHOICE_BYTES * experts.active * sizes.tokens + self.element * self._expert_values
        kept += SHARED_HIDDEN * sizes.low * experts.shared + (2 * sizes.x if experts.shared else 0)
        return kept + (0 if sizes.packed else self._moved_rows(sizes))

    def _moved_rows(self, sizes: Sizes) -> int:
        """Return the bytes of three tensors of the rows of all choices, and of three of their hidden."""
        experts = self.shape.experts
        return 3 * sizes.element * experts.active * sizes.tokens * (self.shape.hidden_size + experts.width)

    @property
    def _expert_values(self) -> int:
        """Return the number of trained values of one layer's experts."""
        return self.plans[-1].adapter.get(EXPERTS, 0)

    def _eager_scores(self, sizes: Sizes) -> int:
        return sizes.scores if self.is_eager else 0

    def _is_int8(self) -> bool:
        return self.config.matmul is not Matmul.BF16

    def _largest_weight(self) -> int:
        """Return the bytes of the largest single projection in the working dtype."""
        return self.element * max(map(math.prod, linear_layers(self.shape)))
