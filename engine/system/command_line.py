"""How every command ends: what a user can act on is one line on stderr and exit code 2; anything else is a bug, and shows."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from engine.errors import EngineError, first_line
from engine.system.signals import handled


def run(command: Callable[[], int], stopped: str = "stopped") -> int:
    """The exit code of `command`. stopped: what is said at Ctrl-C, of which the exit code is 130."""
    try:
        return command()
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        return 130
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a path of the user's that cannot be read or made; those that cannot be written are EngineErrors
        print(f"error: {error.filename or 'file'}: {error.strerror or first_line(error)}", file=sys.stderr)
        return 2


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
