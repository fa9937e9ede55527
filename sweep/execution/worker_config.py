"""Where the engine is: the one seam between the two halves at run time. No torch, no ray."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from sweep.cluster.card_kinds import Label
from sweep.cluster.slots import Slots
from sweep.folder.sweep_folder import SweepFolder
from sweep.trials.record import Proposal


@dataclass(frozen=True)
class EngineModules:
    """Names of the modules that make up an engine: a test puts its own in."""

    train: str = "engine.training.loop"
    model: str = "engine.model.load"
    command: str = "engine"


REAL_ENGINE = EngineModules()


def worker_config(
    proposal: Proposal,
    folder: SweepFolder,
    slots: Slots,
    engine: EngineModules,
    report_timeout_s: float | None = None,
    avoid: tuple[Label, ...] = (),
) -> dict[str, Any]:
    """What the driver ships to the worker for one trial: plain data. avoid: labels of nodes whose cards it does not fit."""
    return {
        "number": proposal.number,
        "num_heard": proposal.num_heard,
        "report_timeout_s": report_timeout_s,
        "trial_folder": str(folder.trial(proposal.number).absolute()),
        "stop_file": str(folder.stop_file.absolute()),
        "device": slots.device,
        "num_threads": slots.cpus_per_trial,
        "engine": asdict(engine),
        "avoid": json.dumps(avoid),
        # text, because Tune resolves and merges nested dicts in a config
        "train_config": json.dumps(proposal.config.model_dump(mode="json")),
    }
