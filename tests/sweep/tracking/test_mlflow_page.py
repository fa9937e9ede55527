"""The page's server lets requests that only look through to MLflow, and no others."""

from __future__ import annotations

import pytest

from sweep.tracking.mlflow_page import PROBES, is_admitted, read_only

API = "/ajax-api/2.0/mlflow/"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"), ("HEAD", "/"), ("GET", "/static-files/static/js/main.js"), ("GET", "/get-artifact"), ("POST", "/graphql"),
        ("POST", API + "runs/search"), ("GET", API + "runs/get"), ("POST", "/api/2.0/mlflow/runs/search"),
        ("GET", API + "metrics/get-history-bulk-interval"), ("GET", API + "artifacts/list"), ("GET", API + "experiments/get"),
        ("POST", "/ajax-api/3.0/mlflow/traces/search"), ("GET", API + "logged-models/m-1"),
        ("GET", "/ajax-api/3.0/mlflow/server-info"),
    ],
)  # fmt: skip
def test_what_the_page_needs_is_let_through(method, path):
    assert is_admitted(method, path)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *PROBES, ("PUT", "/ajax-api/3.0/mlflow/assistant/config"), ("POST", "/ajax-api/3.0/mlflow/assistant/skills/install"),
        ("POST", API + "experiments/create"), ("POST", API + "runs/create"), ("POST", API + "runs/delete"),
        ("POST", API + "model-versions/create"), ("PATCH", API + "logged-models/m-1"), ("DELETE", API + "logged-models/m-1"),
        ("POST", API + "upload-artifact"), ("POST", API + "gateway-proxy"), ("GET", API + "gateway-proxy"),
        ("POST", API + "webhooks"), ("POST", API + "webhooks/1/test"), ("GET", "/ajax-api/2.0/mlflow-artifacts/artifacts/x"),
        ("PUT", "/ajax-api/2.0/mlflow-artifacts/artifacts/x"), ("POST", "/ajax-api/3.0/mlflow/scorer/invoke"),
        ("POST", "/ajax-api/3.0/mlflow/genai/evaluate/invoke"), ("POST", "/ajax-api/3.0/jobs"), ("POST", "/mcp"),
        ("POST", "/gateway/x/mlflow/invocations"), ("POST", "/v1/traces"), ("OPTIONS", "/"), ("GET", "/runs/search"),
        ("GET", "/static-filesX"), ("GET", API + "logged-models/a/../../../runs/delete"), ("TRACE", "/"),
    ],
)  # fmt: skip
def test_everything_else_is_refused(method, path):
    assert not is_admitted(method, path)


def test_a_refused_request_never_reaches_mlflow():
    reached, answers = [], []

    def app(environ, start_response):
        reached.append(environ["PATH_INFO"])
        start_response("200 OK", [])
        return [b"page"]

    gate = read_only(app)
    for method, path in (("GET", "/"), ("POST", API + "runs/delete")):
        body = gate({"REQUEST_METHOD": method, "PATH_INFO": path}, lambda status, headers: answers.append(status))
        assert body == [b"page"] or b"PERMISSION_DENIED" in body[0]
    assert reached == ["/"] and answers == ["200 OK", "403 Forbidden"]
