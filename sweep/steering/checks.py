"""Refuse a command that makes no sense for the sweep as it stands, in one line.

The user's process asks before it sends a command, and the driver before it takes one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import InputError
from sweep.config.resume_changes import NUM_TRIALS
from sweep.config.sweep import SweepConfig
from sweep.prior.own_points import read_own_points
from sweep.prior.whole_points import completed
from sweep.space.space import Space
from sweep.steering.command import ENTERS_A_TRIAL, TAKES_A_TRIAL, WARM, Command, Kind
from sweep.steering.history import History
from sweep.steering.parent_adapter import check_parent, why_no_adapter
from sweep.trials.record import GOING_ON, Outcome, TrialRecord

POINT = "point 1: "
WARM_CLONE = f"{Kind.CLONE} {WARM}"


def check_trial(command: Command, record: TrialRecord | None, history: History) -> None:
    """Raise InputError if the trial that the command names cannot take it. record: None if there is none."""
    number, kind = command.number, command.kind
    if record is None:
        raise command.refused(f"this sweep has no trial {number}; `status` lists its trials")
    if kind is Kind.CLONE:
        return
    if record.source is not None:
        raise command.refused(f"trial {number} is of an earlier sweep, {record.source}, and is not trained here")
    if record.outcome not in GOING_ON:
        raise command.refused(f"trial {number} is over: {record.outcome}{_instead(kind, number)}")
    if number in history.stopped:
        raise command.refused(f"trial {number} is about to stop: {history.stopped[number].who} asked for that")
    is_waiting = number in history.held or record.outcome is Outcome.PAUSED
    if kind is Kind.PAUSE and (number in history.held or record.outcome is Outcome.STOPPED):
        raise command.refused(f"trial {number} does not run: {'PAUSED' if number in history.held else record.outcome}")
    if kind is Kind.GO_ON and not is_waiting:
        larger = "; a larger budget continues it" if record.outcome is Outcome.STOPPED else ""
        raise command.refused(f"trial {number} is not paused: {record.outcome}{larger}")


def refusals(record: TrialRecord, history: History) -> dict[str, str]:
    """Return why the trial cannot take a command as it stands, by command. Those that it can take are not there."""
    found: dict[str, str] = {}
    for kind in TAKES_A_TRIAL:
        try:
            check_trial(Command(kind, f"{kind} {record.number}", record.number), record, history)
        except InputError as error:
            found[str(kind)] = error.allowed
    if (why := why_no_adapter(record)) is not None:
        found[WARM_CLONE] = why
    return found


def changed_settings(command: Command, config: SweepConfig) -> dict[str, Any]:
    """Return the settings (dotted path -> value) that the command gives the sweep; empty for none."""
    if command.kind is Kind.BUDGET:
        return {f"sweep.budget.{name}": value for name, value in command.values.items()}
    if command.kind is Kind.ADD:
        return {NUM_TRIALS: config.sweep.num_trials + command.number}
    return {NUM_TRIALS: config.sweep.num_trials + 1} if command.kind in ENTERS_A_TRIAL else {}


def own_point(command: Command, record: TrialRecord | None, space: Space, base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the params of the trial that `try` or `clone` asks for.

    record: the cloned trial, None for `try`. base: the base config as plain data. Raises InputError
    for what is no point of the space, and if a warm clone cannot begin with that trial's adapter.
    """
    parent = record.params if record else {}
    try:
        (given,) = read_own_points([command.values], space, base)
        whole = completed(space, base, {**parent, **given})
        if lost := [path for path in given if path not in whole]:
            raise command.refused(f"trial {command.number} does not vary {lost[0]}")
        clone = space.apply(base, whole)
    except InputError as error:
        raise command.refused(error.allowed.removeprefix(POINT)) from None
    if command.warm:
        check_parent(command, record, space.apply(base, parent), clone)
    return whole


def _instead(kind: Kind, number: int | None) -> str:
    return f"; `clone {number} ...` begins another one like it" if kind is Kind.GO_ON else ""
