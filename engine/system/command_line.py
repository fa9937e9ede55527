"""End every command in the same way.

An error that a user can act on is one line on stderr. Any other exception is a bug and shows its
traceback.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from engine.errors import EngineError, InputError, first_line
from engine.system.files import NO_HOME, home_folder
from engine.system.signals import handled

CLOSED_PIPE = 128 + signal.SIGPIPE  # a shell's exit code for a command whose reader is gone


def run(
    command: Callable[[], int],
    stopped: str = "stopped",
    output: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> int:
    """Run `command` and return its exit code, or the code of its exception.

    An EngineError is one line on stderr and gives its `exit_code`, or 2 if it has none. A file that
    cannot be read or created is one line and gives 2. Ctrl-C prints `stopped` and gives 130. If the
    reader of stdout is gone, the command ends without a message.

    output: a context around the command and its error line.
    """
    with output():
        try:
            _refuse_removed_folder()
            return _flushed(command)
        except KeyboardInterrupt:
            return _ended(f"\n{stopped}", 130)
        except EngineError as error:
            return _ended(f"error: {error}", getattr(error, "exit_code", 2))
        except RuntimeError as error:
            if home_folder() is None and "home directory" in str(error):  # from Path.expanduser, in any library
                return _ended(f"error: {InputError('HOME', None, NO_HOME)}", 2)
            raise
        except OSError as error:  # files that cannot be written are StorageErrors
            if isinstance(error, BrokenPipeError) and _is_stdout_gone():
                return CLOSED_PIPE
            return _ended(f"error: {error.filename or 'file'}: {error.strerror or first_line(error)}", 2)


def _refuse_removed_folder() -> None:
    """Raise InputError if the folder that the command was started in is gone: libraries ask for it."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise InputError("current folder", os.environ.get("PWD"), "was removed; change to another one") from None


def _flushed(command: Callable[[], int]) -> int:
    """Run the command and flush stdout, so that a closed pipe raises here, not when Python ends."""
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
    """Return True if stdout is a pipe without a reader.

    Its buffered output is then dropped, so that Python does not complain when it ends.
    """
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
    """Yield a function that tells whether Ctrl-C or SIGTERM has arrived inside the block.

    The work can then end at a point where nothing is lost. note: the line printed at the first
    signal. A second signal ends the process at once.
    """
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        give_back()
        print(f"\n{note}", file=sys.stderr, flush=True)

    with handled((signal.SIGINT, signal.SIGTERM), ask) as give_back:
        yield lambda: bool(asked)
