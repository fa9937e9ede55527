"""How every command ends: what a user can act on is one line on stderr and exit code 2; anything else is a bug, and shows."""

from __future__ import annotations

import sys
from collections.abc import Callable

from engine.errors import EngineError, first_line


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
