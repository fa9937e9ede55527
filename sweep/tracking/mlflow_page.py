"""MLflow's page for reading alone: its web application behind a gate that admits requests that only look.

`mlflow server` brings more than a page: an assistant with a shell tool, a gateway, webhooks, jobs, and calls that write.
None asks for a password, and every user of the machine reaches 127.0.0.1. An experiment could even be created whose artifacts
lie in another user's folder, and be read through the server. So the gate has a list of what the page needs; all else is 403.
"""

from __future__ import annotations

import http.client
import json
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

WsgiApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
_API = r"/(?:ajax-)?api/[23]\.0/mlflow/"
_ID = r"[\w.\-]+"
READS = re.compile(
    r"/|/health|/version|/(?:static-files|build)/.*|(?:/model-versions)?/get-artifact|/graphql|"
    rf"{_API}(?:artifacts/list|server-info|runs/get|traces|unified-traces|traces/get|get-trace-artifact|"
    r"experiments/(?:get|get-by-name|search)|metrics/get-history(?:-bulk|-bulk-interval)?|"
    r"(?:model-versions|registered-models)/(?:get|search|get-download-uri|get-latest-versions|alias)|"
    rf"logged-models/{_ID}(?:/artifacts/(?:directories|files))?|datasets/search|"
    r"scorers/(?:list|get|versions)|label-schemas/list|review-queues/list)"
)
SEARCHES = re.compile(
    rf"/graphql|{_API}(?:(?:experiments|runs|logged-models|traces|datasets)/search|experiments/search-datasets|"
    r"registered-models/get-latest-versions)"
)
CONDITIONS = ("HTTP_IF_NONE_MATCH", "HTTP_IF_MODIFIED_SINCE")
HAS_OPENED = b'<script>localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true")</script>'
"""What MLflow 3.17 notes in the browser once the assistant's panel has opened by itself."""
PROBES = (
    ("POST", "/ajax-api/3.0/mlflow/assistant/message"),
    ("GET", "/ajax-api/3.0/mlflow/assistant/config"),
    ("POST", "/ajax-api/2.0/mlflow/experiments/create"),
    ("GET", "/ajax-api/3.0/mlflow/gateway/secrets/list"),
)
"""Requests that must not be served; see `answers_what_it_must_not`."""


def is_admitted(method: str, path: str) -> bool:
    """Tell whether a request only looks: a page, a file, a search."""
    allowed = {"GET": READS, "HEAD": READS, "POST": SEARCHES}.get(method)
    return allowed is not None and allowed.fullmatch(path) is not None


def read_only(app: WsgiApp) -> WsgiApp:
    """Wrap a WSGI application; a request that is not admitted gets 403 and never reaches it."""

    def gate(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if is_admitted(environ["REQUEST_METHOD"], environ.get("PATH_INFO", "")):
            return app(environ, start_response)
        text = json.dumps({"error_code": "PERMISSION_DENIED", "message": "this page shows a sweep and changes nothing"}).encode()
        start_response("403 Forbidden", [("Content-Type", "application/json"), ("Content-Length", str(len(text)))])
        return [text]

    return gate


def without_panel(app: WsgiApp) -> WsgiApp:
    """Wrap MLflow's application: the page does not open the panel of its assistant, which this server lacks, at a first visit.

    Another version of MLflow may ignore the note; then its user closes the panel.
    """
    from werkzeug.wrappers import Response  # MLflow's own web library, for its server's process alone

    def page(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ.get("PATH_INFO") != "/" or environ["REQUEST_METHOD"] != "GET":
            return app(environ, start_response)
        whole = {name: value for name, value in environ.items() if name not in CONDITIONS}
        answer = Response.from_app(app, whole)
        if answer.status_code == 200:
            answer.direct_passthrough = False
            answer.set_data(answer.get_data().replace(b"<head>", b"<head>" + HAS_OPENED, 1))
            answer.headers.pop("ETag", None)
        return answer(environ, start_response)

    return page


def make_app() -> WsgiApp:
    """MLflow's Flask application behind the gate. The store comes from MLFLOW_BACKEND_STORE_URI."""
    from mlflow.server import app, constants  # late: it takes seconds, and only the server's process needs it

    os.environ[constants.BACKEND_STORE_URI_ENV_VAR] = os.environ["MLFLOW_BACKEND_STORE_URI"]
    os.environ[constants.ARTIFACT_ROOT_ENV_VAR] = "mlflow-artifacts:/"  # where new experiments would go: no folder is made
    return read_only(without_panel(app))


def answers_what_it_must_not(host: str, port: int) -> str | None:
    """Ask a server that was started for what it must refuse; return the first request that it serves, None where none."""
    for method, path in PROBES:
        connection = http.client.HTTPConnection(host, port, timeout=30.0)
        try:
            connection.request(method, path, body=b"{}", headers={"Content-Type": "application/json"})
            status = connection.getresponse().status
        finally:
            connection.close()
        if status not in (403, 404):
            return f"{method} {path} is answered with {status}"
    return None
