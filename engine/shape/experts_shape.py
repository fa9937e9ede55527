"""Describe the experts of a mixture as numbers: how many, how many a token takes, how wide. No torch.

Only families are known whose every layer has experts, in one form. Nothing is predicted for others,
which have dense layers among them.

Shape letters: E experts, K of them a token, D hidden, F expert hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
"""Keys of config.json that say how many experts a layer has."""
SHARED, ROUTER = "shared_expert", "router"
"""Stand for the linear layers of a shared expert, and for a router that is one, among the groups."""
SHARED_GATE = "shared_expert_gate"
SHARED_LAYERS = ("gate_proj", "up_proj", "down_proj", SHARED_GATE)
MIN_ROWS = 100
"""Rows an expert, on average, from which dequantised experts are faster (engine/kernels/experts/grouped_dense.py).
An estimate: they were at 128 and at 256, and below 64 each expert is one tile."""


@dataclass(frozen=True)
class ExpertsShape:
    """The experts of a layer.

    - number, active: E and K. width: F. vectors: values of the layer, such as sinks, that
      no other description counts.
    - has_bias: the experts and the router have one.
    - shared: hidden features of an expert that all tokens take, behind a gate of its own; 0 for none.
    - beside_mlp: True if the layer has its MLP too, and a router that is a linear layer. Such layers run
      unfused.
    - path: of the experts in the layer.
    """

    number: int
    active: int
    width: int
    has_bias: bool = False
    vectors: int = 0
    shared: int = 0
    beside_mlp: bool = False
    path: str = "mlp.experts"

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Return the names of the linear layers that come with the experts, by group."""
        return {SHARED: SHARED_LAYERS} if self.shared else {ROUTER: ("proj",)} if self.beside_mlp else {}

    def linear_layers(self, hidden: int) -> dict[str, tuple[int, int]]:
        """Return (output, input) features of these, by name."""
        F = self.shared
        sizes = {"gate_proj": (F, hidden), "up_proj": (F, hidden), "down_proj": (hidden, F), SHARED_GATE: (1, hidden)}
        return sizes if F else {"proj": (self.number, hidden)} if self.beside_mlp else {}

    def weights(self, hidden: int) -> dict[str, tuple[int, int]]:
        """Return (output, input) features of one expert's two weights, by name."""
        return {"gate_up_proj": (2 * self.width, hidden), "down_proj": (hidden, self.width)}

    def parameters(self, hidden: int) -> int:
        """Return the number of values in the weights of all experts."""
        return self.number * 3 * hidden * self.width

    def active_parameters(self, hidden: int) -> int:
        """Return the number of values in the weights of the experts that one token takes."""
        return self.active * 3 * hidden * self.width

    def other_parameters(self, hidden: int) -> int:
        """Return the number of values of router, biases and what else the layer has."""
        biases = self.number * (2 * self.width + hidden + 1) if self.has_bias else 0
        return (0 if self.beside_mlp else self.number * hidden) + biases + self.vectors

    def adapter_values(self, ranks: Mapping[str, int], hidden: int) -> int:
        """Return the number of trained values. ranks: rank of each adapted weight."""
        weights = self.weights(hidden)
        return sum(rank * self.number * sum(weights[name]) for name, rank in ranks.items())

    def dequantized_bytes(self, hidden: int, both: bool = False) -> int:
        """Return the bytes of the larger weight of all experts in 16 bits, or of both, with zeros for rows of no expert."""
        sizes = [out * inputs for out, inputs in self.weights(hidden).values()]
        return 2 * (self.number + 1) * (sum(sizes) if both else max(sizes))

    def hit(self, tokens: int) -> int:
        """Return the most experts that a row of `tokens` can hit."""
        return min(self.number, self.active * tokens)


@dataclass(frozen=True)
class _Mixture:
    """Where a family's config.json has the numbers.

    vectors: (heads, hidden features, experts) -> values. flag: what must be true for experts to be there.
    """

    width: str
    has_bias: bool = False
    vectors: Callable[[int, int, int], int] = lambda heads, hidden, experts: 0
    active: str = "num_experts_per_tok"
    shared: str | None = None
    flag: str | None = None
    path: str = "mlp.experts"


MIXTURES = {
    "qwen3_moe": _Mixture("moe_intermediate_size"),
    "mixtral": _Mixture("intermediate_size"),
    "olmoe": _Mixture("intermediate_size"),
    "gpt_oss": _Mixture("intermediate_size", True, lambda heads, hidden, experts: heads),
    "qwen3_5_moe": _Mixture("moe_intermediate_size", shared="shared_expert_intermediate_size"),
    # three more norms, and the scales of the router's input and of each expert's weight
    "gemma4": _Mixture("moe_intermediate_size", vectors=lambda heads, hidden, experts: 4 * hidden + experts,
                       active="top_k_experts", flag="enable_moe_block", path="experts"),
}  # fmt: skip
"""model_type -> where its numbers are."""


def experts_of(kind: str, values: Mapping[str, Any], number: Callable[..., int], heads: int) -> ExpertsShape | None:
    """Return the experts of a family in MIXTURES, or None if some of its layers have none.

    number: key of the config -> positive number; it raises InputError. heads: query heads.
    """
    found, given = MIXTURES.get(kind), [key for key in EXPERTS if values.get(key) is not None]
    if found is None or values.get("mlp_only_layers") or values.get("decoder_sparse_step", 1) != 1:
        return None
    if found.flag is not None and not values.get(found.flag):
        return None
    total = number(given[0] if given else EXPERTS[0])
    return ExpertsShape(
        total, number(found.active), number(found.width), found.has_bias, found.vectors(heads, number("hidden_size"), total),
        0 if found.shared is None else number(found.shared), found.flag is not None, found.path,
    )  # fmt: skip
