"""Kill drivers with SIGKILL at random moments and resume their sweeps until they end.

`python -m tests.faults.kills 200` does it 200 times. The drivers are separate processes that
connect to a running Ray. A kill then costs seconds and not a start of Ray.
(tests/sweep/test_sweep.py kills a driver that started its Ray.)

A fifth of the kills may come at any moment after the driver's start. The others may come at any
moment after its first trial has started. Both are uniform over a third of the time that the whole
sweep takes undisturbed, so most sweeps are killed several times.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

from .nodes import Nodes
from .sweeps import GOING_ON, Driver, Sweep, config, only_folder

READY = "sweep folder "  # the driver says so once it holds the lock
SHARE_AT_ANY_MOMENT = 0.2


@dataclass(frozen=True)
class Setting:
    """Describes the sweeps to disturb.

    equal: a disturbed sweep must equal the undisturbed one bit for bit. Otherwise only its
    proposals up to num_same_proposals must be equal, and no result may be lost. full_trials: the
    tokens that end the sweep, in full trials.
    """

    name: str
    sampler: dict[str, Any]
    pruner: dict[str, Any]
    num_slots: int
    equal: bool
    full_trials: float | None = None

    def config(self, output: Path, address: str, seed: int) -> dict[str, Any]:
        cluster = {"address": address, "max_concurrent": self.num_slots}
        sweep = {"seed": seed, "budget": {"full_trials": self.full_trials}}
        return config(output, sampler=self.sampler, pruner=self.pruner, cluster=cluster, sweep=sweep)


TPE = {"name": "tpe", "num_startup_trials": 4}
ONE_SLOT = Setting("one slot, tpe, successive halving", TPE, {"name": "successive_halving"}, 1, True)
RANDOM = Setting("two slots, random, patient", {"name": "random"}, {"name": "patient"}, 2, True)
TWO_SLOTS = Setting("two slots, tpe, successive halving", TPE, {"name": "successive_halving"}, 2, False)
SETTINGS = (ONE_SLOT, RANDOM, ONE_SLOT, TWO_SLOTS)
THAW, NO_PRUNER = {"name": "freeze_thaw"}, {"name": "none"}
ONE_SLOT_THAW = Setting("one slot, freeze and thaw", THAW, NO_PRUNER, 1, True, full_trials=4.0)
TWO_SLOTS_THAW = Setting("two slots, freeze and thaw", THAW, NO_PRUNER, 2, False, full_trials=4.0)
THAW_SETTINGS = (ONE_SLOT_THAW, ONE_SLOT_THAW, TWO_SLOTS_THAW)


@dataclass
class Tally:
    """Counts what the kills led to.

    seconds: from the resume of a killed driver until it holds the lock again.
    """

    num_kills: int = 0
    num_before_folder: int = 0
    num_resumed: int = 0
    num_sweeps: int = 0
    num_must_be_equal: int = 0
    num_equal: int = 0
    num_same_best: int = 0
    num_results: int = 0
    seconds: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def kill_drivers(num_kills: int, seed: int, where: Path, address: str, settings: tuple[Setting, ...] = SETTINGS) -> Tally:
    """Disturb one sweep after the other until there were so many kills."""
    tally, rng = Tally(), random.Random(seed)
    undisturbed = {
        setting.name: _undisturbed(setting, where, address, seed) for setting in {s.name: s for s in settings}.values()
    }
    for setting in cycle(settings):
        if tally.num_kills >= num_kills:
            return tally
        reference, duration_s = undisturbed[setting.name]
        place = where / f"sweep-{tally.num_sweeps}"
        found = _disturbed(setting, place, address, seed, duration_s, rng, tally, num_kills)
        _compare(setting, found, reference, tally)
        if not found.faults:
            shutil.rmtree(place)
        print(f"{tally.num_kills} kills, {tally.num_sweeps} sweeps, faults: {tally.faults}", file=sys.stderr, flush=True)


def _undisturbed(setting: Setting, where: Path, address: str, seed: int) -> tuple[Sweep, float]:
    place = where / setting.name.replace(" ", "-")
    driver = Driver.start(setting.config(place / "sweeps", address, seed), place)
    assert driver.wait_for(READY), driver.text()
    began = time.monotonic()
    assert driver.wait() == 0, driver.text()
    sweep = Sweep.read(only_folder(place / "sweeps"))
    assert not sweep.faults, sweep.faults
    return sweep, time.monotonic() - began


def _disturbed(
    setting: Setting, place: Path, address: str, seed: int, duration_s: float, rng: random.Random, tally: Tally, num_kills: int
) -> Sweep:
    """Run one sweep to its end, killing its driver again and again; count the results."""
    tally.num_sweeps += 1
    whole = setting.config(place / "sweeps", address, seed)
    driver, before, open_kills = Driver.start(whole, place), {}, 0
    while True:
        if tally.num_kills < num_kills:
            _wait_and_kill(driver, place, duration_s, rng)
        driver.wait()
        folder = only_folder(place / "sweeps")
        if driver.process.returncode != -9:
            break
        if folder is None:
            tally.num_before_folder += 1
            driver = Driver.start(whole, place)
            continue
        tally.num_kills += 1
        open_kills += 1
        before |= _results(folder)
        driver = Driver.resume(folder)
        if driver.wait_for(READY):
            tally.seconds.append(time.monotonic() - driver.started_s)
            tally.num_resumed += open_kills
            open_kills = 0
    if driver.process.returncode != 0:
        return Sweep({}, None, [f"exit code {driver.process.returncode}: {driver.text()[-600:]}"])
    found = Sweep.read(folder)
    after = _results(folder)
    lost = [number for number, result in before.items() if result["outcome"] not in GOING_ON and after.get(number) != result]
    return Sweep(found.trials, found.best, found.faults + [f"trial {number} changed after a kill" for number in lost])


def _wait_and_kill(driver: Driver, place: Path, duration_s: float, rng: random.Random) -> None:
    if rng.random() >= SHARE_AT_ANY_MOMENT:
        before = _num_starts(place)
        while _num_starts(place) == before and driver.process.poll() is None:
            time.sleep(0.02)
    time.sleep(rng.uniform(0.0, duration_s / 3.0))
    driver.kill()


def _num_starts(place: Path) -> int:
    return sum(len(file.read_text().splitlines()) for file in place.glob("sweeps/*/trials/*/starts.txt"))


def _results(folder: Path) -> dict[int, Any]:
    return {int(file.parent.name): json.loads(file.read_text()) for file in folder.glob("trials/*/result.json")}


def _compare(setting: Setting, found: Sweep, reference: Sweep, tally: Tally) -> None:
    tally.faults += [f"{setting.name}: {fault}" for fault in found.faults]
    tally.num_results += len(found.trials)
    tally.num_same_best += found.best == reference.best
    if setting.equal:
        tally.num_must_be_equal += 1
        equal = (found.trials, found.best) == (reference.trials, reference.best)
        tally.num_equal += equal
        if not equal and not found.faults:
            tally.faults.append(f"{setting.name}: not the undisturbed sweep: {found} instead of {reference}")


def main(num_kills: int, seed: int = 0) -> Tally:
    with tempfile.TemporaryDirectory(prefix="kills-") as where, Nodes(num_cpus=4) as nodes:
        return kill_drivers(num_kills, seed, Path(where), nodes.address)


if __name__ == "__main__":
    began = time.monotonic()
    tally = main(int(sys.argv[1]))
    print(f"{tally}\n{time.monotonic() - began:.0f} s")
    sys.exit(bool(tally.faults))
