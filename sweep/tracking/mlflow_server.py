"""Serve a sweep's MLflow store on 127.0.0.1: `python -m sweep.ui --mlflow <sweep folder>`.

It prints links to the trials of this sweep, and runs until Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import webbrowser

from engine.errors import InputError
from engine.system.child_python import ROOT, own_environment, python_module
from engine.system.files import home_folder
from sweep.config.confirmations import refuse_foreign_address
from sweep.folder.sweep_folder import SweepFolder
from sweep.tracking.mlflow_page import answers_what_it_must_not
from sweep.tracking.mlflow_runs import ENVIRONMENT, MlflowRuns
from sweep.tracking.mlflow_view import ORDER, page_queries
from sweep.tracking.sqlite_store import database_file, find_fault, local_uri
from sweep.trials.objectives import EVAL_LOSS

HOST = "127.0.0.1"  # the page has no password
PORT = 5000
TRIES = 20  # ports to try if the usual one is taken
START_S = 60.0
REPORT = "its report needs no store: python -m sweep.report <sweep folder>"


def show(folder: SweepFolder, port: int | None, tracking_uri: str | None, browser: bool) -> int:
    """Return the exit code: 0 closed by Ctrl-C, 1 MLflow did not start.

    port: None for the usual one, or the next free one. tracking_uri: the sweep's MLflow server, if
    the user's credentials may be sent to it. browser: open the first page. Raises InputError if the
    sweep is in no store.
    """
    if (config := folder.read_config()).tracking.uri != tracking_uri:
        refuse_foreign_address(config, f"--tracking-uri {config.tracking.public_uri}", os.environ, home_folder())
    uri, pages = find_pages(folder)
    if uri.startswith("http"):
        return _show(uri.rstrip("/"), pages, browser)
    return _serve(uri, free_port() if port is None else port, pages, browser)


def find_pages(folder: SweepFolder) -> tuple[str, dict[str, str]]:
    """Return the MLflow store, and the paths of the sweep's pages in it by name.

    Raises InputError if the sweep is in no store.
    """
    config = folder.read_config()
    if config.tracking.name == "none":
        raise InputError("tracking.name", "none", "this sweep wrote nothing to MLflow; for its report use python -m sweep.report")
    uri = _store(config.tracking.uri, folder)
    store = uri if uri != config.tracking.uri else config.tracking.public_uri
    database = database_file(uri)
    if database is not None:
        fault = find_fault(database, config.sweep.name) if database.is_file() else "must be an existing database"
        if fault is not None:
            raise InputError("tracking.uri", store, f"{fault}; {REPORT}")
    runs = MlflowRuns(uri, config.sweep.name, folder.path.name, folder.path, config.model_dump(mode="json"))
    rule, tasks = config.rule, [f"eval/{name}" for name in config.metrics.names]
    shared = runs.share_view(tasks, ORDER if rule.chosen_by == EVAL_LOSS else (f"eval/{rule.chosen_by}", rule.sign > 0))
    if shared is None:
        raise InputError("folder", str(folder.path.absolute()), f"holds a sweep that {store} does not know; {REPORT}")
    path, key = shared
    return uri, {name: f"{path}?{query}" for name, query in page_queries(key).items()}


def _store(uri: str | None, folder: SweepFolder) -> str:
    """Return the sweep's store. A folder copied from another machine has it next to it, if at all."""
    local = local_uri(folder.path.absolute().parent)
    named = None if uri is None else database_file(uri)
    is_gone = named is not None and not named.is_file() and database_file(local).is_file()
    return local if uri is None or is_gone else uri


def free_port() -> int:
    """Return the usual port, or the next free one. Raises InputError if all are taken."""
    for port in range(PORT, PORT + TRIES):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
                return port
            except OSError:
                continue
    raise InputError("--port", PORT, f"ports {PORT} to {PORT + TRIES - 1} are taken; name another one")


def _serve(uri: str, port: int, pages: dict[str, str], browser: bool) -> int:
    """Run MLflow's server until Ctrl-C or SIGTERM, then stop it together with its workers."""
    # the store may hold a password, and every user can read a command line
    environment = own_environment({**ENVIRONMENT, **os.environ, "MLFLOW_BACKEND_STORE_URI": uri})
    serve = ["gunicorn", "--bind", f"{HOST}:{port}", "--workers", "1", "--threads", "4", "--log-level", "error"]
    # gunicorn puts its working folder first on the module path
    command = python_module(*serve, "--chdir", ROOT, "sweep.tracking.mlflow_page:make_app()")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    try:
        if not _answers(server, port):
            server.terminate()
            lines = (server.stderr.read() if server.stderr else b"").decode(errors="replace").strip().splitlines()
            print(f"error: MLflow did not start: {lines[-1] if lines else 'it printed nothing'}", file=sys.stderr)
            return 1
        served = answers_what_it_must_not(HOST, port)
        if served is not None:
            print(f"error: MLflow's server does more than show the sweep ({served}), so it was closed again", file=sys.stderr)
            return 1
        _show(f"http://{HOST}:{port}", pages, browser)
        print("Press Ctrl-C to stop the server", flush=True)
        server.communicate()
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        try:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(10.0)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            server.kill()


def _answers(server: subprocess.Popen, port: int) -> bool:
    """Wait until the server answers a request; return False where it ends first, or takes too long."""
    deadline = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=START_S):
                return True
        except OSError:  # not listening yet, or its worker is still loading
            time.sleep(0.2)
    return False


def _show(server: str, pages: dict[str, str], browser: bool) -> int:
    """Print the pages' addresses. Open the first page if `browser` is set."""
    for name, path in pages.items():
        print(f"{name:<8}{server}{path}", flush=True)
    if browser:
        webbrowser.open(server + next(iter(pages.values())))
    return 0
