"""Define the errors that a user can act on; each is one line. No torch."""

import difflib
from collections.abc import Iterable


class EngineError(Exception):
    """All errors raised on purpose derive from this; any other exception that escapes is a bug."""


class InputError(EngineError):
    """Report bad input: a config value, a data set or a model folder.

    The line names the field, the value and what is allowed. The command prints it and exits with
    code 2.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        """Make the line from a field (config path or file), its value and what is allowed."""
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(printable(f"{field} = {_short(value)}: {allowed}"))

    def __reduce__(self):  # without this, Ray cannot pickle an exception of several arguments
        return (type(self), (self.field, self.value, self.allowed))


class InputsChanged(EngineError):
    """Report that data, template or base model are not what the sweep began with.

    That is no trial's fault: the sweep stops, and the trial can continue once they are back.
    """


class DivergedError(EngineError):
    """Report a loss or gradient that is not finite, has exploded or has vanished.

    To continue would only waste GPU time.
    """


class OutOfMemory(EngineError):
    """Report that even the leanest way to compute a config does not fit, by prediction or in fact.

    Peaks are in GiB, None if unknown.
    """

    def __init__(self, line: str, predicted_gib: float | None = None, measured_gib: float | None = None) -> None:
        self.line, self.predicted_gib, self.measured_gib = line, predicted_gib, measured_gib
        super().__init__(line)

    def __reduce__(self):
        return (type(self), (self.line, self.predicted_gib, self.measured_gib))


class StorageError(EngineError):
    """Report that the disk is full, read-only or failing. Each trial can continue later."""

    exit_code = 1


class Interrupted(EngineError):
    """Report that the caller stopped a trial between two reports.

    The checkpoint holds the last step, and the trial can continue from there.
    """


class CheckpointError(EngineError):
    """Report a checkpoint that is torn or belongs to another config."""


def first_line(error: Exception) -> str:
    """Return a library's error message as one line, or the error's type if it has no message."""
    lines = str(error).split("\n") if str(error).strip() else [type(error).__name__]
    lines = [line.strip() for line in lines if line.strip()]
    return printable(" ".join(lines[:2]) if lines[0].endswith(":") else lines[0])


def did_you_mean(given: str, known: Iterable[str], num: int = 1, cutoff: float = 0.6) -> str:
    """Return a hint such as `; did you mean 'rank'?` with up to `num` near names, or ''."""
    near = difflib.get_close_matches(given, list(known), n=num, cutoff=cutoff)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def printable(text: str) -> str:
    """Escape line ends and terminal control characters: text from a config or data may hold anything."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _short(value: object, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
