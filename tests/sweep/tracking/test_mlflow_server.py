"""`python -m sweep.ui --mlflow` serves MLflow's page on a sweep, on this machine only, until Ctrl-C."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.request
from contextlib import closing

import psutil
import pytest

from sweep.config.sweep import parse_sweep_config
from sweep.folder.sweep_folder import SweepFolder
from sweep.tracking import mlflow_page
from sweep.tracking import mlflow_server as server
from sweep.tracking.sqlite_store import local_uri
from sweep.tracking.tracker import Tracker
from sweep.trials.record import Outcome, TrialRecord
from sweep.ui.__main__ import main


def made(path, **sections) -> SweepFolder:
    """Make a sweep folder that holds only a config."""
    folder = SweepFolder(path / "demo-20260101-000000")
    folder.path.mkdir(parents=True)
    base = {"model": {"path": "m"}, "data": {"train": "t"}, "train": {"max_tokens": 400}, "sweep": {"name": "demo"}}
    folder.write_config(parse_sweep_config({**base, **sections}))
    return folder


@pytest.fixture(scope="module")
def tracked(tmp_path_factory) -> SweepFolder:
    """Make a sweep of one trial that MLflow knows."""
    folder = made(tmp_path_factory.mktemp("sweeps"))
    tracker = Tracker(local_uri(folder.path.parent), "demo", folder.path.name, folder.path, {})
    tracker.on_sweep_started({})
    tracker.on_trial_updated(TrialRecord(0, {"lora.rank": 8}, {}, Outcome.PRUNED, "trial", started_s=1e9, ended_s=1e9 + 1))
    assert tracker.close(60) == []
    return folder


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (None, "must be a sweep folder"),
        ({"tracking": {"name": "none"}}, "this sweep wrote nothing to MLflow"),
        ({}, "must be an existing database"),
    ],
)
def test_a_folder_that_has_no_page_is_one_line(tmp_path, sections, message, capsys):
    folder = tmp_path if sections is None else made(tmp_path, **sections).path
    assert main(["--mlflow", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "mlflow.db").exists()


def test_a_sweep_that_its_store_does_not_know_is_one_line(tracked, capsys):
    other = SweepFolder(tracked.path.parent / "other-20260101-000000")
    shutil.copytree(tracked.path, other.path)
    assert main(["--mlflow", str(other.path)]) == 2
    error = capsys.readouterr().err
    assert "does not know; its report needs no store" in error and error.count("\n") == 1


@pytest.mark.parametrize("tracking", [{}, {"uri": "sqlite:////another/machine/sweeps/mlflow.db"}])
def test_a_copied_sweeps_folder_opens_as_the_first_one_does(tracked, tmp_path, tracking):
    copied = tmp_path / "copy"
    shutil.copytree(tracked.path.parent, copied)
    folder = SweepFolder(copied / tracked.path.name)
    folder.write_config(parse_sweep_config({**folder.read_config().model_dump(mode="json"), "tracking": tracking}))
    uri, pages = server.find_pages(folder)
    assert uri == local_uri(copied) and pages == server.find_pages(tracked)[1]


def test_a_copy_that_goes_on_keeps_its_runs_and_leaves_the_original_alone(tracked, tmp_path):
    copied = tmp_path / "copy"
    shutil.copytree(tracked.path.parent, copied)
    before = sorted(str(path) for path in tracked.path.parent.rglob("*"))
    tracker = Tracker(local_uri(copied), "demo", tracked.path.name, copied / tracked.path.name, {})
    tracker.on_sweep_started({})
    tracker.on_trial_updated(TrialRecord(0, {"lora.rank": 8}, {}, Outcome.PRUNED, "trial", started_s=1e9, ended_s=1e9 + 1))
    tracker.on_trial_updated(TrialRecord(1, {"lora.rank": 4}, {}, Outcome.PRUNED, "trial", started_s=1e9, ended_s=1e9 + 1))
    assert tracker.close(60) == []
    assert sorted(str(path) for path in tracked.path.parent.rglob("*")) == before
    with closing(sqlite3.connect(copied / "mlflow.db")) as store:
        addresses = store.execute("select artifact_uri from runs").fetchall()
        folders = store.execute("select value from tags where key = 'sweep.folder'").fetchall()
    assert len(addresses) == 3 and all(uri.startswith((copied / "mlartifacts").as_uri()) for (uri,) in addresses)
    assert folders == [(str(copied / tracked.path.name),)]  # the parent run, once


def test_a_taken_port_is_passed_over():
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((server.HOST, server.free_port()))
        taken.listen()
        assert server.free_port() != taken.getsockname()[1]


def asked(host: str, port: str, method: str, path: str, body: dict) -> tuple[int, dict]:
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


@pytest.mark.faults  # MLflow's server needs ten seconds of processor time to start
def test_table_and_charts_are_served_on_this_machine_alone_until_ctrl_c(tracked):
    command = [sys.executable, "-m", "sweep.ui", "--mlflow", str(tracked.path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    table, charts, last = (process.stdout.readline() for _ in range(3))
    assert last == "Press Ctrl-C to stop the server\n"
    host, port = re.fullmatch(r"table +http://(\S+):(\d+)/#/experiments/\d+/runs\?\S+viewStateShareKey=\S+\n", table).groups()
    assert "compareRunsMode=CHART" in charts
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    listening = {c.laddr for member in family for c in member.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert {(address.ip, address.port) for address in listening} == {("127.0.0.1", int(port))} and host == "127.0.0.1"
    with urllib.request.urlopen(f"http://{host}:{port}/", timeout=60) as page:
        assert b"MLflow" in page.read()
    assert mlflow_page.answers_what_it_must_not(host, int(port)) is None
    found = asked(host, port, "POST", "/ajax-api/2.0/mlflow/experiments/search", {"max_results": 10})
    assert found[0] == 200 and [each["name"] for each in found[1]["experiments"] if each["name"] != "Default"] == ["demo"]
    theft = {"name": "theft", "artifact_location": "file:///etc"}  # and then get-artifact?path=passwd
    assert asked(host, port, "POST", "/ajax-api/2.0/mlflow/experiments/create", theft)[0] == 403
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []


@pytest.mark.faults  # as above
def test_a_server_that_does_more_than_show_is_closed_again(tracked, monkeypatch, capfd):
    monkeypatch.setattr(mlflow_page, "PROBES", (("GET", "/version"),))  # as if MLflow's own server had been started
    assert main(["--mlflow", str(tracked.path)]) == 1
    assert "does more than show the sweep (GET /version is answered with 200)" in capfd.readouterr().err
