"""Write report.html again: python -m sweep.report <sweep folder>."""

from __future__ import annotations

import sweep.cli.no_foreign_modules  # noqa: F401 (must be the first)

# isort: split
import sys

from engine.system.command_line import run
from sweep.folder.sweep_folder import SweepFolder
from sweep.report.build import write_report

USAGE = "usage: python -m sweep.report <sweep folder>\n\nWrites report.html into the folder; the sweep may still be running."


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0 done, 2 bad input."""
    return run(lambda: _main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(USAGE, file=sys.stdout if {"-h", "--help"} & set(arguments) else sys.stderr)
        return 0 if {"-h", "--help"} & set(arguments) else 2
    print(write_report(SweepFolder.open(arguments[0], "folder")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
