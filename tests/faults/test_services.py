"""With MLflow slow, down or late, training does not wait and the records end up the same."""

from __future__ import annotations

import re
import time

import pytest

from sweep.tracking.sqlite_store import local_uri
from sweep.tracking.tracker import Tracker
from sweep.trials.record import Outcome, TrialRecord
from tests.support.reports import make_report

from .mlflow_servers import Slow, free_port, serve

pytestmark = [pytest.mark.faults, pytest.mark.timeout(500)]
BLOCKED_SHARE = 0.001
CONFIG = {"sweep": {"name": "demo"}}


def records(rungs: int) -> list[TrialRecord]:
    outcome = Outcome.COMPLETE if rungs == 3 else Outcome.RUNNING
    return [
        TrialRecord(
            number, {"lora.rank": 8}, {"seed": number}, outcome, "trial", started_s=1e9 + number, ended_s=1e9 + 60,
            reports=[make_report(rung, 3.0 / rung, elapsed_s=1.5 * rung) for rung in range(1, rungs + 1)],
        )
        for number in range(4)
    ]  # fmt: skip


def play(tracker: Tracker, seconds: float) -> float:
    """Play a sweep's events over `seconds` of training; return the seconds that its methods took.
    """
    blocked = 0.0

    def timed(call, *arguments):
        nonlocal blocked
        before = time.perf_counter()
        call(*arguments)
        blocked += time.perf_counter() - before

    timed(tracker.on_sweep_started, {"git.commit": "abc"}, 1e9)
    for rungs in range(1, 4):
        time.sleep(seconds / 3)
        for record in records(rungs):
            timed(tracker.on_trial_updated, record)
    timed(tracker.on_sweep_finished, {"best_eval_loss": 1.0}, records(3)[0], None, 1e9 + 60)
    return blocked


def shown(uri: str) -> dict:
    """Return all that a store holds of the sweep, without ids.

    That is runs with their times, params, metrics with steps and times, and tags.
    """
    from mlflow import MlflowClient

    client = MlflowClient(uri, uri)
    runs = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    names = {run.info.run_id: run.info.run_name for run in runs}
    assert len(set(names.values())) == len(runs), "a run is there twice"
    found = {}
    for run in runs:
        tags = {key: names.get(value, value) for key, value in run.data.tags.items()}
        points = {key: [(p.step, p.timestamp, p.value) for p in client.get_metric_history(run.info.run_id, key)]
                  for key in run.data.metrics}  # fmt: skip
        times = (run.info.status, run.info.start_time, run.info.end_time)
        found[run.info.run_name] = (times, run.data.params, points, tags)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    tracker = Tracker(local_uri(folder), "demo", "my sweep", folder.parent / "sweep", CONFIG)
    play(tracker, 0.0)
    assert tracker.close(60) == []
    return shown(local_uri(folder))


def tracker_at(port: int, tmp_path_factory) -> Tracker:
    return Tracker(f"http://127.0.0.1:{port}", "demo", "my sweep", tmp_path_factory.getbasetemp() / "sweep", CONFIG)


@pytest.mark.parametrize("fault", ["slow", "loses an answer", "late", "back for the resume"])
def test_whatever_mlflow_does_training_goes_on_and_nothing_is_missing(undisturbed, tmp_path, tmp_path_factory, fault, capsys):
    port = free_port()
    one = tracker_at(port, tmp_path_factory)
    if fault in ("slow", "loses an answer"):
        server = serve(tmp_path, port)
        proxy = Slow(port, 2.0 if fault == "slow" else 0.0, fault == "loses an answer")
        one = tracker_at(proxy.server_port, tmp_path_factory)
    seconds = 15.0
    blocked = play(one, seconds)
    if fault == "late":
        server = serve(tmp_path, port)
    if fault == "back for the resume":
        (warning,) = one.close(2)
        assert "a resume writes them" in warning
        server = serve(tmp_path, port)
        one = tracker_at(port, tmp_path_factory)
        play(one, 0.0)
    try:
        before, patience = time.monotonic(), 240
        while one._writer._pending and time.monotonic() - before < patience:
            time.sleep(0.1)
        recovery = time.monotonic() - before
        assert one.close(60) == []
        found = shown(f"http://127.0.0.1:{port}")
    finally:
        server.terminate()
        server.wait()
    with capsys.disabled():
        print(
            f"\n{fault}: blocked {blocked:.4f} s of {seconds:.0f} s ({blocked / seconds:.4%}), all written {recovery:.1f} s later"
        )
    assert blocked < BLOCKED_SHARE * seconds
    if fault == "loses an answer":
        assert not proxy.loses  # twin: an answer was lost
    assert sorted(found) == sorted(undisturbed)
    assert found == undisturbed
    assert re.fullmatch("0000 .*", min(found)) and len(found) == 5
