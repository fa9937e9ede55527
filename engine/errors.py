"""Errors a user can act on. Each is one line that names the field, the value and what is allowed. No torch."""

import difflib
from collections.abc import Iterable


class EngineError(Exception):
    """Base of every error this project raises on purpose; anything else that escapes is a bug."""


class InputError(EngineError):
    """Bad input: a config value, a data set, a model folder. The command line prints the one line and exits with code 2."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        """field: dotted config path or file; value: what was given; allowed: what would have been accepted."""
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(_one_line(f"{field} = {_short(value)}: {allowed}"))

    def __reduce__(self):  # exceptions with several arguments do not survive pickling (Ray) without this
        return (type(self), (self.field, self.value, self.allowed))


class DivergedError(EngineError):
    """The loss or the gradient is not finite, or has exploded, or vanished: going on would only burn GPU time."""


class OutOfMemory(EngineError):
    """The leanest way to compute a config does not fit: predicted, or met. Peaks in GiB, None where not known."""

    def __init__(self, line: str, predicted_gib: float | None = None, measured_gib: float | None = None) -> None:
        self.line, self.predicted_gib, self.measured_gib = line, predicted_gib, measured_gib
        super().__init__(line)

    def __reduce__(self):
        return (type(self), (self.line, self.predicted_gib, self.measured_gib))


class StorageError(EngineError):
    """Files cannot be written: the disk is full, read-only or failing. No trial's fault: each can go on later."""

    exit_code = 1


class Interrupted(EngineError):
    """The caller asked a trial to stop between two reports. Its checkpoint is of the last step: it goes on from there."""


class CheckpointError(EngineError):
    """A checkpoint is torn, or belongs to another config."""


def first_line(error: Exception) -> str:
    """What a library's error says, in one line; its kind where it says nothing."""
    lines = str(error).split("\n") if str(error).strip() else [type(error).__name__]
    lines = [line.strip() for line in lines if line.strip()]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def did_you_mean(given: str, known: Iterable[str], num: int = 1, cutoff: float = 0.6) -> str:
    """The `num` nearest known names as a hint, `; did you mean 'rank'?`; empty where none is near."""
    near = difflib.get_close_matches(given, list(known), n=num, cutoff=cutoff)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def _one_line(text: str) -> str:
    """Line ends and what would steer a terminal as escapes: a key of a config may hold anything."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _short(value: object, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
