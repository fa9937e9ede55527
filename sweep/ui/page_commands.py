"""Hand a command line of the page to `python -m sweep.control`, where this version has it.

This is the only place through which the page can change anything. The page itself writes nothing.
"""

from __future__ import annotations

import importlib
import io
import shlex
import threading
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

CONTROL = "sweep.control"
VERBS = ("status", "add", "stop", "pause", "go-on", "clone", "try", "keep", "budget", "finish")
LONGEST = 1000  # characters
Main = Callable[[list[str]], int]
_one_at_a_time = threading.Lock()  # output is redirected for the whole process


@dataclass(frozen=True)
class Answer:
    """Hold what a command said. is_done: False if it was refused."""

    is_done: bool
    text: str


def find_control() -> Main | None:
    """Return what takes a sweep folder and a command's words; None if this version has no such command."""
    try:
        is_there = find_spec(CONTROL) is not None
    except ModuleNotFoundError:  # its package is missing
        is_there = False
    return _control if is_there else None


def _control(words: list[str]) -> int:
    return importlib.import_module(CONTROL).main(words)  # late: the page opens before its first command


def give(folder: Path, line: str, control: Main) -> Answer:
    """Give a command line, such as `stop 3`, to a sweep. Returns what it printed."""
    try:
        words = shlex.split(line) if len(line) <= LONGEST else []
    except ValueError as error:  # an open quote
        return Answer(False, f"error: the command is not a line of words ({error})")
    if not words or words[0] not in VERBS:
        return Answer(False, f"error: a command begins with one of: {', '.join(VERBS)}")
    output = io.StringIO()
    with _one_at_a_time, redirect_stdout(output), redirect_stderr(output):
        try:
            code = control([str(folder), *words])
        except SystemExit as error:  # argparse, on a wrong option
            code = error.code
    return Answer(code in (0, None), output.getvalue().strip())
