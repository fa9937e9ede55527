"""Name the engine's modules, and build the config that the driver sends to a worker."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from sweep.cluster.card_kinds import Label
from sweep.cluster.slots import Slots
from sweep.folder.sweep_folder import SweepFolder
from sweep.trials.record import Proposal


@dataclass(frozen=True)
class EngineModules:
    """Name the modules that make up an engine. A test passes modules of a fake engine.

    libraries: what a trial loads besides, and a worker may load before it has a trial. None of them
    may initialise CUDA, see sweep/cluster/worker_libraries.py; bitsandbytes does. is_loaded_early:
    whether workers start before there are trials.
    """

    train: str = "engine.training.loop"
    model: str = "engine.model.load"
    command: str = "engine"
    libraries: tuple[str, ...] = ()
    is_loaded_early: bool = True

    def for_trials(self, num_trials: int, slots: Slots) -> EngineModules:
        """Return the modules with no early workers if there are fewer trials than slots: some would never work."""
        return self if num_trials >= slots.num_slots else replace(self, is_loaded_early=False)

    @property
    def worker_modules(self) -> tuple[str, ...]:
        """Return what a worker loads before it has a trial."""
        if not self.is_loaded_early:
            return ()
        return ("sweep.execution.worker", *((*self.libraries, self.train, self.model) if self.libraries else ()))


REAL_ENGINE = EngineModules(libraries=("torch", "transformers.modeling_utils", "transformers.models.auto.modeling_auto"))


def worker_config(
    proposal: Proposal,
    folder: SweepFolder,
    slots: Slots,
    engine: EngineModules,
    report_timeout_s: float | None = None,
    avoid: tuple[Label, ...] = (),
    inputs: Mapping[str, str] = MappingProxyType({}),
    calibrate: bool = False,
) -> dict[str, Any]:
    """Return the plain data that the driver sends to the worker for one trial.

    avoid: labels of the nodes whose cards the trial does not fit. inputs: the digests that the
    sweep recorded. calibrate: whether the worker measures its card first, if nobody has.
    """
    own = proposal.config.lora.start_digest
    if own not in (None, inputs.get("adapter")):  # a warm clone does not start from what the others start from
        inputs = {part: digest for part, digest in inputs.items() if part != "adapter"}
    return {
        "number": proposal.number,
        "num_heard": proposal.num_heard,
        "report_timeout_s": report_timeout_s,
        "trial_folder": str(folder.trial(proposal.number).absolute()),
        "stop_file": str(folder.stop_file.absolute()),
        "device": slots.device,
        "num_threads": slots.cpus_per_trial,
        "engine": {"train": engine.train, "model": engine.model, "command": engine.command},
        "calibrate": calibrate,
        "avoid": json.dumps(avoid),
        # Tune resolves and merges nested dicts in a config, so these are texts
        "inputs": json.dumps(dict(inputs)),
        "train_config": json.dumps(proposal.config.model_dump(mode="json")),
    }
