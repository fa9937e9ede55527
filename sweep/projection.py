"""What MLflow shows of a sweep: a parent run for it, a child run for each trial. The only module that knows MLflow.

A projection, not a record: the study and the trial folders hold the truth, and the same state may be written again without
doubling anything.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sweep.outcome import Outcome, TrialRecord

METRICS = {
    "eval_loss": "eval/loss_nats_per_token",
    "best_eval_loss": "eval/best_loss_nats_per_token",
    "train_loss": "train/loss_nats_per_token",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "epoch": "train/epoch",
    "step": "train/optimizer_steps",
    "target_tokens_seen": "train/target_tokens",
    "elapsed_s": "speed/elapsed_s",
    "tokens_per_second": "speed/tokens_per_second",
    "step_time_ms": "speed/step_time_ms",
    "peak_allocated_gib": "memory/peak_allocated_gib",
    "predicted_peak_gib": "memory/predicted_peak_gib",
    "num_out_of_memory": "memory/num_out_of_memory",
    "num_trainable": "adapter/num_trainable_parameters",
}
PLAN = ("micro_batch_size", "activation_checkpointing")  # tags, because they may change while a trial runs
STATUS = {
    Outcome.RUNNING: "RUNNING",
    Outcome.COMPLETE: "FINISHED",
    Outcome.STOPPED: "KILLED",
    Outcome.PRUNED: "KILLED",
    Outcome.INFEASIBLE: "KILLED",
}  # the others: FAILED
# MLflow waits up to 120 s, 7 times, by default. Usage reports are off: they would go to a host outside, from a training machine.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # a create whose answer is lost must not be sent twice: our own retry looks first
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # two lines to stdout at every end of a trial
}
BATCH = 1000  # MLflow's limit of metrics in one call
MAX_VALUE_CHARS = 500  # the shortest limit MLflow's stores ever had for a parameter
NONE: Mapping[str, Any] = MappingProxyType({})
Point = tuple[str, float, int, int]  # name, value, milliseconds, tokens seen


class Projection:
    """What the runs of one sweep must look like. Every method may fail and be called again; used by one thread only."""

    def __init__(self, uri: str, experiment: str, name: str, folder: Path, config: dict[str, Any]) -> None:
        self._uri, self._experiment, self._name, self._config = uri, experiment, name, config
        self._folder = str(folder.absolute())
        # a path may hold quotes, which the filter language lacks
        self._id = hashlib.sha256(self._folder.encode()).hexdigest()[:16]
        self._client: Any = None
        self._experiment_id: str | None = None
        self._parent: str | None = None
        self._children: dict[int, str] = {}
        self._last_rung: dict[int, int] = {}
        self._with_config: set[str] = set()
        self.started_s: float | None = None
        self._ended = False  # what failed is tried again after the others: the start may come after the end

    def start(self, tags: dict[str, str]) -> None:
        parent = self._open()
        if not self._ended:
            self._client.update_run(parent, status="RUNNING")
        self._log(parent, tags={**tags, "sweep.folder": self._folder})
        self._write_config(parent, self._config, "sweep_config.json")

    def trial(self, record: TrialRecord) -> str:
        """Bring a trial's run to this state; returns its MLflow id."""
        run = self._child(record)
        written = self._last_rung.get(record.number, 0)
        metrics = [
            (METRICS[name], value, _milliseconds(record, report), report["tokens_seen"])
            for report in record.reports
            if report["rung"] > written
            for name, value in report.items()
            if name in METRICS and value is not None and not (name == "predicted_peak_gib" and value == 0.0)
        ]
        metrics += _peaks(record)
        tags = {"outcome": record.outcome.value, "error": record.error or "", **_plan(record)}
        self._log(run, metrics, record.params, tags)
        self._write_config(run, record.config, "train_config.json")
        status = STATUS.get(record.outcome, "FAILED")
        if record.outcome is Outcome.RUNNING:
            self._client.update_run(run, status=status)
        else:
            self._client.set_terminated(run, status, end_time=int(1000 * (record.ended_s or time.time())))
        self._last_rung[record.number] = max((report["rung"] for report in record.reports), default=0)
        return run

    def finish(self, summary: dict[str, Any], best: TrialRecord | None, artifacts: Path | None, now_s: float) -> None:
        parent = self._open()
        if best is not None:
            run = self.trial(best)
            self._mark_best(run)
            if artifacts is not None:
                self._client.log_artifacts(run, str(artifacts), artifacts.name)
        numbers = {name: float(value) for name, value in summary.items() if _is_number(value)}
        known = self._client.get_run(parent).data.metrics  # an unchanged number again would be a second point
        metrics = [(name, value, int(1000 * now_s), 0) for name, value in numbers.items() if known.get(name) != value]
        self._log(parent, metrics, tags={name: value for name, value in summary.items() if name not in numbers})
        self._client.set_terminated(parent, "FINISHED", end_time=int(1000 * now_s))
        self._ended = True

    def interrupt(self) -> None:
        if self._parent is not None:
            self._client.set_terminated(self._parent, "KILLED")
            self._ended = True

    def _mark_best(self, run: str) -> None:
        for former in self._search("tags.`sweep.best` = 'true'"):
            if former.info.run_id != run:
                self._client.set_tag(former.info.run_id, "sweep.best", "false")
        self._client.set_tag(run, "sweep.best", "true")

    def _open(self) -> str:
        """Connect, and find or create the parent run; returns its id."""
        if self._parent is None:
            self._connect()
            self._parent = self._find_or_create(self._name, {"sweep.kind": "sweep"}, self.started_s or time.time())
        return self._parent

    def _connect(self, create: bool = True) -> None:
        """create: make the database and the experiment where there is none."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # takes 1.5 to 3 s: here, so that the driver does not wait for it
        from mlflow import MlflowClient

        # 40 lines on the creation of a database, one at each try of a dead server: close() says it once
        for chatty in ("alembic", "mlflow.store.db.utils", "urllib3.connectionpool"):
            logging.getLogger(chatty).setLevel(logging.ERROR)
        location = None
        if self._uri.startswith("sqlite:///"):
            database = Path(self._uri.removeprefix("sqlite:///")).absolute()
            database.parent.mkdir(parents=True, exist_ok=True)
            if create and not database.exists():
                _create(database)
            location = (database.parent / "mlartifacts").as_uri()
        self._client = MlflowClient(self._uri, self._uri)
        experiment = self._client.get_experiment_by_name(self._experiment)
        if experiment is not None:
            self._experiment_id = experiment.experiment_id
        elif create:
            self._experiment_id = self._client.create_experiment(self._experiment, location)

    def _child(self, record: TrialRecord) -> str:
        parent = self._open()
        if record.number not in self._children:
            identity = {"sweep.kind": "trial", "sweep.trial_number": str(record.number), "mlflow.parentRunId": parent}
            started_s = record.started_s or time.time()
            self._children[record.number] = self._find_or_create(f"trial {record.number:04d}", identity, started_s)
        return self._children[record.number]

    def _find_or_create(self, name: str, identity: dict[str, str], started_s: float) -> str:
        """Looks first: on resume the run is there, and so it is where the answer to an earlier create was lost."""
        found = self._search(*(f"tags.`{tag}` = '{value}'" for tag, value in identity.items()))
        if found:
            return found[0].info.run_id
        tags = {**identity, "sweep.id": self._id, "mlflow.source.name": "python -m sweep"}
        return self._client.create_run(self._experiment_id, int(1000 * started_s), tags, name).info.run_id

    def _search(self, *conditions: str) -> list[Any]:
        """The runs of this sweep that meet all conditions, oldest first."""
        condition = " and ".join([f"tags.`sweep.id` = '{self._id}'", *conditions])
        return self._client.search_runs([self._experiment_id], condition, order_by=["attributes.start_time ASC"])

    def _write_config(self, run: str, config: dict[str, Any], name: str) -> None:
        if run not in self._with_config:
            self._client.log_dict(run, config, name)
            self._with_config.add(run)

    def _log(self, run: str, metrics: Sequence[Point] = (), params: Mapping = NONE, tags: Mapping = NONE) -> None:
        from mlflow.entities import Metric, Param, RunTag

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


def _create(database: Path) -> None:
    """An empty store, whole or not at all: a kill while MLflow makes its 40 tables left one that it never opened again."""
    from mlflow import MlflowClient

    aside = database.with_name(f".{database.name}.{os.getpid()}.new")
    aside.unlink(missing_ok=True)
    MlflowClient(f"sqlite:///{aside}").search_experiments()
    try:
        os.link(aside, database)
    except FileExistsError:
        pass  # another sweep in this folder was first
    except OSError:  # a file system without hard links
        aside.rename(database)
    aside.unlink(missing_ok=True)


def _peaks(record: TrialRecord) -> list[Point]:
    """What is known beside the reports: predicted before the start, measured where memory ran out, after the last report."""
    start = int(1000 * (record.started_s or 0.0))
    last = (_milliseconds(record, record.reports[-1]) + 1, record.reports[-1]["tokens_seen"]) if record.reports else (start, 0)
    known = [("predicted_peak_gib", record.predicted_gib, start, 0), ("peak_allocated_gib", record.measured_gib, *last)]
    return [(METRICS[name], value, milliseconds, step) for name, value, milliseconds, step in known if value is not None]


def _plan(record: TrialRecord) -> dict[str, str]:
    """How the trial was computed, by its last report."""
    last = record.reports[-1] if record.reports else {}
    return {f"plan.{name}": str(last[name]) for name in PLAN if name in last}


def _milliseconds(record: TrialRecord, report: dict[str, Any]) -> int:
    """Follows from the record alone: MLflow takes the same point again for one point only if its time is the same too."""
    return int(1000 * ((record.started_s or 0.0) + report["elapsed_s"]))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _text(value: Any) -> str:
    return str(value)[:MAX_VALUE_CHARS]


def share_view(uri: str, experiment: str, folder: Path) -> str | None:
    """Store how MLflow's page shows the trials of this sweep, as its Share button does, under a key that the page takes.

    Returns the page's path with that key; None where nothing of the sweep is in the store.
    """
    projection = Projection(uri, experiment, "", folder, {})
    projection._connect(create=False)
    trials = projection._search("tags.`sweep.kind` = 'trial'") if projection._experiment_id is not None else []
    if not trials:
        return None
    view = _view(projection._id, sorted({name for run in trials for name in run.data.params}))
    key = projection._id
    projection._client.set_experiment_tag(projection._experiment_id, f"mlflow.sharedViewState.{key}", json.dumps(view))
    return f"/#/experiments/{projection._experiment_id}/runs?viewStateShareKey={key}"


def _view(sweep_id: str, params: list[str]) -> dict[str, Any]:
    """The sweep's trials, best first: how each ended, what was sampled, and what it reached."""
    loss = f"metrics.`{METRICS['best_eval_loss']}`"
    shown = [loss, *(f"metrics.`{METRICS[name]}`" for name in ("tokens_per_second", "peak_allocated_gib", "predicted_peak_gib"))]
    return {
        "searchFilter": f"tags.`sweep.id` = '{sweep_id}' and tags.`sweep.kind` = 'trial'",
        "orderByKey": loss,
        "orderByAsc": True,
        "selectedColumns": ["tags.`outcome`", *(f"params.`{name}`" for name in params), *shown, "attributes.`Duration`"],
        "runsHiddenMode": "SHOWALL",
    }
