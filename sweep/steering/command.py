"""Define a command to a sweep, and read it from the words that a user typed.

What words can be wrong in themselves is refused here. What depends on the sweep is refused by who
takes the command (see checks.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from engine.errors import InputError, did_you_mean, printable
from sweep.config.sweep import MAX_TRIALS, BudgetConfig

FIELD = "command"
LONGEST = 2000
LIMITS = tuple(BudgetConfig.model_fields)


class Kind(StrEnum):
    """Name the commands."""

    ADD = "add"
    STOP = "stop"
    PAUSE = "pause"
    GO_ON = "go-on"
    CLONE = "clone"
    TRY = "try"
    KEEP = "keep"
    BUDGET = "budget"
    FINISH = "finish"


WARM = "--warm"
TAKES_A_TRIAL = (Kind.STOP, Kind.PAUSE, Kind.GO_ON, Kind.CLONE, Kind.KEEP)
TAKES_VALUES = (Kind.CLONE, Kind.TRY, Kind.BUDGET)
ENTERS_A_TRIAL = (Kind.CLONE, Kind.TRY)


@dataclass(frozen=True)
class Command:
    """Hold one command as it was sent.

    number: of the trial, or how many trials `add` adds; None for a command without one. values:
    dotted path -> value, or limit -> value for `budget`. text: the words, for people. who: user and
    machine. sent_s: Unix seconds. id: unique among the sweep's commands. warm: whether a clone begins
    with the trial's adapter.
    """

    kind: Kind
    text: str
    number: int | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    who: str = ""
    sent_s: float = 0.0
    id: str = ""
    warm: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "kind": str(self.kind), "values": dict(self.values)}

    @classmethod
    def from_dict(cls, data: Any) -> Command:
        """Read what to_dict() returned. Raises ValueError if it is anything else."""
        try:
            number, values = data["number"], data["values"]
            known = cls(
                Kind(data["kind"]), str(data["text"]), None if number is None else int(number), dict(values),
                str(data["who"]), float(data["sent_s"]), str(data["id"]), data.get("warm") is True,
            )  # fmt: skip
        except (AttributeError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"holds no command ({error})") from None
        if known.warm and known.kind is not Kind.CLONE:
            raise ValueError("holds no command (its start)")
        if (known.number is None) == (known.kind in (*TAKES_A_TRIAL, Kind.ADD)):
            raise ValueError("holds no command (its number)")
        if any(len(text) > LONGEST or printable(text) != text for text in (known.text, known.who, known.id)):
            raise ValueError("holds a text that is too long, or has characters that cannot be shown")
        return known

    def refused(self, allowed: str) -> InputError:
        """Return the error that refuses this command. allowed: why, and the way out."""
        return InputError(FIELD, self.text, allowed)


def parse_words(words: Sequence[str], who: str = "", sent_s: float = 0.0, name: str = "") -> Command:
    """Return the command that the words name, such as `stop 3`. name: becomes its id.

    Raises InputError for an unknown command, and for too many, too few or malformed words.
    """
    text, rest = " ".join(words), list(words[1:])
    known = [str(kind) for kind in Kind]
    if not words or words[0] not in known:
        hint = did_you_mean(words[0], known) if words else ""
        raise InputError(FIELD, text, f"must be status, {', '.join(known[:-1])} or {known[-1]}{hint}")
    kind = Kind(words[0])
    if (is_warm := WARM in rest) and kind is not Kind.CLONE:
        raise InputError(FIELD, text, "has no --warm")
    rest = [word for word in rest if word != WARM]
    number = _number(kind, text, rest) if kind in (*TAKES_A_TRIAL, Kind.ADD) else None
    if kind not in TAKES_VALUES and rest:
        raise InputError(FIELD, text, f"takes no further words, and {' '.join(rest)!r} follows")
    from sweep.config.compose import parsed  # late: it loads Hydra, which no reader of the journal needs

    values = dict(map(parsed, rest))
    if kind in TAKES_VALUES and not values and not is_warm:
        example = "gpu_hours=8" if kind is Kind.BUDGET else "optim.learning_rate=1e-4"
        raise InputError(FIELD, text, f"must name a value, as in {kind}{' 3' if kind is Kind.CLONE else ''} {example}")
    unknown = [key for key in values if kind is Kind.BUDGET and key not in LIMITS]
    if unknown:
        hint = did_you_mean(unknown[0], LIMITS)
        raise InputError(FIELD, text, f"{unknown[0]} is no limit; there are {', '.join(LIMITS)}{hint}")
    return Command(kind, text, number, values, who, sent_s, name, is_warm)


def _number(kind: Kind, text: str, rest: list[str]) -> int:
    """Take the number that comes first from the words."""
    word = rest.pop(0) if rest else ""
    least = 1 if kind is Kind.ADD else 0
    if not (word.isascii() and word.isdigit() and len(word) <= len(str(MAX_TRIALS)) and int(word) >= least):
        what = "how many trials" if kind is Kind.ADD else "a trial's number"
        raise InputError(FIELD, text, f"must name {what}, as in {kind} {8 if kind is Kind.ADD else 3}")
    return int(word)
