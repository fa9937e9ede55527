"""Describe the experts of a mixture as numbers: how many, how many a token takes, how wide. No torch.

Only families are known whose every layer has experts in the MLP's place, in one form. Nothing is
predicted for others, which have shared experts or dense layers among them.

Shape letters: E experts, K of them a token, D hidden, F expert hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
"""Keys of config.json that say how many experts a layer has."""
PATH = "mlp.experts"
MIN_ROWS = 100
"""Rows an expert, on average, from which dequantised experts are faster (engine/kernels/experts/grouped_dense.py).
An estimate: they were at 128 and at 256, and below 64 each expert is one tile."""


@dataclass(frozen=True)
class ExpertsShape:
    """The experts of a layer.

    number, active: E and K. width: F. vectors: values of the layer, such as sinks, that
    no other description counts. has_bias: the experts and the router have one.
    """

    number: int
    active: int
    width: int
    has_bias: bool = False
    vectors: int = 0

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
        return self.number * hidden + biases + self.vectors

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
    """Where a family's config.json has the numbers. vectors: (heads, key/value heads, head dim) -> values."""

    width: str
    has_bias: bool = False
    vectors: Callable[[int, int, int], int] = lambda heads, kv_heads, head_dim: 0


MIXTURES = {
    "qwen3_moe": _Mixture("moe_intermediate_size"),
    "mixtral": _Mixture("intermediate_size"),
    "olmoe": _Mixture("intermediate_size"),
    "gpt_oss": _Mixture("intermediate_size", True, lambda heads, kv_heads, head_dim: heads),
}
"""model_type -> where its numbers are."""


def experts_of(kind: str, values: Mapping[str, Any], number: Callable[[str], int], heads: Iterable[int]) -> ExpertsShape | None:
    """Return the experts of a family in MIXTURES, or None if some of its layers have none.

    number: key of the config -> positive number; it raises InputError. heads: query heads, key/value
    heads, head dim.
    """
    found, given = MIXTURES.get(kind), [key for key in EXPERTS if values.get(key) is not None]
    if found is None or values.get("mlp_only_layers") or values.get("decoder_sparse_step", 1) != 1:
        return None
    return ExpertsShape(
        number(given[0] if given else EXPERTS[0]), number("num_experts_per_tok"), number(found.width), found.has_bias,
        found.vectors(*heads),
    )  # fmt: skip
