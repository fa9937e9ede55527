"""Run the trials under Ray Tune.

Tune places them and calls the hooks, and the ledger decides. The sweep never reads Tune's own
state.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any

from ray import tune
from ray.tune import PlacementGroupFactory
from ray.tune.execution import class_cache

from engine.config.trial import TrainConfig
from sweep.cluster.card_kinds import Label
from sweep.cluster.connect import cluster
from sweep.cluster.own_ray import stop_signals_blocked
from sweep.cluster.slots import Slots
from sweep.execution.safe_stop import GRACE_S, SafeStop
from sweep.execution.scheduler import LedgerScheduler
from sweep.execution.searcher import LedgerSearcher
from sweep.execution.worker import TrialWorker
from sweep.execution.worker_config import EngineModules, worker_config
from sweep.folder.sweep_folder import SweepFolder
from sweep.ledger.ledger import Ledger
from sweep.trials.record import Proposal


def run_trials(
    ledger: Ledger,
    slots: Slots,
    address: str | None,
    folder: SweepFolder,
    engine: EngineModules,
    *,
    note: Callable[[str], None] = lambda line: None,
    avoid: Callable[[TrainConfig], tuple[Label, ...]] | None = None,
    inputs: Mapping[str, str] = MappingProxyType({}),
    calibrate: bool = False,
    on_running_out: Callable[[], None] = lambda: None,
    on_turn: Callable[[], None] = lambda: None,
) -> None:
    """Run trials until the ledger has no work.

    After SIGINT or SIGTERM running trials save and end, then this raises KeyboardInterrupt. Raises
    StorageError if the disk is full, and InputsChanged if data or base model changed meanwhile.

    note: shows a line to the user. avoid: returns the labels of the nodes whose cards a config does
    not fit; None if all cards are alike. set_ray_environment says how many trials may then wait.
    inputs: the digests that the sweep recorded, which each trial compares. calibrate: whether a
    worker measures its card before its first trial, if nobody has. on_running_out: see LedgerSearcher. on_turn: see
    LedgerScheduler.
    """

    def config_of(proposal: Proposal) -> dict[str, Any]:
        labels = avoid(proposal.config) if avoid else ()
        return worker_config(proposal, folder, slots, engine, ledger.live.report_timeout_s, labels, inputs, calibrate)

    def num_training() -> int:
        return ledger.live.num_training(folder)

    def wind_down() -> None:
        ledger.wind_down()
        folder.stop_file.touch()
        if num_training():
            note(f"stopping: running trials finish their step and save, at most {GRACE_S:.0f} s; Ctrl-C stops at once")

    folder.stop_file.unlink(missing_ok=True)
    stop = SafeStop(lambda: ledger.storage_fault, wind_down, num_training, changed_inputs=lambda: ledger.changed_inputs)
    with stop.catching(), ExitStack() as stack:
        with stop_signals_blocked():
            stack.enter_context(cluster(slots, address, folder.log, engine.worker_modules))
        stack.callback(folder.stop_file.unlink, missing_ok=True)
        if address is None:
            stack.enter_context(_no_variables_named())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # Tune gives advice on its API at every start
        tune.Tuner(
            tune.with_resources(TrialWorker, _placement(slots) if avoid else slots.resources_per_trial(address is None)),
            tune_config=tune.TuneConfig(
                search_alg=LedgerSearcher(ledger, config_of, on_running_out),
                scheduler=LedgerScheduler(ledger, on_turn),
                num_samples=-1,
                reuse_actors=True,
                # Tune's default name joins the whole config
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(folder.ray.absolute()),
                verbose=0,
                stop=stop,
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        ).fit()


@contextmanager
def _no_variables_named() -> Iterator[None]:
    """Keep Tune from naming environment variables for the workers of our own Ray, which have the driver's.

    For named variables Ray starts a new process, and leaves the one that has loaded the libraries.
    """
    names = {"DEFAULT_ENV_VARS": {}, "ENV_VARS_TO_PROPAGATE": ()}
    before = {name: getattr(class_cache, name) for name in names}
    vars(class_cache).update(names)
    try:
        yield
    finally:
        vars(class_cache).update(before)


def _placement(slots: Slots) -> Callable[[dict[str, Any]], PlacementGroupFactory]:
    """Return the function that says which resources Tune requests from Ray for a trial's config.

    Tune reuses a worker for trials that may run on the same cards, and starts a new one for others.
    It ends an idle worker whose resources a waiting trial needs.
    """
    def place(config: dict[str, Any]) -> PlacementGroupFactory:
        bundle, selector = slots.bundle(map(tuple, json.loads(config["avoid"])))
        return PlacementGroupFactory([bundle], bundle_label_selector=[selector]) if selector else PlacementGroupFactory([bundle])

    return place
