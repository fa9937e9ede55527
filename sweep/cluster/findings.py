"""Show what `python -m sweep doctor` found: one line each, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TextIO

from rich.console import Console
from rich.text import Text

from engine.errors import first_line, printable

Level = Literal["ok", "warning", "fault"]
STYLES: dict[str, str] = {"ok": "green", "warning": "yellow", "fault": "bold red"}


@dataclass(frozen=True)
class Finding:
    """Say how one thing stands. With a fault, no sweep can run. todo: the way out."""

    level: Level
    subject: str
    text: str
    todo: str = ""


def examined(subject: str, check: Callable[[], Finding | Iterable[Finding]]) -> list[Finding]:
    """Return what the check finds. A check that fails is a finding too, never a traceback."""
    try:
        found = check()
        return [found] if isinstance(found, Finding) else list(found)
    except Exception as error:
        return [Finding("warning", subject, f"could not be checked ({type(error).__name__}: {first_line(error)})")]


def show(findings: Iterable[Finding], stream: TextIO) -> int:
    """Print the findings as they come, and the sum of them. Returns the number of faults."""
    console, counts = Console(file=stream, soft_wrap=True, highlight=False), dict.fromkeys(STYLES, 0)
    for finding in findings:
        counts[finding.level] += 1
        line = Text(f"{finding.level:<8}", style=STYLES[finding.level])
        console.print(line.append(f" {finding.subject:<13} {printable(finding.text)}", style="default"))
        if finding.todo:
            console.print(Text(f"{'':22} -> {printable(finding.todo)}"))
    faults, warnings = counts["fault"], counts["warning"]
    many = [_count(faults, "fault"), _count(warnings, "warning")]
    able = "no sweep can run here until the faults are gone" if faults else "a sweep can run here"
    console.print(Text(f"\n{', '.join(filter(None, many)) or 'all is well'}: {able}"))
    return faults


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}" if number else ""
