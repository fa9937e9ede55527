"""Define the answers of the engine's commands, which the driver reads as JSON.

Importing this module loads no torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from engine.config.parsing import parse_dataclass
from engine.planning.model_shape import ModelShape


@dataclass(frozen=True)
class VisibleCard:
    """Describe a GPU by the name and memory that its driver reports."""

    name: str
    memory_gib: float


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Hold all that memory and speed depend on, as `engine inspect` finds it.

    shape: None if the model's config.json gives none. card: the visible card with the least memory,
    None without CUDA. host_gib: host memory that a trial may pin, None if not known.
    """

    shape: ModelShape | None = None
    card: VisibleCard | None = None
    host_gib: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Facts:
        """Read plain data from JSON. Raises InputError if a key or a type is wrong."""
        return parse_dataclass(cls, _with_parts(values, shape=ModelShape, card=VisibleCard), "facts")


@dataclass(frozen=True, kw_only=True)
class PreparedFacts(Facts):
    """Hold the answer of `engine prepare`: the facts, and the sizes of model and data.

    layers: one line on which decoder layers run fused. num_trainable: adapter parameters of each
    config. data: digests of the samples by part, training and evaluation. model_notes: what the
    user should know about the model, one line each.
    """

    model_path: str
    layers: str
    num_train_samples: int
    num_eval_samples: int
    num_dropped_samples: int
    num_trainable: list[int]
    data: dict[str, str]
    model_notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class AdapterEvaluation:
    """Hold the answer of `engine evaluate`: losses of base model and adapter.

    Losses are in nats per target token.

    examples: prompt, expected, base and adapter texts of some evaluation samples. examples_s:
    seconds to generate them. examples_error: one line that says why there are none. All three are
    None if the caller asked for no examples.
    """

    base_eval_loss: float
    eval_loss: float
    num_eval_target_tokens: int
    examples: list[dict[str, str]] | None = None
    examples_s: float | None = None
    examples_error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, without values that are None."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: Any) -> AdapterEvaluation:
        """Read plain data from JSON. Raises InputError if a key or a type is wrong."""
        return parse_dataclass(cls, values, "evaluation")


def _with_parts(values: Any, **kinds: type) -> Any:
    """Return the values with their nested objects read into dataclasses."""
    if not isinstance(values, dict):
        return values
    parts = {name: parse_dataclass(kind, values[name], name) for name, kind in kinds.items() if values.get(name) is not None}
    return {**values, **parts}
