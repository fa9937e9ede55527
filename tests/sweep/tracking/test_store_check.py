"""What certainly cannot be tracked is refused at the start; what may work later is a warning."""

from __future__ import annotations

import json
import socket
import sqlite3
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from engine.errors import InputError
from sweep.config.sweep import parse_sweep_config
from sweep.tracking import store_check
from sweep.tracking.sqlite_store import schemas
from sweep.tracking.store_check import check_store


def config(uri=None, **tracking):
    base = {"model": {"path": "m"}, "data": {"train": "t"}, "train": {"max_tokens": 400}, "sweep": {"name": "demo"}}
    return parse_sweep_config({**base, "tracking": {"uri": uri, **tracking}})


def database(folder, stage="active", version=None, statement=""):
    """Make the tables that the check looks at."""
    with closing(sqlite3.connect(folder / "mlflow.db")) as made:
        made.executescript(
            "create table alembic_version (version_num);"
            "create table experiments (experiment_id, name, lifecycle_stage);"
            f"insert into alembic_version values ('{version or schemas()[0]}');"
            f"insert into experiments values (7, 'demo', '{stage}'), (8, 'other', 'deleted');" + statement
        )


def test_a_store_that_works_or_can_be_made_is_no_word(tmp_path):
    assert check_store(config(), tmp_path) == []
    assert check_store(config(), tmp_path / "not" / "yet") == []
    database(tmp_path)
    assert check_store(config(), tmp_path) == []
    assert [file.name for file in tmp_path.iterdir()] == ["mlflow.db"]


def test_the_version_of_the_tables_is_that_which_mlflow_itself_wants():
    from mlflow.store.db.utils import _get_latest_schema_revision

    newest, older = schemas()
    assert newest == _get_latest_schema_revision() and len(older) > 20 and newest not in older


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: database(folder, "deleted"), r"has the experiment 'demo' as deleted; .*--experiment-id 7"),
        (lambda folder: database(folder, version=min(schemas()[1])), "older MLflow; .*mlflow db upgrade"),
        (lambda folder: database(folder, version="ffffffffffff"), "newer MLflow; install that version"),
        (lambda folder: database(folder, statement="drop table alembic_version;"), "the database of another program"),
        (lambda folder: (folder / "mlflow.db").write_text("no database " * 100), "file is not a database"),
        (lambda folder: (folder / "mlflow.db").mkdir(), "must be a database, not a folder"),
    ],
)
def test_a_database_that_cannot_work_is_refused_with_the_way_out(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(InputError, match=rf"^tracking.uri = 'sqlite:///.*mlflow.db': .*{message}.*; tracking.name=none"):
        check_store(config(), tmp_path)
    assert check_store(config(name="none"), tmp_path) == []


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_place_for_no_database_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^tracking.uri"):
        check_store(config(), tmp_path / name)


def test_a_database_that_cannot_be_written_is_refused_and_a_busy_one_is_not(tmp_path, monkeypatch):
    database(tmp_path)
    monkeypatch.setattr("sweep.tracking.sqlite_store.PATIENCE_S", 0.01)
    with closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as other:
        other.execute("begin exclusive")
        assert check_store(config(), tmp_path) == []
    monkeypatch.setattr("os.access", lambda *arguments: False)
    with pytest.raises(InputError, match="must be writable"):
        check_store(config(), tmp_path)


class Server(ThreadingHTTPServer):
    """Answers every request with what `answer` holds for the end of its path, or for ''."""

    def __init__(self, **answers):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked = answers, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def uri(self):
        return f"http://someone@127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        name = self.path.partition("?")[0].rpartition("/")[2].replace("-", "_")
        self.server.asked.append(name)
        status, body = self.server.answers.get(name, self.server.answers["other"])
        content = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, *arguments):
        pass


def refusal(code):
    return {"error_code": code, "message": "no"}


def experiment(stage):
    return 200, {"experiment": {"experiment_id": "3", "name": "demo", "lifecycle_stage": stage}}


MISSING = 404, refusal("RESOURCE_DOES_NOT_EXIST")
OK = 200, {}


@pytest.fixture
def served():
    servers = []

    def serve(**answers):
        servers.append(Server(**answers))
        return servers[-1]

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"other": (401, "<html>")}, r"must let this user write .*MLFLOW_TRACKING_USERNAME"),
        ({"other": (403, refusal("PERMISSION_DENIED"))}, "must let this user write"),
        ({"get_by_name": experiment("active"), "other": (403, refusal("PERMISSION_DENIED"))}, "must let this user write"),
        ({"get_by_name": MISSING, "other": (403, "no")}, "must let this user write"),
        ({"get_by_name": experiment("deleted"), "other": OK}, r"'demo' as deleted; .*--experiment-id 3"),
        ({"other": (404, "<html>")}, "must be an MLflow server"),
        ({"other": (200, "<html>please log in")}, "must be an MLflow server"),
        ({"other": (200, {"a": 1})}, "must be an MLflow server"),
        ({"other": (302, "")}, "must be an MLflow server"),
    ],
)
def test_a_server_that_cannot_work_is_refused_with_the_way_out(served, tmp_path, answers, message):
    with pytest.raises(InputError, match=rf"^tracking.uri = 'http://127.*: .*{message}.*; tracking.name=none") as error:
        check_store(config(served(**answers).uri), tmp_path)
    assert "someone" not in str(error.value)


@pytest.mark.parametrize("uri", ["localhost:5000", "foo://x", "http://", "postgresql+nodriver://u@127.0.0.1:9/x"])
def test_an_address_that_means_nothing_is_refused(tmp_path, uri):
    with pytest.raises(InputError, match=r"^tracking.uri"):
        check_store(config(uri), tmp_path)


def test_a_server_that_works_gets_the_experiment_and_no_word(served, tmp_path):
    known = served(get_by_name=experiment("active"), other=OK)
    assert check_store(config(known.uri), tmp_path) == []
    assert "set_experiment_tag" in known.asked and "create" not in known.asked
    new = served(get_by_name=MISSING, create=(200, {"experiment_id": "1"}), other=OK)
    assert check_store(config(new.uri), tmp_path) == []
    assert "create" in new.asked


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_server_that_is_down_now_is_a_warning(served, tmp_path, status):
    (warning,) = check_store(config(served(other=(status, "busy")).uri), tmp_path)
    assert "does not answer now" in warning and "someone" not in warning


def test_a_server_that_is_not_there_or_hangs_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(store_check, "PATIENCE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (silent.getsockname()[1], 9):
            (warning,) = check_store(config(f"http://127.0.0.1:{port}"), tmp_path)
            assert "does not answer now" in warning


def test_a_server_without_a_registry_is_a_warning(served, tmp_path):
    server = served(get_by_name=experiment("active"), set_experiment_tag=OK, search=(404, "none here"), other=OK)
    (warning,) = check_store(config(server.uri), tmp_path)
    assert "will register no model" in warning and "tracking.registered_model=null" in warning
    assert check_store(config(server.uri, registered_model=None), tmp_path) == []
