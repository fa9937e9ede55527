"""Run a driver process with the fake engine.

`python -m tests.support.fake_driver start CONFIG.json | resume FOLDER [OVERRIDES as JSON]`

If it finds GPUs, it predicts that a trial needs as many GiB as its rank.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

from engine.errors import OutOfMemory
from engine.planning.compute_plan import ComputePlan
from engine.shape.policies import Policy
from engine.system.command_line import run
from sweep import driver
from sweep.cli.lasting_output import lasting_output
from sweep.cluster.early_ray import end_process
from sweep.execution.worker_config import EngineModules
from sweep.plan import feasibility

ENGINE = EngineModules(train="tests.support.fake_engine", model="tests.support.fake_engine", command="tests.support.fake_engine")


def make_compute_plan(config, shape, card, host_gib):
    """Replace engine.planning.planner.make_compute_plan."""
    need = float(config.lora.rank)
    if need > card.memory_gib:
        raise OutOfMemory(f"needs at least {need:.1f} GiB (predicted), {card.memory_gib:.1f} GiB are allowed", need)
    return ComputePlan(1, Policy.KEEP, 0, 0, 0.0, memory=SimpleNamespace(peak_gib=need, reserve_gib=0.0, phases={}))


def main(command: str, argument: str, overrides: str = "{}") -> int:
    os.environ["FAKE_TORCH"] = "1"  # for the workers
    feasibility.make_compute_plan = make_compute_plan
    if command == "start":
        return run(lambda: driver.start(json.loads(Path(argument).read_text()), engine=ENGINE), output=lasting_output)
    return run(lambda: driver.resume(argument, json.loads(overrides), engine=ENGINE), output=lasting_output)


if __name__ == "__main__":
    end_process(main(*sys.argv[1:]))
