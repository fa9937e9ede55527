"""Write a sweep to MLflow: a parent run for the sweep, a child run for each trial and each final seed.

MLflow holds a projection, not the record: the study and the trial folders hold the truth. Writing
the same state again doubles nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sweep.config.absolute_paths import sqlite_uri
from sweep.tracking.mlflow_names import (
    SLOT_TIMES,
    STATUS,
    Point,
    as_csv,
    description,
    final_seed_identity,
    final_seed_name,
    plan_tags,
    sweep_params,
    sweep_points,
    sweep_tags,
    trial_identity,
    trial_name,
    trial_points,
)
from sweep.tracking.mlflow_registry import register
from sweep.tracking.mlflow_view import BEST, ORDER, shown_best, view
from sweep.tracking.sqlite_store import artifact_folder, database_file, follow_move
from sweep.trials.record import Outcome, TrialRecord

# By default MLflow waits up to 120 s, 7 times. Usage reports are off, because they would leave the
# training machine for an outside host.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    # a create whose answer is lost must not be sent twice: our own retry looks first
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # else MLflow prints two lines to stdout whenever a trial ends
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
BATCH = 1000  # MLflow's limit on metrics in one call
MAX_VALUE_CHARS = 500  # the shortest limit any MLflow store has had for a param
NONE: Mapping[str, Any] = MappingProxyType({})


class MlflowRuns:
    """Writes the runs of one sweep, for one thread.

    Every method may fail and be called again.
    """

    def __init__(
        self, uri: str, experiment: str, name: str, folder: Path, config: dict[str, Any], registered_model: str | None = None
    ) -> None:
        self._uri, self._experiment, self._name, self._config = uri, experiment, name, config
        self._folder, self._registered_model = str(folder.absolute()), registered_model
        # a hash, because a path may hold quotes, which MLflow's filter language cannot escape
        self._id = hashlib.sha256(self._folder.encode()).hexdigest()[:16]
        self._client: Any = None
        self._experiment_id: str | None = None
        self._parent: str | None = None
        self._children: dict[tuple[str, ...], str] = {}
        self._last_rung: dict[str, int] = {}
        self._names: dict[str, str] = {}
        self._with_config: set[str] = set()
        self.started_s: float | None = None
        # The writer retries a failed job after the others. So the start may come after the end, and
        # a trial after it was marked the best.
        self._ended, self._best = False, None

    def start(self, tags: dict[str, str], numbers: Mapping[str, float] = NONE) -> None:
        parent = self._open()
        if not self._ended:
            self._client.update_run(parent, status="RUNNING")
        # at a time that a resume has too: MLflow merges equal points
        points = [(name, value, int(1000 * (self.started_s or 0.0)), 0) for name, value in numbers.items()]
        self._log(parent, points, sweep_params(self._config), {**tags, "sweep.folder": self._folder})
        self._write_config(parent, self._config, "sweep_config.json")

    def trial(self, record: TrialRecord) -> str:
        """Bring a trial's run to this state; return its MLflow id."""
        return self._write(record, trial_identity(record), trial_name(record, is_best=record.number == self._best))

    def final_seed(self, record: TrialRecord, trial: int) -> str:
        """Bring the run of a finalist with another seed to this state; return its id. trial: its number in the sweep."""
        return self._write(record, final_seed_identity(record, trial), final_seed_name(record, trial))

    def _write(self, record: TrialRecord, identity: dict[str, str], name: str) -> str:
        run = self._child(record, identity)
        points = trial_points(record, self._last_rung.get(run, 0))
        tags = {"outcome": record.outcome.value, "error": record.error or "", **plan_tags(record)}
        tags |= {"start": record.warm.text} if record.warm else {}
        self._log(run, points, record.params, tags)
        self._write_config(run, record.config, "train_config.json")
        status = STATUS.get(record.outcome, "FAILED")
        self._rename(run, name, status)
        if record.outcome is not Outcome.RUNNING:
            ended_s = max(record.ended_s or time.time(), record.started_s or 0.0)
            self._client.set_terminated(run, status, end_time=int(1000 * ended_s))
        self._last_rung[run] = max((report.rung for report in record.reports), default=0)
        return run

    def finish(self, summary: dict[str, Any], best: TrialRecord | None, now_s: float) -> None:
        parent = self._open()
        self._best = None if best is None else best.number
        self._mark_best(None if best is None else self.trial(best))
        # an unchanged number would add a second point
        known = self._client.get_run(parent).data.metrics
        numbers = sweep_points(summary).items()
        points = [(name, value, int(1000 * now_s), 0) for name, value in numbers if known.get(name) != value]
        note = description(self._config, best, summary, self._folder)
        self._log(parent, points, tags={**sweep_tags(summary), "mlflow.note.content": note})
        if summary.get("slots"):
            self._client.log_text(parent, as_csv(summary["slots"]), SLOT_TIMES)
        self._client.set_terminated(parent, "FINISHED", end_time=self._end_ms(now_s))
        self._ended = True

    def keep_best(self, summary: dict[str, Any], best: TrialRecord, folder: Path) -> None:
        """Store best/ with the winner's run.

        If a model is to be registered, best/ becomes a version of that model instead.
        """
        run = self._child(best, trial_identity(best))
        if self._registered_model is None:
            self._client.log_artifacts(run, str(folder), folder.name)
            return
        tags = {"sweep.id": self._id, "sweep.folder": self._folder, "sweep.trial_number": str(best.number)}
        text = description(self._config, best, summary, self._folder)
        register(self._client, self._registered_model, run, folder, tags, text)

    def interrupt(self) -> None:
        if self._parent is not None:
            self._client.set_terminated(self._parent, "KILLED", end_time=self._end_ms(time.time()))
            self._ended = True

    def _end_ms(self, now_s: float) -> int:
        """Return the end of the sweep's run, not before its start: someone may have set the clock back."""
        return int(1000 * max(now_s, self.started_s or 0.0))

    def share_view(self, tasks: Sequence[str] = (), order: tuple[str, bool] = ORDER) -> tuple[str, str] | None:
        """Store how MLflow's page shows this sweep's trials, as its Share button does. tasks, order: see `view`.

        Returns the page's path and the key of the view, or None if the store has no trial of the
        sweep. Creates neither store nor run.
        """
        self._connect(create=False)
        trials = [] if self._experiment_id is None else self._search("tags.`sweep.kind` = 'trial'")
        if not trials:
            return None
        params, metrics = [run.data.params for run in trials], {name for run in trials for name in run.data.metrics}
        for name in (BEST, order[0]):  # of an older version's trials, some may lack the best values
            best = shown_best(name, metrics)
            if any(name in run.data.metrics and best not in run.data.metrics for run in trials):
                metrics.discard(best)
        value = json.dumps(view(self._id, params, metrics, tasks, order))
        self._client.set_experiment_tag(self._experiment_id, f"mlflow.sharedViewState.{self._id}", value)
        return f"/#/experiments/{self._experiment_id}/runs", self._id

    def _mark_best(self, run: str | None) -> None:
        """Mark this trial's run as the best, and no other. None: no trial is the best."""
        for former in self._search("tags.`sweep.best` = 'true'"):
            if former.info.run_id != run:
                self._client.set_tag(former.info.run_id, "sweep.best", "false")
                self._rename(former.info.run_id, former.info.run_name.removesuffix(" (best)"), former.info.status)
        if run is not None:
            self._client.set_tag(run, "sweep.best", "true")

    def _rename(self, run: str, name: str, status: str) -> None:
        """Set the run's name, together with a status that may be RUNNING."""
        if self._names.get(run) != name:
            self._client.update_run(run, status, name)
            self._names[run] = name

    def _open(self) -> str:
        """Connect, and find or create the parent run; return its id."""
        if self._parent is None:
            self._connect()
            self._parent = self._find_or_create(self._name, {"sweep.kind": "sweep"}, self.started_s or time.time())
        return self._parent

    def _connect(self, create: bool = True) -> None:
        """Connect to the store. create: make a missing database and experiment."""
        location, database = None, database_file(self._uri)
        if database is not None:
            database.parent.mkdir(parents=True, exist_ok=True)
            if create and not database.exists():
                _create(database)
            follow_move(database)
            location = artifact_folder(database)
        self._client = connect(self._uri)
        experiment = self._client.get_experiment_by_name(self._experiment)
        if experiment is not None:
            self._experiment_id = experiment.experiment_id
            self._find_moved(database, create)
        elif create:
            self._experiment_id = self._client.create_experiment(self._experiment, location)

    def _find_moved(self, database: Path | None, write: bool) -> None:
        """Take the identity that a moved or copied sweep has in the store, which is that of its former path.

        write: only where the store lies next to the folder, because it then came with it. Another
        store may know a sweep of the same name on another machine.
        """
        is_own = database is not None and database.parent == Path(self._folder).parent
        if (write and not is_own) or self._search():
            return
        sweeps = self._client.search_runs([self._experiment_id], "tags.`sweep.kind` = 'sweep'")
        former = [run for run in sweeps if run.info.run_name == self._name and "sweep.id" in run.data.tags]
        if len(former) == 1:
            self._id = former[0].data.tags["sweep.id"]

    def _child(self, record: TrialRecord, identity: dict[str, str]) -> str:
        """Return the run of a trial. identity: the tags that find it again, its kind first."""
        parent, key = self._open(), tuple(identity.values())
        if key not in self._children:
            identity, started_s = {**identity, "mlflow.parentRunId": parent}, record.started_s or time.time()
            self._children[key] = self._find_or_create(" ".join(key), identity, started_s)
        return self._children[key]

    def _find_or_create(self, name: str, identity: dict[str, str], started_s: float) -> str:
        """Return the run with this identity; create it if there is none.

        The run exists after a resume, or if the answer to an earlier create was lost.
        """
        found = self._search(*(f"tags.`{tag}` = '{value}'" for tag, value in identity.items()))
        if found:
            return found[0].info.run_id
        tags = {**identity, "sweep.id": self._id, "mlflow.source.name": "python -m sweep"}
        return self._client.create_run(self._experiment_id, int(1000 * started_s), tags, name).info.run_id

    def _search(self, *conditions: str) -> list[Any]:
        """Return the runs of this sweep that meet all conditions, oldest first."""
        condition = " and ".join([f"tags.`sweep.id` = '{self._id}'", *conditions])
        return self._client.search_runs([self._experiment_id], condition, order_by=["attributes.start_time ASC"])

    def _write_config(self, run: str, config: dict[str, Any], name: str) -> None:
        if run not in self._with_config:
            self._client.log_dict(run, config, name)
            self._with_config.add(run)

    def _log(self, run: str, metrics: Sequence[Point] = (), params: Mapping = NONE, tags: Mapping = NONE) -> None:
        from mlflow.entities import Metric, Param, RunTag  # here, because loading takes seconds

        points = [Metric(*point) for point in metrics]
        self._client.log_batch(
            run,
            points[:BATCH],
            [Param(name, _text(value)) for name, value in params.items()],
            [RunTag(name, _text(value)) for name, value in tags.items()],
            synchronous=True,
        )
        for start in range(BATCH, len(points), BATCH):
            self._client.log_batch(run, points[start : start + BATCH], synchronous=True)


def connect(uri: str) -> Any:
    """Return a client of the store that tries once and prints nothing."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # here, because loading mlflow takes 1.5 to 3 s and the driver must not wait for it
    from mlflow import MlflowClient

    # else 40 lines when a database is created, and one for each try of a dead server, which
    # close() reports once
    for chatty in ("alembic", "mlflow.store.db.utils", "urllib3.connectionpool"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    return MlflowClient(uri, uri)


def _create(database: Path) -> None:
    """Create an empty store, whole or not at all.

    A kill while MLflow made its 40 tables used to leave a store that it never opened again.
    """
    aside = database.with_name(f".{database.name}.{os.getpid()}.new")
    aside.unlink(missing_ok=True)
    connect(sqlite_uri(aside)).search_experiments()
    try:
        os.link(aside, database)
    except FileExistsError:
        pass  # another sweep in this folder was first
    except OSError:  # a file system without hard links
        aside.rename(database)
    aside.unlink(missing_ok=True)


def _text(value: Any) -> str:
    return str(value)[:MAX_VALUE_CHARS]
