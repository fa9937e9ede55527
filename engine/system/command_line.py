"""Every command ends here: what a user can act on is one line on stderr; anything else is a bug, and shows."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from engine.errors import EngineError, first_line
from engine.system.signals import handled

CLOSED_PIPE = 128 + signal.SIGPIPE  # the exit code that a shell sees where a pipe's reader is gone


def run(
    command: Callable[[], int],
    stopped: str = "stopped",
    output: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> int:
    """Run `command` and return its exit code, or that of what it raised.

    An EngineError is one line on stderr and its `exit_code`, 2 where it has none. A file that cannot be
    read or made is one line and 2. Ctrl-C prints `stopped` and is 130. A reader of stdout that is gone
    ends the command without a word. output: a context in which the command runs and is reported on.
    """
    with output():
        try:
            return _flushed(command)
        except KeyboardInterrupt:
            return _ended(f"\n{stopped}", 130)
        except EngineError as error:
            return _ended(f"error: {error}", getattr(error, "exit_code", 2))
        except OSError as error:  # files that cannot be written are StorageErrors
            if isinstance(error, BrokenPipeError) and _is_stdout_gone():
                return CLOSED_PIPE
            return _ended(f"error: {error.filename or 'file'}: {error.strerror or first_line(error)}", 2)


def _flushed(command: Callable[[], int]) -> int:
    """Run it and flush stdout: a closed pipe is noticed here, and not when Python ends."""
    try:
        code = command()
    except SystemExit:  # argparse, after --help
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return code


def _ended(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code


def _is_stdout_gone() -> bool:
    """Whether stdout is a pipe without a reader. What it still holds is then dropped, lest Python complain at its end."""
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError):  # no file, or a closed one
        return False
    poll = select.poll()
    poll.register(number, select.POLLOUT)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), number)
    return True


@contextmanager
def asked_to_end(note: str) -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM came inside, for work that ends where nothing is lost. note: what is said then; a second signal
    ends at once."""
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        give_back()
        print(f"\n{note}", file=sys.stderr, flush=True)

    with handled((signal.SIGINT, signal.SIGTERM), ask) as give_back:
        yield lambda: bool(asked)
