"""Check at the start whether MLflow can work, instead of a warning after the last trial.

What certainly cannot work is refused. A server that does not answer now may answer later, so that
is a warning.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from engine.errors import InputError, first_line
from sweep.config.sweep import SweepConfig
from sweep.text import without_password
from sweep.tracking.mlflow_runs import connect
from sweep.tracking.sqlite_store import database_file, deleted_fault, find_fault, local_uri

PATIENCE_S = 15.0
WAY_OUT = "tracking.name=none runs without MLflow"
NO_ACCESS = ("UNAUTHENTICATED", "PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED")
CERTAIN = re.compile(r"error code [34]\d\d|SSLError|valid JSON|unsupported URI|No module named|Can't load plugin")
STARTED = "sweep.last_started"


def check_store(config: SweepConfig, folder: Path) -> list[str]:
    """Return warnings; raise InputError if nothing could be written to the sweep's MLflow store.

    folder: the sweep folder's parent, where the default store lies. A server gets the experiment
    already here, because only a write shows that it may be written.
    """
    if config.tracking.name == "none":
        return []
    uri = config.tracking.uri or local_uri(folder)
    file = database_file(uri)
    if file is not None:
        fault, warnings = find_fault(file, config.sweep.name), []
    else:
        fault, warnings = _ask(uri, config)
    if fault is not None:
        raise InputError("tracking.uri", without_password(uri), f"{without_password(fault)}; {WAY_OUT}")
    return [without_password(warning) for warning in warnings]


def _ask(uri: str, config: SweepConfig) -> tuple[str | None, list[str]]:
    """Return the fault of a server, if it has one, and warnings."""
    if urlsplit(uri).scheme in ("http", "https") and not urlsplit(uri).hostname:
        return "must name a server", []
    answer = _answer_of(lambda: _try(connect(uri), config.sweep.name))
    if isinstance(answer, str):
        return answer, []
    if answer is not None:
        fault, line = _fault(answer), first_line(answer)
        warning = f"mlflow at {uri} does not answer now ({line}); what it misses is written later"
        return (fault, []) if fault else (None, [warning])
    wanted = config.tracking.registered_model
    name = config.sweep.name if wanted == "auto" else wanted
    refused = None if name is None else _answer_of(lambda: _try_registry(connect(uri), name))
    if isinstance(refused, Exception) and _fault(refused):
        way_out = "tracking.registered_model=null registers none"
        return None, [f"mlflow at {uri} will register no model ({first_line(refused)}); {way_out}"]
    return None, []


def _answer_of(question: Callable[[], str | None]) -> str | Exception | None:
    """Return what the question returns or raises. A server that hangs gets PATIENCE_S."""
    answers: list[str | Exception | None] = []

    def ask() -> None:
        try:
            answers.append(question())
        except Exception as error:  # each library under MLflow raises its own
            answers.append(error)

    thread = threading.Thread(target=ask, name="mlflow-check", daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return answers[0] if answers else TimeoutError(f"no answer within {PATIENCE_S:g} s")


def _try(client: Any, name: str) -> str | None:
    """Find or make the experiment and write to it. Returns a fault that is no exception."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        client.create_experiment(name)
        return None
    if experiment.name != name:
        return "must be an MLflow server; it answers as something else"
    if experiment.lifecycle_stage == "deleted":
        return deleted_fault(name, experiment.experiment_id)
    client.set_experiment_tag(experiment.experiment_id, STARTED, datetime.now(UTC).isoformat(timespec="seconds"))
    return None


def _try_registry(client: Any, name: str) -> None:
    client.search_registered_models(f"name = '{name}'", max_results=1)


def _fault(error: Exception) -> str | None:
    """Return what is wrong with the store, or None if a later try may succeed."""
    code, line = getattr(error, "error_code", None), first_line(error)
    if "out-of-date database schema" in str(error):
        return f"has the tables of another version of MLflow ({line})"
    if code in NO_ACCESS:
        where = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        return f"must let this user write ({line}); {where}"
    if code == "ENDPOINT_NOT_FOUND" or CERTAIN.search(str(error)):
        return f"must be an MLflow server or database ({line})"
    return None
