"""Tune runs the trials: it places them and calls the hooks. The ledger decides, and Tune's own state is never read again."""

from __future__ import annotations

import json
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray import tune
from ray.tune import PlacementGroupFactory
from ray.tune.stopper import Stopper

from engine.config import TrainConfig
from engine.errors import StorageError
from sweep.card_kinds import Label
from sweep.cluster import cluster
from sweep.engine_modules import EngineModules, worker_config
from sweep.ledger import Ledger
from sweep.outcome import Proposal
from sweep.placement import Slots
from sweep.runs import SweepFolder
from sweep.scheduler import LedgerScheduler
from sweep.searcher import LedgerSearcher
from sweep.worker import TrialWorker


def run_trials(
    ledger: Ledger,
    slots: Slots,
    address: str | None,
    folder: SweepFolder,
    engine: EngineModules,
    avoid: Callable[[TrainConfig], tuple[Label, ...]] | None = None,
) -> None:
    """Run until the ledger has no work. Raises, at a safe point, KeyboardInterrupt after SIGINT or SIGTERM, and StorageError
    where the disk takes no more. avoid: labels of the nodes whose cards a config does not fit; none where all are alike."""

    def config_of(proposal: Proposal) -> dict[str, Any]:
        run_dir = str(folder.trial(proposal.number).absolute())
        labels = avoid(proposal.config) if avoid else ()
        return worker_config(proposal, run_dir, slots, engine, ledger.report_timeout_s, labels)

    stop = SafeStop(lambda: ledger.storage_fault)
    with stop.catching(), cluster(slots, address, folder.log), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Tune's advice on its own API, on every start
        tune.Tuner(
            tune.with_resources(TrialWorker, _placement(slots) if avoid else slots.resources_per_trial()),
            tune_config=tune.TuneConfig(
                search_alg=LedgerSearcher(ledger, config_of),
                scheduler=LedgerScheduler(ledger),
                num_samples=-1,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: trial.trial_id,  # the default strings the whole config together
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(folder.ray.absolute()),
                verbose=0,
                stop=stop,
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        ).fit()


def _placement(slots: Slots) -> Callable[[dict[str, Any]], PlacementGroupFactory]:
    """What Tune asks of Ray for a trial, by its config. Workers are reused among trials that may go to the same cards; others
    get a new one, and Tune ends an idle worker that holds what a waiting trial needs."""
    # a trial that waits for the one card it fits must not keep the others from being given away
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(slots.num_slots)

    def place(config: dict[str, Any]) -> PlacementGroupFactory:
        bundle, selector = slots.bundle(map(tuple, json.loads(config["avoid"])))
        return PlacementGroupFactory([bundle], bundle_label_selector=[selector]) if selector else PlacementGroupFactory([bundle])

    return place


class SafeStop(Stopper):
    """Turns a signal or a full disk into an exception between two steps of Tune's loop, so that it never tears a journal write.

    The exception is KeyboardInterrupt, because Tune's loop answers an Exception by waiting for the trials to end.
    """

    def __init__(self, fault: Callable[[], str | None]) -> None:
        """fault: why to stop, or None."""
        self._signalled, self._fault = False, fault

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles it into its own snapshots, which nobody reads

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if self._signalled or self._fault():
            raise KeyboardInterrupt
        return False

    @contextmanager
    def catching(self) -> Iterator[None]:
        """The first signal is kept for the next safe point; a second one acts at once."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def catch(number: int, frame: Any) -> None:
            self._signalled = True
            for caught, handler in before.items():
                signal.signal(caught, handler)

        for number in before:
            signal.signal(number, catch)
        try:
            yield
        except KeyboardInterrupt:
            if self._signalled or not self._fault():
                raise
            raise StorageError(self._fault()) from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
