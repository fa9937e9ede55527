"""Each row in a process of its own: what goes wrong there is the row's result, never the run's end."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

from engine.bench.checkpoint import folder_name
from engine.bench.process import run_python
from engine.bench.rows import Row
from engine.bench.systems import SYSTEMS

CARD = """
import torch
from engine.bench.process import hand_back
hand_back({"card": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"})
"""


def run_row(row: Row, scratch: Path, timeout_s: float) -> dict[str, Any]:
    """What `measure` returned, or {"error": reason}. scratch: an absolute path; model folders found in it are used again."""
    system = SYSTEMS[row.system]
    if any(importlib.util.find_spec(package) is None for package in system.needs):
        return {"error": "not installed"}
    arguments = ["-m", "engine.bench", "--child", row.system, *row.setting.flags()]
    if not system.from_folder:
        return run_python(arguments, scratch, timeout_s)
    folder, started = scratch / folder_name(row.setting.model), time.perf_counter()
    if not folder.exists():
        done = run_python(["-m", "engine.bench.checkpoint", row.setting.model, str(folder)], scratch, timeout_s)
        if "error" in done:
            return {"error": f"no model folder: {done['error']}"}
    written = {"checkpoint_s": time.perf_counter() - started}
    return {**run_python([*arguments, "--checkpoint", str(folder)], scratch, timeout_s), **written}


def card(scratch: Path) -> str:
    """Asked in a child: a CUDA context in this process would take memory from every row."""
    return run_python(["-c", CARD], scratch, 120.0).get("card", "unknown card")
