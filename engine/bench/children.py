"""Run each system and model in a separate process.

A failure there becomes the row's result and never ends the run.
"""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.bench.model_folder import folder_name
from engine.bench.process import run_python, run_python_all
from engine.bench.rows import Row
from engine.bench.systems import SYSTEMS

CARD = """
import torch
from engine.bench.process import hand_back
hand_back({"card": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"})
"""


def run_rows(rows: list[Row], scratch: Path, timeout_s: float) -> list[dict[str, Any]]:
    """Return for each row the result of `measure`, or {"error": reason}.

    All rows have one system and one model. They share a process and the loaded model if the system
    can change its setting. timeout_s: for each row. scratch: an absolute path, whose model folders
    are used again.
    """
    system = SYSTEMS[rows[0].system]
    if any(importlib.util.find_spec(package) is None for package in system.needs):
        return [{"error": "not installed"}] * len(rows)
    if not system.from_folder:
        return _measured(rows, [], scratch, timeout_s)
    folder, started = scratch / folder_name(rows[0].setting.model), time.perf_counter()
    if not folder.exists():
        done = run_python(["-m", "engine.bench.model_folder", rows[0].setting.model, str(folder)], scratch, timeout_s)
        if "error" in done:
            return [{"error": f"no model folder: {done['error']}"}] * len(rows)
    written = {"checkpoint_s": time.perf_counter() - started}
    alone = [_measured([row], ["--checkpoint", str(folder)], scratch, timeout_s)[0] for row in rows]
    return [{**result, **written} for result in alone]


def _measured(rows: list[Row], more: list[str], scratch: Path, timeout_s: float) -> list[dict[str, Any]]:
    settings = json.dumps([asdict(row.setting) for row in rows])
    arguments = ["-m", "engine.bench", "--child", rows[0].system, "--settings", settings, *more]
    results = run_python_all(arguments, scratch, timeout_s * len(rows))
    # A process that ended early gives its last result to all rows that were to follow.
    return (results + [results[-1]] * len(rows))[: len(rows)]


def card_name(scratch: Path) -> str:
    """Return the card's name, asked in a child.

    A CUDA context in this process would take memory from every row.
    """
    return run_python(["-c", CARD], scratch, 120.0).get("card", "unknown card")
