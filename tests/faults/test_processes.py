"""A real sweep survives dead, hung or diverged processes and nodes, and killed drivers.

`make faults` runs these tests, which take minutes.
"""

from __future__ import annotations

import os
import signal

import pytest

from . import measure
from .kills import SETTINGS, THAW_SETTINGS, kill_drivers
from .nodes import Nodes
from .sweeps import NUM_RUNGS, Sweep

pytestmark = [pytest.mark.faults, pytest.mark.timeout(0)]
NUM_KILLS = int(os.environ.get("FAULTS", "20"))


@pytest.mark.parametrize("fault", [2.0, 12.0])
def test_a_diverged_trial_frees_its_slot_within_a_second(tmp_path, fault):
    found = measure.diverged(tmp_path, fault)
    outcomes = sorted(result["outcome"] for result in found.results.values())
    assert outcomes == ["COMPLETE", "COMPLETE", "COMPLETE", "DIVERGED"]
    assert found.sweep.faults == []
    assert found.seconds < 1.0


@pytest.mark.parametrize(("fault", "outcome"), [(8.0, "COMPLETE"), (9.0, "COMPLETE"), (13.0, "LOST")])
def test_a_trial_that_hangs_or_is_stopped_goes_on_elsewhere_or_is_lost_with_a_reason(tmp_path, fault, outcome):
    found = measure.hung(tmp_path, fault)
    by_fault = {result["params"]["optim.weight_decay"]: result for result in found.results.values()}
    assert (by_fault[fault]["outcome"], by_fault[0.0]["outcome"]) == (outcome, "COMPLETE")
    if outcome == "LOST":
        assert "had not reported for 5 s (cluster.report_timeout_s)" in by_fault[fault]["error"]


def test_a_trial_goes_on_after_its_worker_was_killed(tmp_path):
    found = measure.worker_killed(tmp_path)
    assert found.sweep.faults == [] and found.num_rungs_again == 0
    assert {result["outcome"] for result in found.results.values()} == {"COMPLETE"}
    assert "its worker process died; it continues from its checkpoint" in found.text


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_trial_goes_on_elsewhere_after_its_node_was_lost(tmp_path, number):
    found = measure.node_lost(tmp_path, number)
    assert found.sweep.faults == [] and found.num_rungs_again == 0
    assert {result["outcome"] for result in found.results.values()} == {"COMPLETE"}
    assert found.seconds < (20.0 if number == signal.SIGTERM else 60.0)
    assert "it continues from its checkpoint" in found.text


@pytest.mark.parametrize(("number", "everywhere"), [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGHUP, True)])
def test_a_terminated_driver_ends_within_20_seconds_with_the_work_of_half_a_rung_saved(tmp_path, number, everywhere):
    found, code, saved = measure.driver_terminated(tmp_path, everywhere, number)
    assert (code, found.sweep.faults) == (130, [])
    assert found.seconds < 20.0
    # of 6 seconds; a resumed trial computes only the rest
    assert len(saved) == 2 and max(saved) > 1.0
    # although max_retries is 0: it did not count as a death
    assert {result["outcome"] for result in found.results.values()} == {"COMPLETE"}


def test_a_second_driver_is_refused_and_the_first_goes_on(tmp_path):
    found, said, code = measure.second_driver(tmp_path)
    assert (code, said.count("\n")) == (2, 1)
    assert "another driver works in this sweep folder" in said
    assert found.sweep.faults == []


@pytest.mark.parametrize("settings", [SETTINGS, THAW_SETTINGS])
def test_killed_drivers_lose_nothing_and_end_as_if_undisturbed(tmp_path, settings):
    with Nodes(num_cpus=4) as nodes:
        tally = kill_drivers(NUM_KILLS, 0, tmp_path, nodes.address, settings)
    assert tally.faults == []
    assert tally.num_resumed == tally.num_kills == NUM_KILLS
    assert tally.num_equal == tally.num_must_be_equal


def test_the_reading_of_a_sweep_sees_what_is_lost_doubled_or_torn(tmp_path):
    found = measure.diverged(tmp_path, 2.0)
    assert found.sweep.faults == []
    (folder,) = (tmp_path / "sweeps").glob("*/study.journal")
    folder = folder.parent
    reports = next(file for file in folder.glob("trials/*/reports.jsonl") if len(file.read_text().splitlines()) == NUM_RUNGS)
    text = reports.read_text()
    for damage in (text.splitlines(keepends=True)[0] + text, text.rsplit("\n", 2)[0] + "\n", text[:-20]):
        reports.write_text(damage)
        assert Sweep.read(folder).faults
    reports.write_text(text)
    assert Sweep.read(folder).faults == []
    next(folder.glob("trials/*/result.json")).unlink()
    assert Sweep.read(folder).faults
