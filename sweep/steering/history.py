"""Keep what the commands taken so far ask for.

The journal holds each command at its place. Everything here follows from the list alone, so a
resumed sweep is steered as the undisturbed one was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from engine.errors import InputError
from sweep.config.resume_changes import apply_resume_changes
from sweep.config.sweep import SweepConfig
from sweep.steering.command import ENTERS_A_TRIAL, Command, Kind
from sweep.text import params_text
from sweep.trials.warm_from import WarmFrom


@dataclass(frozen=True)
class TakenCommand:
    """Hold a command as the journal has it.

    taken_s: Unix seconds. refusal: why nothing was done, None if it was. settings: dotted path ->
    the value that the sweep's config has from now on. point, trial: params and number of the trial
    that it enters. rungs: number of each trial that ran or waited for a slot -> how many reports it
    had. Its verdict there has been given, and is not asked for again. warm: the adapter that the
    entered trial begins with.
    """

    command: Command
    taken_s: float
    refusal: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    point: Mapping[str, Any] | None = None
    trial: int | None = None
    rungs: Mapping[int, int] = field(default_factory=dict)
    warm: WarmFrom | None = None

    @property
    def text(self) -> str:
        """Return in one line who asked for what, and what became of it."""
        asked = f"{self.command.text} ({self.command.who})"
        if self.refusal is not None:
            return f"{asked} was refused: {self.refusal}"
        if self.point is None:
            return asked
        start = "" if self.warm is None else f", {self.warm.text}"
        return f"{asked}: trial {self.trial} with {params_text(dict(self.point))}{start}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "command": self.command.to_dict(), "taken_s": self.taken_s, "refusal": self.refusal, "settings": dict(self.settings),
            "point": self.point, "trial": self.trial, "rungs": {str(number): rung for number, rung in self.rungs.items()},
            "warm": self.warm and self.warm.to_dict(),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TakenCommand:
        """Read what to_dict() returned. Raises ValueError or LookupError for a damaged journal."""
        rungs = {int(number): rung for number, rung in data["rungs"].items()}
        warm = None if data.get("warm") is None else WarmFrom.from_dict(data["warm"])
        return cls(
            Command.from_dict(data["command"]), data["taken_s"], data["refusal"], data["settings"], data["point"], data["trial"],
            rungs, warm,
        )  # fmt: skip


class History:
    """Say what the commands ask of each trial, and of the sweep.

    stopped, held: number -> the command that stopped or paused it. kept: numbers of the trials that
    nothing but an error or a command ends. finished_by: the command after which no trial begins.
    """

    def __init__(self, taken: Iterable[TakenCommand] = ()) -> None:
        self.taken: list[TakenCommand] = []
        self.ids: set[str] = set()
        self.stopped: dict[int, Command] = {}
        self.held: dict[int, Command] = {}
        self.kept: set[int] = set()
        self.finished_by: Command | None = None
        for one in taken:
            self.take(one)

    def take(self, one: TakenCommand) -> None:
        """Take the next command of the journal."""
        self.taken.append(one)
        self.ids.add(one.command.id)
        command, number = one.command, one.command.number
        if one.refusal is not None:
            return
        if command.kind is Kind.STOP:
            self.stopped[number] = command
        elif command.kind is Kind.PAUSE:
            self.held[number] = command
        elif command.kind is Kind.GO_ON:
            self.held.pop(number, None)
        elif command.kind is Kind.KEEP:
            self.kept.add(number)
        elif command.kind is Kind.FINISH:
            self.finished_by = command
        elif command.kind is Kind.ADD:
            self.finished_by = None

    @property
    def rungs(self) -> Mapping[int, int]:
        """Return where the trials stood at the last command."""
        return self.taken[-1].rungs if self.taken else {}

    def queued(self) -> list[TakenCommand]:
        """Return the commands that gave a trial a place in the queue, oldest place first.

        Whether the trial has left the queue since, the journal of its reports says.
        """
        return [one for one in self.taken if one.refusal is None and one.command.kind in (Kind.GO_ON, *ENTERS_A_TRIAL)]


def with_settings(config: SweepConfig, one: TakenCommand) -> SweepConfig:
    """Return the config as this command changes it. Raises InputError if it may not."""
    return apply_resume_changes(config, dict(one.settings)) if one.settings else config


def with_all_settings(config: SweepConfig, taken: Iterable[TakenCommand]) -> SweepConfig:
    """Return the config as these commands of the journal have changed it.

    The file of the config may hold the settings of some of them, or of all. Then an earlier command
    asks for less than it has, and changes nothing.
    """
    for one in taken:
        with suppress(InputError):
            config = with_settings(config, one)
    return config
