"""Measure the winner again on one of the sweep's slots in an existing cluster.

The driver's machine may have no card.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from engine.command_answers import AdapterEvaluation
from engine.config.trial import TrainConfig
from engine.errors import EngineError, first_line
from sweep.cluster.card_kinds import Label
from sweep.cluster.connect import cluster
from sweep.cluster.slots import Slots
from sweep.execution.engine_commands import CommandFailed, evaluate

MAX_RETRIES = 2  # Ray runs the task again if its node is lost


def evaluate_on_a_slot(
    slots: Slots,
    address: str,
    log: Path,
    avoid: Callable[[TrainConfig], tuple[Label, ...]] | None,
    inputs: Mapping[str, str] | None = None,
) -> Callable[[TrainConfig, Path, str, int], AdapterEvaluation]:
    """Return `engine_commands.evaluate`, to be run where a trial of the same config would run.

    avoid, inputs: see `sweep.execution.tuner.run_trials`.
    """

    def there(config: TrainConfig, adapter: Path, module: str, num_examples: int = 0) -> AdapterEvaluation:
        bundle, selector = slots.bundle(avoid(config) if avoid else ())
        options: dict[str, Any] = {"num_cpus": bundle.get("CPU", 0), "num_gpus": bundle.get("GPU", 0), "max_retries": MAX_RETRIES}
        if selector:
            options["label_selector"] = selector
        with cluster(slots, address, log):
            try:
                task = ray.remote(evaluate).options(**options)
                return ray.get(task.remote(config, adapter.absolute(), module, num_examples, inputs))
            except RayTaskError as error:
                if isinstance(error.cause, EngineError):
                    raise error.cause from None
                raise CommandFailed(first_line(error), 1) from error
            except RayError as error:
                raise CommandFailed(f"on the cluster: {first_line(error)}", 1) from error

    return there
