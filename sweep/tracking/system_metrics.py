"""What process and card did while a trial trained: sampled in the worker, one line a rung in the trial's folder.

Sampled here and not by MLflow's own monitor, because that one would be a second writer of runs, in each worker; the driver reads
the lines and writes them with everything else. Trials are compared by rungs, so a line has the means between two reports.
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
    "gpu_utilization_percent",  # share of time in which any kernel ran
    "gpu_memory_used_gib",  # of the whole card, other processes included
    "gpu_power_watts",
    "gpu_temperature_celsius",
)
Reading = dict[str, float]


class SystemSampler:
    """Reads every interval_s in a daemon thread, and keeps sums only: between two reports there may be hours."""

    def __init__(self, read: Callable[[], Reading], interval_s: float = SAMPLE_S) -> None:
        self._read, self._interval_s = read, interval_s
        self._sums: dict[str, tuple[int, float, float]] = {}  # count, sum, highest
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="system-sampler", daemon=True).start()

    def take(self) -> Reading:
        """Since the last call: the highest of each memory, the mean of each other number."""
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
    """Reads this process and, with device cuda, its first visible card. What cannot be read is left out: no number is worth a
    trial."""
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
    """Through NVML, which torch asks by the card's place among the visible ones. A card split in parts gives no utilization."""
    import torch  # here, because the driver imports this module and must not load torch

    readings: dict[str, Callable[[], float]] = {
        "gpu_utilization_percent": lambda: torch.cuda.utilization(0),
        "gpu_memory_used_gib": lambda: torch.cuda.device_memory_used(0) / GIB,
        "gpu_power_watts": lambda: torch.cuda.power_draw(0) / 1000.0,
        "gpu_temperature_celsius": lambda: torch.cuda.temperature(0),
    }
    found: Reading = {}
    for name, read in readings.items():
        with suppress(Exception):  # no NVML, no driver, no permission: each library and driver says it differently
            found[name] = float(read())
    return found


def write_system(trial_folder: Path, rung: int, reading: Reading) -> None:
    """Append the line of one rung. A disk that takes no more is not this line's to report."""
    with suppress(OSError), open(trial_folder / FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps({"rung": rung, **reading}) + "\n")


def read_system(trial_folder: Path) -> dict[int, Reading]:
    """By rung; the newest of each, since a trial that was resumed may have passed one twice. A torn line is left out."""
    found: dict[int, Reading] = {}
    with suppress(OSError):
        for line in (trial_folder / FILE).read_bytes().splitlines():
            with suppress(ValueError, TypeError, KeyError, RecursionError):
                values = json.loads(line)
                found[int(values["rung"])] = {name: float(values[name]) for name in NAMES if name in values}
    return found
