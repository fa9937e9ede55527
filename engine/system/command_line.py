"""End every command in the same way, and show how far a long one is.

An error that a user can act on is one line on stderr. Any other exception is a bug and shows its
traceback.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TextIO

from engine.errors import EngineError, InputError, first_line
from engine.system.files import NO_HOME, home_folder
from engine.system.signals import handled

CLOSED_PIPE = 128 + signal.SIGPIPE  # a shell's exit code for a command whose reader is gone


BAR = 24
FIRST_LINE_S, NEXT_LINE_S = 10.0, 30.0  # of a part that goes on, where no bar can be drawn
TELL_EVERY_S = 0.2
Teller = Callable[[str, int, int], None]
_tellers: list[Teller] = []


def tell(part: str, done: int = 0, total: int = 0) -> None:
    """Say what this command does and how far it is; unheard unless the command shows it.

    total: 0 if it is not known.
    """
    if _tellers:
        _tellers[-1](part, done, total)


@contextmanager
def telling(teller: Teller) -> Iterator[None]:
    """Pass to `teller` what `tell` says inside."""
    _tellers.append(teller)
    try:
        yield
    finally:
        _tellers.remove(teller)


def progress_lines(stream: TextIO, clock: Callable[[], float] = time.monotonic) -> Teller:
    """Return a teller that writes lines for another process, at most five a second. See `read_progress`."""
    last: tuple[str, float] = ("", 0.0)

    def write(part: str, done: int, total: int) -> None:
        nonlocal last
        if part != last[0] or done == total or clock() - last[1] >= TELL_EVERY_S:
            last = (part, clock())
            print(json.dumps([part, done, total]), file=stream, flush=True)

    return write


def read_progress(line: str) -> tuple[str, int, int] | None:
    """Return what `progress_lines` wrote; None for any other line."""
    try:
        part, done, total = json.loads(line)
    except (ValueError, TypeError):
        return None
    return (part, done, total) if isinstance(part, str) and isinstance(done, int) and isinstance(total, int) else None


class ProgressBar:
    """Draw one bar on a terminal; elsewhere print a line once a part takes longer, and now and then."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock, self._is_terminal = stream, clock, stream.isatty()
        self._shown: tuple[str, int, int] | None = None
        self._due_s = clock()

    def __call__(self, part: str, done: int, total: int) -> None:
        if self._shown is None or self._shown[0] != part:
            self._due_s = self._clock() + (0.0 if self._is_terminal else FIRST_LINE_S)
        self._shown = (part, done, total)
        self.tick()

    def tick(self) -> None:
        """Show where the command is, if it is time."""
        if self._shown is None or self._clock() < self._due_s:
            return
        part, done, total = self._shown
        full = BAR * done // total if total else 0
        count = f" {done:,}" if done else ""
        line = f"[{'#' * full}{'.' * (BAR - full)}] {done:,}/{total:,} {part}" if total else f"{part}{count} ..."
        self._stream.write(f"\r\x1b[K{line}" if self._is_terminal else f"{line}\n")
        self._stream.flush()
        self._due_s = self._clock() + (0.1 if self._is_terminal else NEXT_LINE_S)

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._is_terminal and self._shown is not None:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
        self._shown = None


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
