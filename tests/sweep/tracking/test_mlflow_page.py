"""The page's server lets requests that only look through to MLflow, and no others."""

from __future__ import annotations

import pytest

from sweep.tracking.mlflow_page import HAS_OPENED, PROBES, is_admitted, read_only, without_panel

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


def test_the_page_notes_before_mlflows_scripts_that_the_assistants_panel_has_opened_once():
    def app(environ, start_response):
        text = b"" if environ.get("HTTP_IF_NONE_MATCH") else b"<html><head><title>MLflow</title></head></html>"
        start_response("200 OK" if text else "304 NOT MODIFIED", [("Content-Length", str(len(text))), ("ETag", '"1"')])
        return [text]

    said = []
    page, get = without_panel(app), {"REQUEST_METHOD": "GET", "HTTP_IF_NONE_MATCH": '"1"'}
    body = b"".join(page({**get, "PATH_INFO": "/"}, lambda status, headers, *rest: said.append((status, dict(headers)))))
    assert body.startswith(b"<html><head>" + HAS_OPENED + b"<title>") and body.count(HAS_OPENED) == 1
    assert said[0][0].startswith("200") and said[0][1]["Content-Length"] == str(len(body)) and "ETag" not in said[0][1]
    other = b"".join(page({**get, "PATH_INFO": "/static-files/x.js"}, lambda status, headers: said.append((status, headers))))
    assert other == b"" and said[1][0].startswith("304")
