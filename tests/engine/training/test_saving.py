"""A trial's tensors are written beside its evaluation, and a report is heard only when all is durable."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import threading
import time
from pathlib import Path

import pytest

from engine.errors import DivergedError, Interrupted, StorageError
from engine.system import files
from engine.training import checkpoint
from engine.training.loop import train
from engine.training.passes import Passes
from tests.support.trials import build, one_loss, same_numbers

STAGED = ".checkpoint.new"
PATHS = ("adapter/adapter_model.safetensors", "checkpoint/adapter.safetensors")


@pytest.fixture
def stagings(monkeypatch):
    """Return the names of the threads that wrote a checkpoint's tensors."""
    names, stage = [], checkpoint.stage
    monkeypatch.setattr(checkpoint, "stage", lambda *args: (names.append(threading.current_thread().name), stage(*args))[1])
    return names


def seconds_until(condition, limit_s=60.0):
    began_s = time.monotonic()
    while not condition() and time.monotonic() - began_s < limit_s:
        time.sleep(0.005)
    return time.monotonic() - began_s


def test_tensors_are_written_while_the_evaluation_runs_and_the_report_is_durable_before_it_is_heard(
    tmp_path, tiny_config, base, monkeypatch, stagings
):
    evaluate, whole = Passes.evaluate, tmp_path / STAGED / checkpoint.OPTIMIZER

    def waits_for_the_files(passes, before_each):
        assert seconds_until(whole.exists) < 60.0  # written by the other thread, or never
        return evaluate(passes, before_each)

    monkeypatch.setattr(Passes, "evaluate", waits_for_the_files)
    for report in train(build(tiny_config), tmp_path, base=base):
        state = json.loads((tmp_path / "checkpoint" / "state.json").read_text())
        assert state["reports"][-1] == report.to_dict()
        saved = {name: (tmp_path / "checkpoint" / name).read_bytes() for name in state["sha256"]}
        assert state["sha256"] == {name: hashlib.sha256(content).hexdigest() for name, content in saved.items()}
        assert json.loads((tmp_path / "reports.jsonl").read_text().splitlines()[-1]) == report.to_dict()
        weights = tmp_path / "adapter" / "adapter_model.safetensors"
        if report.eval_loss == report.best_eval_loss:
            assert os.path.samefile(weights, tmp_path / "checkpoint" / "adapter.safetensors")
        assert not (tmp_path / STAGED).exists()
    assert len(stagings) == report.rung and not any(name == "MainThread" for name in stagings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "checkpoint", "reports.jsonl", "sample_losses.json"]


def test_the_adapter_stays_that_of_the_best_rung(tmp_path, tiny_config, base, monkeypatch):
    losses = iter([3.0, 2.0, 2.5])
    monkeypatch.setattr(Passes, "evaluate", lambda passes, before_each: one_loss(next(losses)))
    kept = []
    for _ in train(build(tiny_config), tmp_path, base=base):
        kept.append([(tmp_path / path).read_bytes() for path in PATHS])
    (first, _), (second, _), (third, last) = kept
    assert first != second == third != last


def test_where_files_cannot_be_linked_the_adapter_is_a_flushed_copy(tmp_path, tiny_config, base, monkeypatch):
    flushed, sync = set(), files.sync
    monkeypatch.setattr(Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "Operation not permitted")))
    monkeypatch.setattr(files, "sync", lambda path: (flushed.add(path.stat().st_ino), sync(path)))
    reports = train(build(tiny_config), tmp_path, base=base)
    for _ in zip(range(2), reports):
        weights, saved = tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "checkpoint" / "adapter.safetensors"
        assert weights.read_bytes() == saved.read_bytes() and not os.path.samefile(weights, saved)
        assert weights.stat().st_ino in flushed
    reports.close()


def test_a_disk_that_fills_beside_an_evaluation_ends_the_trial_in_one_line_and_it_goes_on_from_its_last_report(
    tmp_path, tiny_config, base
):
    config = build(tiny_config)
    whole = list(train(config, tmp_path / "whole", base=base))
    reports = train(config, tmp_path / "trial", base=base)
    heard = [next(reports)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "sync", lambda path: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(StorageError, match="checkpoint cannot be written: No space left on device"):
            next(reports)
    assert not (tmp_path / "trial" / STAGED).exists()
    assert same_numbers(whole, heard + list(train(config, tmp_path / "trial", base=base)))


@pytest.mark.parametrize("end", ["interrupted", "diverged"])
def test_a_trial_that_ends_in_its_evaluation_leaves_no_thread_and_writes_its_tensors_once(
    tmp_path, tiny_config, base, monkeypatch, stagings, end
):
    config = build(tiny_config)
    whole = list(train(config, tmp_path / "whole", base=base))
    stagings.clear()
    evaluate, asked = Passes.evaluate, itertools.count()

    def ends(passes, before_each):
        if end == "diverged":
            return one_loss(float("nan"))
        return evaluate(passes, before_each)

    steps = whole[0].step  # the first evaluation asks after them
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Passes, "evaluate", ends)
        with pytest.raises(Interrupted if end == "interrupted" else DivergedError):
            list(train(config, tmp_path / "trial", base=base, interrupted=lambda: end == "interrupted" and next(asked) == steps))
    assert len(stagings) == 1 and not [t for t in threading.enumerate() if t.name.startswith("saving")]
    assert not (tmp_path / "trial" / STAGED).exists()
    assert (tmp_path / "trial" / "checkpoint").exists() == (end == "interrupted")
    if end == "interrupted":
        assert same_numbers(whole, list(train(config, tmp_path / "trial", base=base)))
