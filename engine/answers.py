"""The answers of the engine's commands, which the driver reads as JSON. Plain data, no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from engine.config.parsing import parse_dataclass
from engine.planning.model_shape import ModelShape


@dataclass(frozen=True)
class VisibleCard:
    """A GPU under the name and with the memory that its driver reports."""

    name: str
    memory_gib: float


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything that memory and speed depend on, as `engine inspect` finds it.

    shape: None where the model's config.json gives none. card: the visible one with the least
    memory, None without CUDA. host_gib: host memory that a trial may pin, None where not known.
    """

    shape: ModelShape | None = None
    card: VisibleCard | None = None
    host_gib: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Facts:
        """Read plain data from JSON; InputError where it is no such answer."""
        return parse_dataclass(cls, _with_parts(values, shape=ModelShape, card=VisibleCard), "facts")


@dataclass(frozen=True, kw_only=True)
class PreparedFacts(Facts):
    """The answer of `engine prepare`: the facts, and the sizes of model and data.

    layers: one line on which decoder layers run fused. num_trainable: parameters of each config's
    adapter. data: digests of the samples by part, training and evaluation.
    """

    model_path: str
    layers: str
    num_train_samples: int
    num_eval_samples: int
    num_dropped_samples: int
    num_trainable: list[int]
    data: dict[str, str]


@dataclass(frozen=True)
class AdapterEvaluation:
    """The answer of `engine evaluate`: losses of base model and adapter, in nats per target token.

    examples: prompt, expected, base and adapter of some evaluation samples; examples_s: seconds
    that they took. examples_error: one line that says why there are none. None where not asked for.
    """

    base_eval_loss: float
    eval_loss: float
    num_eval_target_tokens: int
    examples: list[dict[str, str]] | None = None
    examples_s: float | None = None
    examples_error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without what is None."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: Any) -> AdapterEvaluation:
        """Read plain data from JSON; InputError where it is no such answer."""
        return parse_dataclass(cls, values, "evaluation")


def _with_parts(values: Any, **kinds: type) -> Any:
    """The same values with their objects read into dataclasses, where there are any."""
    if not isinstance(values, dict):
        return values
    parts = {name: parse_dataclass(kind, values[name], name) for name, kind in kinds.items() if values.get(name) is not None}
    return {**values, **parts}
