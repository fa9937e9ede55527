"""Define the answers of the engine's commands, which the driver reads as JSON.

Importing this module loads no torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from engine.config.parsing import parse_dataclass
from engine.sample_losses import SampleLosses
from engine.shape.model_shape import ModelShape
from engine.units import counted

TRAINING, EVALUATION = "training", "evaluation"  # parts of an account
MUCH_LOST = 0.1  # share of a data set's rows or tokens that are not used


@dataclass(frozen=True)
class VisibleCard:
    """Describe a GPU by the name and memory that its driver reports."""

    name: str
    memory_gib: float


@dataclass(frozen=True, kw_only=True)
class DataAccount:
    """Say what became of the rows of one data set at one length.

    part: training or evaluation. num_equal: rows with the tokens of an earlier row. num_chosen: rows
    after hold-out and caps; num_used: those of them with something to learn. num_dropped samples
    have no target within the length, or are longer under data.overlong=drop. num_lost_tokens: of
    the chosen rows, read in no pass. num_tokens and num_targets: of one pass. num_leaked: rows of
    an evaluation set of its own that are training rows too. num_bos, num_eos: documents of the
    whole set to which these were added. bad_rows: lines about the first ones. notes: what the
    author of the data may not expect, with the number of rows of the whole set. num_pairs: pairs that
    are used, if rows are pairs; num_cut then counts their samples, two in each, and num_dropped pairs.
    """

    part: str
    max_seq_length: int
    num_read: int
    num_bad: int
    num_equal: int
    num_chosen: int
    num_used: int
    num_samples: int
    num_cut: int
    num_dropped: int
    num_lost_tokens: int
    num_tokens: int
    num_targets: int
    num_leaked: int
    num_bos: int
    num_eos: int
    bad_rows: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    num_pairs: int = 0

    def line(self) -> str:
        """Return everything in one line."""
        read = _listed(f"{counted(self.num_read, 'row')} read", bad=self.num_bad, equal_to_others=self.num_equal)
        used = f"{self.num_used:,} used"
        if self.num_pairs:
            used = f"{counted(self.num_pairs, 'pair')} used"
        elif self.num_samples != self.num_used:
            used += f" as {counted(self.num_samples, 'sample')}"
        cut = {"samples_cut" if self.num_cut != 1 else "sample_cut": self.num_cut}
        lost = _listed(f"{counted(self.num_lost_tokens, 'token')} lost", **cut, dropped=self.num_dropped)
        parts = [read, used, f"{counted(self.num_tokens, 'token')} a pass, {self._targets_share():.1%} of them targets", lost]
        added = [f"{name} to {count:,}" for name, count in (("BOS", self.num_bos), ("EOS", self.num_eos)) if count]
        parts += [f"added {', '.join(added)}"] if added else []
        parts += [f"{note} ({counted(count, 'row')})" for note, count in self.notes.items()]
        return f"{self.part} at {self.max_seq_length:,} tokens: {'; '.join(parts)}"

    def numbers(self) -> dict[str, float]:
        """Return its counts and shares by short names, to sort sweeps by."""
        return {
            "rows_read": self.num_read, "rows_bad": self.num_bad, "rows_equal": self.num_equal, "rows_used": self.num_used,
            "rows_leaked": self.num_leaked, "samples": self.num_samples, "samples_cut": self.num_cut,
            "samples_dropped": self.num_dropped, "tokens": self.num_tokens, "tokens_lost": self.num_lost_tokens,
            "tokens_lost_share": self.num_lost_tokens / max(1, self.num_tokens + self.num_lost_tokens),
            "targets_share": self._targets_share(),
        }  # fmt: skip

    def _targets_share(self) -> float:
        return self.num_targets / max(1, self.num_tokens)

    def warnings(self) -> list[str]:
        """Return a line for each loss that a user should know of before training."""
        found = []
        # Bad rows are counted before hold-out and caps, the others after them.
        kept = (1 - self.num_bad / max(1, self.num_read)) * self.num_used / max(1, self.num_chosen)
        tokens = self.num_lost_tokens / max(1, self.num_tokens + self.num_lost_tokens)
        for what, lost in (("rows", 1 - kept), ("tokens", tokens)):
            if lost > MUCH_LOST:
                found.append(
                    f"{self.part} data lose {lost:.0%} of their {what} at {counted(self.max_seq_length, 'token')} "
                    "(bad rows, or beyond the length: data.overlong)"
                )
        found += [f"a bad row was skipped: {line}" for line in self.bad_rows]
        if self.num_leaked:
            are = "is a training row" if self.num_leaked == 1 else "are training rows"
            found.append(f"{self.num_leaked:,} of {counted(self.num_chosen, 'evaluation row')} {are} too")
        return found


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
        return parse_dataclass(cls, _with_parts(values, shape=ModelShape, card=VisibleCard, accounts=DataAccount), "facts")


@dataclass(frozen=True, kw_only=True)
class PreparedFacts(Facts):
    """Hold the answer of `engine prepare`: the facts, and the sizes of model and data.

    layers: one line on which decoder layers run fused. num_trainable: adapter parameters of each
    config. data: digests of samples, template and base model by part (engine/sources/identity.py).
    Numbers of samples are rows of the source. accounts: of both parts, at each length among the
    configs. day: the one that the chat template printed, None if it prints
    none. num_task_samples, longest_task_prompt: evaluation samples that the task metrics answer, and
    the tokens of the longest prompt. model_notes: what the user should know about the model, one line each.
    """

    model_path: str
    layers: str
    num_train_samples: int
    num_eval_samples: int
    num_dropped_samples: int
    num_trainable: list[int]
    data: dict[str, str]
    accounts: list[DataAccount] = field(default_factory=list)
    day: str | None = None
    num_task_samples: int = 0
    longest_task_prompt: int = 0
    model_notes: list[str] = field(default_factory=list)

    @property
    def num_train_tokens(self) -> int:
        """Return the tokens of one pass over the training samples, at the length that leaves fewest; 0 if not known."""
        return min((account.num_tokens for account in self.accounts if account.part == TRAINING), default=0)


@dataclass(frozen=True)
class TorchFacts:
    """Hold the answer of `engine cards`: what torch sees of this machine.

    cuda: the CUDA version that torch was built for, None for a CPU build. error: one line if CUDA
    cannot be used. cards: name, memory_gib, free_gib, capability and bfloat16 of each visible GPU.
    """

    torch: str
    cuda: str | None = None
    error: str | None = None
    cards: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> TorchFacts:
        """Read plain data from JSON. Raises InputError if a key or a type is wrong."""
        return parse_dataclass(cls, values, "cards")


@dataclass(frozen=True)
class AdapterEvaluation:
    """Hold the answer of `engine evaluate`: losses of base model and adapter.

    Losses are in nats per target token.

    base_sample_losses, sample_losses: those of each evaluation sample, None from older versions.
    examples: prompt, expected, base and adapter texts of some evaluation samples. examples_s:
    seconds to generate them. examples_error: one line that says why there are none. All three are
    None if the caller asked for no examples. base_metrics, metrics: what base model and adapter
    scored by the task metrics, None without any. metrics_error: one line on those without a score.
    """

    base_eval_loss: float
    eval_loss: float
    num_eval_target_tokens: int
    examples: list[dict[str, str]] | None = None
    examples_s: float | None = None
    examples_error: str | None = None
    base_sample_losses: SampleLosses | None = None
    sample_losses: SampleLosses | None = None
    base_metrics: dict[str, float] | None = None
    metrics: dict[str, float] | None = None
    metrics_error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, without values that are None."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: Any) -> AdapterEvaluation:
        """Read plain data from JSON. Raises InputError if a key or a type is wrong."""
        return parse_dataclass(cls, values, "evaluation")


def _with_parts(values: Any, **kinds: type) -> Any:
    """Return the values with their nested objects, or lists of them, read into dataclasses."""
    if not isinstance(values, dict):
        return values
    read = {name: _part(kind, values[name], name) for name, kind in kinds.items() if values.get(name) is not None}
    return {**values, **read}


def _part(kind: type, value: Any, name: str) -> Any:
    if isinstance(value, list):
        return [parse_dataclass(kind, one, f"{name}.{i}") for i, one in enumerate(value)]
    return parse_dataclass(kind, value, name)


def _listed(first: str, **counts: int) -> str:
    """Return the text, and in brackets the counts that are not 0."""
    shown = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items() if count)
    return f"{first} ({shown})" if shown else first
