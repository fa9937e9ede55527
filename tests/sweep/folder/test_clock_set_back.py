"""Whoever sets the machine's clock, no duration is negative, and a session's are right."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from datetime import datetime, timedelta
from types import SimpleNamespace

import optuna
import pytest

from sweep.config.sweep import parse_sweep_config
from sweep.execution.worker import TrialWorker
from sweep.folder.steady_clock import SteadyClock
from sweep.folder.sweep_folder import SweepFolder
from sweep.folder.timeline import Timeline
from sweep.ledger.ledger import Ledger
from sweep.ledger.limits import Limits
from sweep.space.parse import parse_space
from sweep.study.journal import record_of
from sweep.study.study import Study
from sweep.tracking.mlflow_runs import MlflowRuns
from sweep.tracking.prometheus import SweepMetrics
from sweep.trials.record import Outcome, TrialRecord
from tests.support.reports import make_report

BACK_S = 172_800.0


class Machine:
    """A clock that can be set, and the seconds since the boot."""

    def __init__(self):
        self.wall_s, self.boot_s = 1e9, 50.0

    def passes(self, seconds):
        self.wall_s, self.boot_s = self.wall_s + seconds, self.boot_s + seconds

    def clock(self):
        return SteadyClock(lambda: self.wall_s, lambda: self.boot_s)


def test_a_steady_clock_shows_what_passed_and_begins_at_the_machine_s_time():
    machine = Machine()
    clock = machine.clock()
    machine.passes(10)
    machine.wall_s -= BACK_S
    machine.passes(5)
    assert clock() == 1e9 + 15
    assert abs(SteadyClock()() - time.time()) < 1.0


def session(file, machine, trial):
    """Hold a slot for 60 of 100 seconds, and set the clock back in the middle."""
    timeline, clock = Timeline(file), machine.clock()
    timeline.start_session(clock())
    timeline.on_assigned(trial, clock())
    machine.passes(30)
    machine.wall_s -= BACK_S
    timeline.on_reported(trial, clock(), {"slot": "a", "began_s": machine.wall_s - 25, "dead_time_s": 2.0})
    machine.passes(30)
    timeline.on_ended(trial, clock(), {})
    machine.passes(40)
    timeline.on_assigned(trial + 1, clock())
    return timeline, clock


def test_a_budget_counts_on_through_it_in_a_session_and_over_two(tmp_path):
    machine = Machine()
    timeline, clock = session(tmp_path / "timeline.jsonl", machine, 0)
    assert timeline.elapsed_s(clock()) == pytest.approx(100) and timeline.occupied_s(clock()) == pytest.approx(60)
    timeline, clock = session(tmp_path / "timeline.jsonl", machine, 2)
    assert timeline.elapsed_s(clock()) == pytest.approx(200) and timeline.occupied_s(clock()) == pytest.approx(120)
    for span in timeline.spans:
        assert span.assigned_s <= (span.began_s or span.assigned_s) <= span.ended_s


def test_a_timeline_of_an_older_version_shows_no_negative_time(tmp_path):
    file = tmp_path / "timeline.jsonl"
    events = [
        {"event": "session", "at_s": 1e9}, {"event": "assigned", "at_s": 1e9 + 1, "trial": 0},
        {"event": "reported", "at_s": 1e9 - BACK_S, "trial": 0, "slot": "a", "began_s": 1e9 - BACK_S, "dead_time_s": -BACK_S},
        {"event": "ended", "at_s": 1e9 + 10 - BACK_S, "trial": 0}, {"event": "session", "at_s": 1e9 + 20 - BACK_S},
        {"event": "assigned", "at_s": 1e9 + 20 - BACK_S, "trial": 1}, {"event": "ended", "at_s": 1e9 + 30 - BACK_S, "trial": 1},
    ]  # fmt: skip
    file.write_text("".join(json.dumps(event) + "\n" for event in events))
    timeline = Timeline(file, mend=False)
    assert [(span.ended_s - span.assigned_s, span.dead_time_s) for span in timeline.spans] == [(0.0, 0.0), (10.0, None)]
    assert timeline.elapsed_s(0.0) == 11.0 and timeline.occupied_s(0.0) == 10.0


def test_prometheus_shows_passed_seconds_and_dates_the_last_event_by_the_reader_s_clock(tmp_path):
    machine = Machine()
    metrics = SweepMetrics("s", 4, 1, clock=lambda: machine.wall_s)
    timeline, clock = Timeline(tmp_path / "timeline.jsonl"), machine.clock()
    metrics.begin(timeline, clock)
    timeline.start_session(clock())
    timeline.on_assigned(0, clock())
    machine.wall_s -= BACK_S
    machine.passes(50)
    values = {sample.name: sample.value for family in metrics.collect() for sample in family.samples}
    assert values["qlora_sweep_elapsed_seconds"] == values["qlora_sweep_slot_busy_seconds_total"] == pytest.approx(50)
    assert machine.wall_s - values["qlora_sweep_last_event_timestamp_seconds"] == pytest.approx(50)


def test_a_worker_measures_dead_time_by_a_clock_that_no_one_sets(monkeypatch):
    worker, now = TrialWorker.__new__(TrialWorker), [1e9, 100.0]
    monkeypatch.setattr("sweep.execution.worker.time", SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setattr("sweep.execution.worker.since_boot", lambda: now[1])
    worker._slot, worker._began_s, worker._last_end_s, worker._setup_s = "a", None, 100.0, 0.5
    worker._spec, worker._lock = {"report_timeout_s": None}, None
    worker._interruption = SimpleNamespace(is_terminated=False, working=nullcontext)
    worker._advance_or_fail = lambda: now.__setitem__(slice(None), [1e9 - 2 * BACK_S, 105.0]) or {"done": True}
    now[:] = [1e9 - BACK_S, 102.0]
    timing = json.loads(worker.step()["timing"])
    assert timing == {"slot": "a", "began_s": 1e9 - BACK_S, "dead_time_s": 2.5, "parts": {"start": 3.0}}


@pytest.mark.parametrize("outcome", [Outcome.COMPLETE, Outcome.STOPPED])
def test_a_trial_that_ended_before_it_began_took_its_training_time(tmp_path, outcome):
    folder = SweepFolder(tmp_path)
    folder.trial(0).mkdir(parents=True)
    began = datetime(2026, 3, 1, 12)
    ended = began - timedelta(seconds=172_716)
    finished = outcome is Outcome.COMPLETE
    known = {"outcome": str(outcome), **({} if finished else {"stopped_s": ended.timestamp()})}
    state = optuna.trial.TrialState.COMPLETE if finished else optuna.trial.TrialState.RUNNING
    trial = optuna.trial.create_trial(state=state, value=1.0 if finished else None, user_attrs=known)
    trial.datetime_start, trial.datetime_complete, trial.number = began, ended if finished else None, 0
    record = record_of(trial, folder, dict)
    assert record.outcome is outcome and record.ended_s == record.started_s == began.timestamp()
    (folder.trial(0) / "reports.jsonl").write_text(json.dumps(make_report(1, 2.0, elapsed_s=84.0).to_dict()) + "\n")
    record = record_of(trial, folder, dict)
    assert record.ended_s - record.started_s == 84.0


def test_mlflow_gets_no_end_before_a_start(tmp_path):
    class Client:
        ends: list = []  # noqa: RUF012

        def set_terminated(self, run, status, end_time):
            self.ends.append(end_time)

        def __getattr__(self, name):
            return lambda *arguments, **named: None

    runs = MlflowRuns("http://x", "demo", "demo", tmp_path, {})
    runs._client, runs._parent, runs._children, runs.started_s = Client(), "parent", {("trial", "0"): "child"}, 2e9
    runs._log = lambda *arguments, **named: None
    runs.interrupt()
    runs.trial(TrialRecord(0, {}, {}, Outcome.FAILED, str(tmp_path), started_s=2e9, ended_s=2e9 - BACK_S))
    assert Client.ends == [2_000_000_000_000] * 2


def test_a_whole_ledger_takes_the_steady_clock(tmp_path):
    config = parse_sweep_config({"model": {"path": "m"}, "data": {"train": "t"}, "train": {"max_tokens": 400}})
    study = Study(SweepFolder(tmp_path), config, parse_space(config.space))
    ledger = Ledger(study, SweepFolder(tmp_path), Limits(num_trials=1, num_rungs=1, num_slots=1, max_retries=0))
    assert isinstance(ledger.clock, SteadyClock)
