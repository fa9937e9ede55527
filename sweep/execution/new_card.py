"""Have a card that is new on this machine measured before its first trial, once a node."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine.planning.known_cards import measured_here
from sweep.execution.engine_commands import CommandFailed, calibrate

_asked: set[str] = set()  # cards that this process had measured, or tried to


def measure_new_card(card: str, module: str, say: Callable[[str], None]) -> str | None:
    """Have the card measured unless that has been done; return one line if it failed.

    The first process of a node does it, the others wait. A card that cannot be measured is
    predicted from what is known of it. card: as torch names it. module: the engine's command. say:
    shows a line of progress.
    """
    known = measured_here(card)
    if card in _asked or (known is not None and known.is_complete):
        return None
    _asked.add(card)
    say(f"{card} is new here and gets measured, for predictions; cluster.calibrate=false leaves it out")
    try:
        calibrate(module, say)
    except CommandFailed as error:
        return f"the card was not measured: {error.line}"
    return None


def measure_workers_card(spec: Mapping[str, Any]) -> None:
    """Have a worker's card measured if its trial's config asks for that; Ray's log shows it."""
    if not spec.get("calibrate") or spec["device"] != "cuda":
        return
    import torch  # the driver imports this module and must not load torch

    if torch.cuda.is_available():
        fault = measure_new_card(torch.cuda.get_device_name(), spec["engine"]["command"], _log)
        if fault is not None:
            _log(f"WARNING: {fault}")


def _log(line: str) -> None:
    print(line, flush=True)
