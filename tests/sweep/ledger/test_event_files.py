"""TensorBoard's files have each report once, also after a resume, and a faulty disk costs a line alone."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest

from engine.errors import InputError
from sweep.ledger.event_files import EventFiles, check_event_files
from sweep.trials.record import Outcome
from tests.support.tracked import trial

pytest.importorskip("tensorboardX")


def points(folder, number: int, metric: str = "eval/loss_nats_per_token") -> list[tuple[int, float]]:
    """Read (step, value) of a trial's event files, with the protocol's own framing: length, check, record, check."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted((folder / "tensorboard" / f"{number:04d}").glob("events*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found += [(event.step, round(value.simple_value, 4)) for value in event.summary.value if value.tag == metric]
            at += 16 + length
    return found


def test_each_report_is_written_once_as_it_comes(tmp_path):
    files = EventFiles(tmp_path, pytest.fail)
    record = trial(0, Outcome.RUNNING, 3.0, 2.5)
    files.on_trial_updated(replace(record, reports=record.reports[:1]))
    files.on_trial_updated(record)
    files.on_trial_updated(record)
    files.on_trial_updated(replace(record, outcome=Outcome.PRUNED))
    steps = [report.tokens_seen for report in record.reports]
    assert points(tmp_path, 0) == list(zip(steps, [3.0, 2.5]))


def test_a_resume_doubles_nothing_and_goes_on(tmp_path):
    record = trial(0, Outcome.PAUSED, 3.0, 2.5)
    EventFiles(tmp_path, pytest.fail).on_trial_updated(record)
    resumed = EventFiles(tmp_path, pytest.fail)
    resumed.on_trial_updated(record)
    resumed.on_trial_updated(replace(trial(0, Outcome.COMPLETE, 3.0, 2.5, 2.0), params=record.params))
    assert [value for _, value in points(tmp_path, 0)] == [3.0, 2.5, 2.0]


def test_a_trial_without_a_report_or_of_an_earlier_sweep_has_none(tmp_path):
    files = EventFiles(tmp_path, pytest.fail)
    files.on_trial_updated(trial(0, Outcome.INFEASIBLE))
    files.on_trial_updated(replace(trial(1, Outcome.COMPLETE, 2.0), source="other/0001"))
    assert not (tmp_path / "tensorboard").exists()


def test_a_disk_that_takes_no_files_ends_it_with_one_line(tmp_path):
    (tmp_path / "tensorboard").write_text("a file where the folder would be")
    said = []
    files = EventFiles(tmp_path, said.append)
    files.on_trial_updated(trial(0, Outcome.RUNNING, 2.0))
    files.on_trial_updated(trial(0, Outcome.COMPLETE, 2.0))
    assert len(said) == 1 and said[0].startswith("WARNING: TensorBoard's files are not written from now on")


def test_without_the_package_it_is_refused_in_one_line(monkeypatch):
    check_event_files(True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_event_files(False)
    with pytest.raises(InputError, match="tracking.tensorboard = True: needs the package tensorboardX"):
        check_event_files(True)
