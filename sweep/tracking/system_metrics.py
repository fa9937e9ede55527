"""Sample process and card in the worker while a trial trains: one line a rung in its folder.

The worker does not use MLflow's own monitor, which would write runs from each worker. Instead the
driver reads the lines and writes them with everything else. A line covers the time between two
reports, because trials are compared by rungs.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from engine.units import GIB

FILE = "system.jsonl"
SAMPLE_S = 2.0
NAMES = (
    "process_cpu_percent",  # 100: one core
    "process_resident_gib",
    "machine_memory_used_gib",
    "gpu_utilization_percent",  # share of time in which any kernel was running
    "gpu_memory_used_gib",  # of the whole card, other processes included
    "gpu_power_watts",
    "gpu_temperature_celsius",
)
Reading = dict[str, float]


class SystemSampler:
    """Reads every interval_s in a daemon thread.

    It keeps sums only, because hours may pass between two reports.
    """

    def __init__(self, read: Callable[[], Reading], interval_s: float = SAMPLE_S) -> None:
        self._read, self._interval_s = read, interval_s
        self._sums: dict[str, tuple[int, float, float]] = {}  # count, sum, highest
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="system-sampler", daemon=True).start()

    def take(self) -> Reading:
        """Return the means since the last call; of a memory, the highest value."""
        with self._lock:
            if not self._sums:
                self._add(self._read())
            sums, self._sums = self._sums, {}
        return {name: top if name.endswith("_gib") else total / count for name, (count, total, top) in sorted(sums.items())}

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            with self._lock:
                self._add(self._read())

    def _add(self, reading: Reading) -> None:
        for name, value in reading.items():
            count, total, top = self._sums.get(name, (0, 0.0, value))
            self._sums[name] = (count + 1, total + value, max(top, value))


def machine_reader(device: str) -> Callable[[], Reading]:
    """Return a function that reads this process and, on cuda, its first visible card.

    It leaves out what it cannot read: no number is worth a trial.
    """
    process = psutil.Process()
    process.cpu_percent()  # the first call has nothing to compare with

    def read() -> Reading:
        found: Reading = {}
        with suppress(psutil.Error, OSError):
            found["process_cpu_percent"] = process.cpu_percent()
            found["process_resident_gib"] = process.memory_info().rss / GIB
            memory = psutil.virtual_memory()
            found["machine_memory_used_gib"] = (memory.total - memory.available) / GIB
        return {**found, **(_card() if device == "cuda" else {})}

    return read


def _card() -> Reading:
    """Read the card through NVML, where torch finds it by its place among the visible cards.

    A card split into MIG parts gives no utilization.
    """
    import torch  # here, because the driver imports this module and must not load torch

    readings: dict[str, Callable[[], float]] = {
        "gpu_utilization_percent": lambda: torch.cuda.utilization(0),
        "gpu_memory_used_gib": lambda: torch.cuda.device_memory_used(0) / GIB,
        "gpu_power_watts": lambda: torch.cuda.power_draw(0) / 1000.0,
        "gpu_temperature_celsius": lambda: torch.cuda.temperature(0),
    }
    found: Reading = {}
    for name, read in readings.items():
        # no NVML, driver or permission: each library raises a different error
        with suppress(Exception):
            found[name] = float(read())
    return found


def write_system(trial_folder: Path, rung: int, reading: Reading) -> None:
    """Append the line of one rung. Ignore a full disk: others report it."""
    with suppress(OSError), open(trial_folder / FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps({"rung": rung, **reading}) + "\n")


def read_system(trial_folder: Path) -> dict[int, Reading]:
    """Return the readings by rung.

    A resumed trial may have passed a rung twice; the newest line counts. Torn lines are skipped.
    """
    found: dict[int, Reading] = {}
    with suppress(OSError):
        for line in (trial_folder / FILE).read_bytes().splitlines():
            with suppress(ValueError, TypeError, KeyError, RecursionError):
                values = json.loads(line)
                found[int(values["rung"])] = {name: float(values[name]) for name in NAMES if name in values}
    return found
