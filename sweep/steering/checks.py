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
    if record is None:
        raise command.refused(f"this sweep has no trial {command.number}; `status` lists its trials")
    if (why := why_not(command.kind, record, history)) is not None:
        raise command.refused(why)


def why_not(kind: Kind, record: TrialRecord, history: History) -> str | None:
    """Return why the trial cannot take such a command; None if it can."""
    number = record.number
    if kind is Kind.CLONE:
        return None
    if record.source is not None:
        return f"trial {number} is of an earlier sweep, {record.source}, and is not trained here"
    if record.outcome not in GOING_ON:
        return f"trial {number} is over: {record.outcome}{_instead(kind, number)}"
    if number in history.stopped:
        return f"trial {number} is about to stop: {history.stopped[number].who} asked for that"
    is_waiting = number in history.held or record.outcome is Outcome.PAUSED
    if kind is Kind.PAUSE and (number in history.held or record.outcome is Outcome.STOPPED):
        return f"trial {number} does not run: {'PAUSED' if number in history.held else record.outcome}"
    if kind is Kind.GO_ON and not is_waiting:
        larger = "; a larger budget continues it" if record.outcome is Outcome.STOPPED else ""
        return f"trial {number} is not paused: {record.outcome}{larger}"
    return None


def refusals(record: TrialRecord, history: History) -> dict[str, str]:
    """Return why the trial cannot take a command as it stands, by command. Those that it can take are not there."""
    found = {str(kind): why_not(kind, record, history) for kind in TAKES_A_TRIAL} | {WARM_CLONE: why_no_adapter(record)}
    return {words: why for words, why in found.items() if why is not None}


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
