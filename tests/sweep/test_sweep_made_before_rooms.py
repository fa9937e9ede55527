"""A sweep folder that commit 8734497 left in the middle of a trial still resumes.

Formats on disk outlive the layout of the code. `sweep_made_before_rooms.tar.xz` holds a tiny model,
its data and the folder after Ctrl-C. Trial 0 is COMPLETE, trial 1 is between its first and second
rung. The test unpacks it where it was made, because a trial's fingerprint includes the model's
path.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.model.load import load_base
from engine.training.loop import train
from sweep.cluster.slots import Hardware
from sweep.folder.slot_times import UNREPORTED, slot_times, totals
from sweep.folder.sweep_folder import SweepFolder
from sweep.folder.timeline import Timeline
from sweep.ledger.ledger import Ledger
from sweep.ledger.limits import Limits
from sweep.plan.sweep_plan import make_sweep_plan
from sweep.study.begun_with import read_unedited_config
from sweep.study.study import Study
from tests.support.paths import ENV
from tests.support.reports import PART_SECONDS

PLACE = Path("/tmp/qlora-sweep-made-before-rooms")
ARCHIVE = Path(__file__).with_name("sweep_made_before_rooms.tar.xz")


@pytest.fixture
def folder() -> Iterator[Path]:
    with PLACE.with_suffix(".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        shutil.rmtree(PLACE, ignore_errors=True)
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(PLACE, filter="data")
        yield PLACE / "sweeps" / "made-before-rooms"
        shutil.rmtree(PLACE)


def reports(folder: Path, number: int) -> list[dict]:
    """Return the lines, but with null for what the version before did not measure or predict."""
    lines = (folder / "trials" / f"{number:04d}" / "reports.jsonl").read_text().splitlines()
    later = ("peak_reserved_gib", "raw_eval_loss", "ema_eval_loss", "metrics_error", "eval_excess")
    unknown = dict.fromkeys((*PART_SECONDS, *later))
    unknown |= {"metrics": {}, "eval_losses": {}}
    return [{**unknown, **line, "predicted_peak_gib": line["predicted_peak_gib"] or None} for line in map(json.loads, lines)]


def test_its_journal_hands_out_the_trial_and_its_checkpoint_goes_on(folder):
    """Without Ray: what a resume reads from the folder, and the rest of trial 1."""
    before, opened = [reports(folder, number) for number in (0, 1)], SweepFolder.open(str(folder))
    step = json.loads((folder / "trials" / "0001" / "checkpoint" / "state.json").read_text())["step"]
    assert [len(each) for each in before] == [3, 1] and step > before[1][0]["step"]
    plan = make_sweep_plan(read_unedited_config(opened), lambda cluster: Hardware(0, 1))
    ledger = Ledger(Study(opened, plan.config, plan.space), opened, Limits.of(plan))
    assert ledger.recover() == [1] and not opened.has_result(1) and opened.has_result(0)
    proposal = ledger.next_trial()
    assert (proposal.number, proposal.num_heard) == (1, 1)
    trained = list(train(proposal.config, opened.trial(1), base=load_base(proposal.config.model, torch.device("cpu"))))
    assert [report.rung for report in trained] == [2, 3]
    after = [reports(folder, number) for number in (0, 1)]
    assert after[0] == before[0] and after[1][0] == before[1][0] and len(after[1]) == 3
    assert after[1][1]["step"] > step and after[1][1]["elapsed_s"] > before[1][0]["elapsed_s"]
    assert len(Timeline(folder / "timeline.jsonl", mend=False).sessions) == 2


@pytest.mark.faults
def test_a_whole_resume_goes_on_from_the_checkpoint_and_keeps_what_was_there(folder):
    before = [reports(folder, number) for number in (0, 1)]
    step = json.loads((folder / "trials" / "0001" / "checkpoint" / "state.json").read_text())["step"]
    assert [len(each) for each in before] == [3, 1] and step > before[1][0]["step"]
    done = subprocess.run(
        [sys.executable, "-m", "sweep", f"resume={folder}"],
        env=ENV, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "going on with trial 1" in done.stdout
    after = [reports(folder, number) for number in (0, 1, 2)]
    assert after[0] == before[0] and after[1][0] == before[1][0]
    outcomes = [json.loads((folder / "trials" / f"{n:04d}" / "result.json").read_text())["outcome"] for n in (0, 1, 2)]
    assert outcomes[0] == "COMPLETE" and set(outcomes) <= {"COMPLETE", "PRUNED"}
    assert len(after[1]) > 1 and (folder / "best" / "adapter_model.safetensors").is_file()
    timeline = Timeline(folder / "timeline.jsonl", mend=False)
    parts, was_measured = totals(slot_times(timeline)), [bool(span.parts.get("train")) for span in timeline.spans]
    assert len(timeline.sessions) == 2 and was_measured[0] is False and was_measured[-1] is True
    assert parts[UNREPORTED] > 0.0 and "% steady training" in done.stdout and "% not reported" in done.stdout
    assert "Where the hours went" in (folder / "report.html").read_text() and after[1][1]["train_s"] > 0.0
    assert after[1][1]["step"] > step and after[1][1]["elapsed_s"] > before[1][0]["elapsed_s"]
