"""Tell a sweep's end, of whatever kind, to the command or address that `tracking.on_end` names.

Both get the same JSON: the command on its standard input, the address as a POST. The command is
started without a shell, and the sweep's exit code does not depend on it.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import urllib.error
import urllib.request
from typing import Any

from engine.config.parsing import load_json
from engine.errors import EngineError, InputError, first_line
from engine.system.child_python import own_environment
from sweep.config.sweep import SweepConfig
from sweep.config.tracking_options import is_address
from sweep.folder.sweep_folder import SweepFolder

INTERRUPTED = 130
STATES = {0: "complete", 1: "no adapter", INTERRUPTED: "stopped"}  # by the sweep's exit code; else failed
COMMAND_S, ADDRESS_S = 60.0, 10.0


def check_on_end(on_end: str | None) -> None:
    """Raise InputError if the command is not on this machine: the sweep's end may be hours away."""
    if on_end is not None and not is_address(on_end) and shutil.which(shlex.split(on_end)[0]) is None:
        allowed = "must begin with a program that is found here, or be an address that begins with https://"
        raise InputError("tracking.on_end", on_end, allowed)


def tell_end(config: SweepConfig, folder: SweepFolder, code: int | None) -> list[str]:
    """Tell the end. Returns a warning if that failed. code: the sweep's exit code, None for an error."""
    on_end = config.tracking.on_end
    if on_end is None:
        return []
    text = json.dumps(_message(config, folder, code))
    try:
        fault = _post(on_end, text) if is_address(on_end) else _start(on_end, text)
    except Exception as error:  # whatever it is, the sweep has ended well
        fault = first_line(error)
    return [] if fault is None else [f"tracking.on_end = {config.tracking.public_on_end}: {fault}"]


def _message(config: SweepConfig, folder: SweepFolder, code: int | None) -> dict[str, Any]:
    """Return what is told: sweep, folder and state; at an end also best trial, its loss, and outcomes."""
    message: dict[str, Any] = {"sweep": config.sweep.name, "folder": str(folder.path), "state": STATES.get(code, "failed")}
    if code not in (0, 1):  # a leaderboard would be of an earlier end
        return message
    try:
        board = load_json(folder.path / "leaderboard.json")
        best = next((row for row in board["trials"] if row["number"] == board["best_trial"]), {})
        message |= {"best_trial": board["best_trial"], "best_eval_loss": best.get("eval_loss"), "outcomes": board["outcomes"]}
    except (EngineError, OSError, LookupError, TypeError):  # the disk may be full
        pass
    return message


def _start(command: str, text: str) -> str | None:
    """Start the command and wait for it; return what went wrong."""
    try:
        done = subprocess.run(
            shlex.split(command), input=text, env=own_environment(), capture_output=True, text=True, timeout=COMMAND_S
        )
    except subprocess.TimeoutExpired:
        return f"ended after {COMMAND_S:.0f} s, because it took longer"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return None if done.returncode == 0 else f"exit code {done.returncode}{f' ({lines[-1]})' if lines else ''}"


def _post(address: str, text: str) -> str | None:
    request = urllib.request.Request(address, text.encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=ADDRESS_S):
            return None
    except urllib.error.HTTPError as error:
        return f"answered {error.code}"
    except OSError as error:
        return first_line(getattr(error, "reason", error))
