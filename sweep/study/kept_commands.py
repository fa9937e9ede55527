"""Keep the commands to a sweep in its journal, each in one record before it acts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import InputError
from sweep.folder.sweep_folder import SweepFolder
from sweep.prior.kept_beginning import Attributes
from sweep.steering.history import TakenCommand
from sweep.study.journal import read_attributes

PREFIX = "command "  # the study's attributes: `command 000000` and on


class KeptCommands:
    """Hold the commands that the journal has, in its order."""

    def __init__(self, study: Attributes) -> None:
        self._study, self.taken = study, taken_commands(study.user_attrs)

    @property
    def next_trial(self) -> int:
        """Return the number that the next trial will have."""
        return len(self._study.get_trials(deepcopy=False))

    def add(self, one: TakenCommand) -> None:
        """Enter the command. A kill leaves it whole or not at all."""
        self._study.set_user_attr(f"{PREFIX}{len(self.taken):06d}", one.to_dict())
        self.taken.append(one)


def taken_commands(attributes: Mapping[str, Any]) -> list[TakenCommand]:
    """Return the commands among a study's attributes, in order. Raises InputError if one is damaged."""
    try:
        names = sorted(name for name in attributes if name.startswith(PREFIX))
        return [TakenCommand.from_dict(attributes[name]) for name in names]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError("resume", "study.journal", f"holds a damaged command ({error}); restore the file from a copy") from None


def read_commands(folder: SweepFolder) -> list[TakenCommand]:
    """Return the commands of a sweep, which may be running. Nothing is changed."""
    return taken_commands(read_attributes(folder))
