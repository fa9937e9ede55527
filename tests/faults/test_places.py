"""In a place that lacks something a sweep runs to its end, or ends at once in one line."""

from __future__ import annotations

import json

import pytest

from . import places
from .sweeps import Sweep

pytestmark = [pytest.mark.faults, pytest.mark.timeout(500)]


@pytest.mark.parametrize("fault", [places.long_tmpdir, places.no_flock, places.clock_set_back])
def test_a_sweep_runs_to_its_end(tmp_path, fault):
    found = fault(tmp_path)
    assert found.code == 0, found.text
    assert Sweep.read(found.folder).faults == [] and "WARNING" not in found.text
    for file in found.folder.glob("trials/*/result.json"):
        result = json.loads(file.read_text())
        assert result["ended_s"] - result["started_s"] >= 0 and (result["dead_time_s"] or 0) >= 0
    if fault is places.long_tmpdir:
        assert "so Ray's files are in /" in found.text


@pytest.mark.parametrize(("fault", "field"), [(places.no_home, "HOME"), (places.deleted_experiment, "tracking.uri")])
def test_a_sweep_that_cannot_run_is_one_line_before_anything_is_written(tmp_path, fault, field):
    found = fault(tmp_path)
    errors = [line for line in found.text.splitlines() if line.startswith("error: ")]
    assert found.code == 2 and len(errors) == 1 and errors[0].startswith(f"error: {field} = "), found.text
    assert found.folder is None and "Traceback" not in found.text and "preparing" not in found.text
