"""Listen to the sweep and its trials, and have a background thread write them to MLflow.

The thread keeps a slow, dead or hanging server from delaying training. SQLite alone took up to 3 s
a write with 16 writers. Unwritten updates stay pending, the newest state of each trial only.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.units import counted
from sweep.config.sweep import SweepConfig
from sweep.text import without_password
from sweep.tracking.background_writer import BackgroundWriter, Key
from sweep.tracking.mlflow_runs import NONE, MlflowRuns
from sweep.tracking.sqlite_store import local_uri
from sweep.trials.record import TrialRecord


class NullTracker:
    """Has a tracker's methods and writes nothing, for tracking switched off."""

    def on_sweep_started(
        self, tags: dict[str, str], started_s: float | None = None, numbers: Mapping[str, float] = NONE
    ) -> None:
        """Do nothing."""

    def on_trial_updated(self, record: TrialRecord) -> None:
        """Do nothing."""

    def on_final_seed_updated(self, record: TrialRecord, trial: int) -> None:
        """Do nothing."""

    def on_sweep_finished(
        self, summary: dict[str, Any], best: TrialRecord | None, artifacts: Path | None, ended_s: float | None = None
    ) -> None:
        """Do nothing."""

    def close(self, timeout_s: float = 0.0) -> list[str]:
        """Return no warnings."""
        return []


class Tracker:
    """Takes the newest state of the sweep and its trials; a background thread writes it.

    No method raises, and only close() blocks.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        sweep_name: str,
        sweep_folder: Path,
        resolved_config: dict[str, Any],
        registered_model: str | None = None,
    ) -> None:
        """Start the writer thread.

        uri: MLflow store (`sqlite:///...` or `http://...`); sweep_folder: identifies our parent run
        on resume. registered_model: the model that gets the best adapter as a version; None
        registers nothing.
        """
        self._uri = uri
        self._runs = MlflowRuns(uri, experiment, sweep_name, sweep_folder, resolved_config, registered_model)
        self._finished = False
        self._writer = BackgroundWriter("mlflow-writer", _is_permanent)

    def on_sweep_started(
        self, tags: dict[str, str], started_s: float | None = None, numbers: Mapping[str, float] = NONE
    ) -> None:
        """Create the parent run, or find it again and mark it running.

        tags: git commit, package versions and the like. started_s: when the sweep began, even if
        the server hears of it later; None means now. numbers: what is known before
        the first trial, as metrics of the parent run.
        """
        tags, self._runs.started_s = dict(tags), time.time() if started_s is None else started_s
        self._writer.put(("sweep",), lambda: self._runs.start(tags, numbers))

    def on_trial_updated(self, record: TrialRecord) -> None:
        """Write this state of a trial; of several unwritten states only the last is written."""
        record = replace(record, reports=list(record.reports))
        self._writer.put(("trial", record.number), lambda: self._runs.trial(record))

    def on_final_seed_updated(self, record: TrialRecord, trial: int) -> None:
        """Write this state of a finalist that is trained with another seed. trial: its number in the sweep."""
        record = replace(record, reports=list(record.reports))
        self._writer.put(("final seed", record.number), lambda: self._runs.final_seed(record, trial))

    def on_sweep_finished(
        self, summary: dict[str, Any], best: TrialRecord | None, artifacts: Path | None, ended_s: float | None = None
    ) -> None:
        """Write the summary: its numbers as metrics of the parent, the rest as tags.

        artifacts: folder to store with the best trial's run. ended_s: when the last trial ended;
        None means now.
        """
        summary, end, self._finished = dict(summary), time.time() if ended_s is None else ended_s, True
        self._writer.put(("finish",), lambda: self._runs.finish(summary, best, end))
        # a separate job: a full or missing registry must not leave the sweep RUNNING
        if best is not None and artifacts is not None:
            self._writer.put(("best adapter",), lambda: self._runs.keep_best(summary, best, artifacts))

    def close(self, timeout_s: float = 30.0) -> list[str]:
        """Write what is pending; return one warning for each cause that prevented a write.

        Gives up after timeout_s in which nothing got through. An unfinished sweep is marked KILLED,
        so that it does not look running forever; a resume marks it running again.
        """
        if not self._finished:
            self._writer.put(("finish",), self._runs.interrupt)
        return [self._warning(cause, keys) for cause, keys in self._writer.close(timeout_s).items()]

    def _warning(self, cause: str, keys: list[Key]) -> str:
        some = ", ".join(" ".join(map(str, key)) for key in keys[:5]) + (", ..." if len(keys) > 5 else "")
        warning = f"mlflow at {self._uri}: {counted(len(keys), 'update')} not written ({some}): {cause}; "
        warning += "a resume writes them once that is mended"
        # errors quote the URI, which may hold a password
        return without_password(warning)


def make_tracker(config: SweepConfig, folder: Path) -> Tracker | NullTracker:
    """Return the tracker that the config names. folder: of the sweep; it names the parent run."""
    if config.tracking.name == "none":
        return NullTracker()
    uri = config.tracking.uri or local_uri(folder.parent)
    public = {"uri": config.tracking.public_uri, "on_end": config.tracking.public_on_end}
    shown = config.model_copy(update={"tracking": config.tracking.model_copy(update=public)})
    wanted = config.tracking.registered_model
    model = config.sweep.name if wanted == "auto" else wanted
    return Tracker(uri, config.sweep.name, folder.name, folder, shown.model_dump(mode="json"), model)


def _is_permanent(error: Exception) -> bool:
    """Return True if a retry cannot help: MLflow is missing or refuses the value."""
    return isinstance(error, ImportError) or getattr(error, "error_code", None) in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
