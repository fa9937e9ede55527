"""Steer a sweep, running or not: `python -m sweep.control <sweep folder> COMMAND ...`.

The command leaves a file in the sweep folder, and the driver takes it. Where no driver works, the
next resume does.
"""

from __future__ import annotations

import sweep.cli.no_foreign_modules  # noqa: F401 (must be the first)

# isort: split
import argparse
import getpass
import shlex
import socket
import sys
import time
from datetime import datetime
from pathlib import Path

from engine.errors import EngineError, printable
from engine.system.command_line import run
from sweep.config.sweep import SweepConfig
from sweep.folder.sweep_folder import SweepFolder
from sweep.space.parse import parse_space
from sweep.steering.checks import changed_settings, check_trial, own_point
from sweep.steering.command import ENTERS_A_TRIAL, TAKES_A_TRIAL, Command, parse_words
from sweep.steering.history import History, TakenCommand, with_settings
from sweep.steering.inbox import new_name, send, unread
from sweep.study.begun_with import read_effective_config
from sweep.study.journal import read_records
from sweep.study.kept_commands import read_commands
from sweep.text import number, params_text
from sweep.trials.record import Outcome, TrialRecord

STATUS = "status"
PATIENCE_S = 20.0  # the driver looks twice a second, and plans of large models take seconds
LOOK_EVERY_S = 0.1
COMMANDS = """commands:
  status                                what runs, what waits, and who asked for what (without COMMAND too)
  add 8                                 try eight trials more
  stop 3                                end trial 3 as PRUNED; it saves first
  pause 3                               let trial 3 wait from its next step on, its slot goes to another one
  go-on 3                               let a paused trial go on
  clone 3 optim.learning_rate=1e-4      try trial 3 again with other values, from zero
  clone 3 --warm optim.learning_rate=1e-4   the same, beginning with the adapter that trial 3 has now
  try lora.rank=64 ...                  try a point of the space next; fields that it lacks are completed
  keep 3                                let no pruner end trial 3
  budget gpu_hours=8                    set a limit of sweep.budget; null: no limit
  finish                                begin no trial any more, and end after what runs"""


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0 done or recorded, 2 refused or bad input."""
    return run(lambda: _main(_options(arguments)))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sweep.control", description="Steer a sweep, whether it runs or not.", epilog=COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folder", help="sweep folder")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND ...", help="see below; default: status")
    return parser.parse_args(arguments)


def _main(options: argparse.Namespace) -> int:
    folder, words = SweepFolder.open(options.folder, "folder"), options.command or [STATUS]
    if words == [STATUS]:
        return _show(folder)
    command = parse_words(words, sender(), time.time(), new_name(time.time_ns()))
    check(folder, command)
    file = send(folder, command)
    return _answer(folder, command, file)


def check(folder: SweepFolder, command: Command) -> None:
    """Raise InputError if the sweep cannot take the command as it stands now. The driver checks again."""
    config, history = read_effective_config(folder), History(read_commands(folder))
    record: TrialRecord | None = None
    if command.kind in TAKES_A_TRIAL:
        record = next((record for record in _records(folder) if record.number == command.number), None)
        check_trial(command, record, history)
    settings = changed_settings(command, config)
    with_settings(config, TakenCommand(command, 0.0, settings=settings))
    if command.kind in ENTERS_A_TRIAL:
        own_point(command, record, parse_space(config.space), config.base().model_dump(mode="json"))


def _answer(folder: SweepFolder, command: Command, file: Path) -> int:
    """Wait until the driver has taken the command, and say what became of it."""
    deadline_s = time.monotonic() + PATIENCE_S
    while (runs := folder.is_driven()) and file.exists() and time.monotonic() < deadline_s:
        time.sleep(LOOK_EVERY_S)
    if file.exists():
        taken_by = "the driver has not answered yet; `status` shows when it has" if runs else _resume_line(folder)
        print(f"recorded: {command.text}; {taken_by}")
        return 0
    taken = next((one for one in read_commands(folder) if one.command.id == command.id), None)
    if taken is None:
        raise EngineError(f"the driver took no command from {file}; send it again")
    if taken.refusal is not None:
        raise EngineError(taken.refusal)
    print(f"done: {taken.text}")
    return 0


def _resume_line(folder: SweepFolder) -> str:
    return f"no driver works in this folder now; go on with: python -m sweep {shlex.quote(f'resume={folder.path}')}"


def _show(folder: SweepFolder) -> int:
    """Print trials and commands."""
    history = History(read_commands(folder))
    config, records = read_effective_config(folder), _records(folder)
    num_rungs = len(config.train.report_grid())
    print(f"{folder.path}: {'running' if folder.is_driven() else 'no driver works here now'}; {_counts(config, records)}")
    for record in records:
        mark = ", ".join(filter(None, [_asked(record, history), "kept" if record.number in history.kept else ""]))
        rung = f"{len(record.reports)}/{num_rungs}"
        outcome = f"{record.outcome}{f' ({mark})' if mark else ''}"
        cells = f"{rung:>7}  {number(record.score, '.4f'):>9}  {outcome:<13}"
        print(f"trial {record.number:3d}  {cells}  {params_text(record.params)}{record.warm_text}")
    for one in history.taken:
        print(f"{_time(one.command.sent_s)}  {one.text}")
    for _, command in unread(folder):
        text = command if isinstance(command, str) else f"{_time(command.sent_s)}  {command.text} ({command.who})"
        print(f"{printable(text)}: waits for a driver")
    return 0


def _counts(config: SweepConfig, records: list[TrialRecord]) -> str:
    own = [record.outcome for record in records if record.source is None]
    counts = ", ".join(f"{own.count(outcome)} {outcome}" for outcome in Outcome if outcome in own)
    return f"{counts or 'no trial yet'} of {config.sweep.num_trials} asked for"


def _asked(record: TrialRecord, history: History) -> str:
    """Return what a command still asks of the trial, or what it did."""
    if record.number in history.stopped:
        return "stops" if record.outcome is Outcome.RUNNING else ""
    if record.number in history.held and record.outcome in (Outcome.RUNNING, Outcome.PAUSED):
        return "pauses" if record.outcome is Outcome.RUNNING else "until go-on"
    return ""


def _records(folder: SweepFolder) -> list[TrialRecord]:
    return read_records(folder, lambda params: {})[1]


def sender() -> str:
    """Return user and machine, for people."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = "someone"
    return printable(f"{user}@{socket.gethostname()}")


def _time(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"


if __name__ == "__main__":
    sys.exit(main())
