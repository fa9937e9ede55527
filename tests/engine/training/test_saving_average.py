"""With a running average, a checkpoint holds the last adapter, and the adapter for users is the better one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.adapter.flat import FlatAdapter
from engine.adapter.lora import attach, detach
from engine.adapter.peft_files import WEIGHTS
from engine.adapter.running_average import RunningAverage
from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.model.load import load_base
from engine.sample_losses import read_sample_losses
from engine.training import checkpoint
from engine.training.checkpoint import Pace, Progress, Tensors
from engine.training.loop import _Run, train
from engine.training.optim import make_optimizer
from engine.training.passes import Passes
from engine.training.saving import TrialFiles
from engine.trial_report import PartClock, read_reports
from tests.support.trials import build, one_loss, run, same_numbers

AVERAGE, LAST = "average", "last"


@pytest.fixture
def config(tiny_config):
    """Return a trial of three rungs, each of one or two steps."""
    return build(tiny_config, optim={"ema_horizon": 0.5}, train={"max_tokens": 384, "tokens_per_step": 128})


def adapter_file(folder):
    return folder / "checkpoint" / checkpoint.ADAPTER


def saved_average(folder):
    return torch.load(folder / "checkpoint" / checkpoint.OPTIMIZER, weights_only=True)["average"]


def values_in(file):
    """Return an adapter's values without their order."""
    return torch.cat([tensor.flatten() for tensor in load_file(file).values()]).sort().values


def first_report(config, folder, base):
    reports = train(config, folder, base=base)
    found = next(reports)
    reports.close()
    return found


@pytest.fixture
def better(monkeypatch):
    """Let the adapters win that a list names by rung; each rung is better than the one before."""
    winners, runs, train_to = [], [], _Run._train_to
    monkeypatch.setattr(_Run, "_train_to", lambda self, *args: (runs.append(self), train_to(self, *args))[1])

    def evaluate(passes, before_each):
        rung, found = len(runs[-1].progress.reports) + 1, AVERAGE if runs[-1].average._is_in_place else LAST
        return one_loss(4.0 - rung + (0.0 if found == winners[rung - 1] else 0.25))

    monkeypatch.setattr(Passes, "evaluate", evaluate)
    return winners


def test_the_average_takes_the_adapter_s_place_when_the_thread_has_read_both(config, tmp_path, base, monkeypatch):
    # after one step, both are equal
    config = config.model_copy(update={"train": config.train.model_copy(update={"num_reports": 1})})
    plain = config.model_copy(update={"optim": config.optim.model_copy(update={"ema_horizon": None})})
    first_report(plain, tmp_path / "plain", base)
    whole = first_report(config, tmp_path / "whole", base)
    evaluate, stage, evaluated, staged = Passes.evaluate, checkpoint.stage, threading.Event(), threading.Event()

    def late(*args):
        assert evaluated.wait(60.0)  # the evaluation of the last adapter does not wait for the thread
        time.sleep(0.2)
        digests = stage(*args)
        staged.set()
        return digests

    def noted(passes, before_each):
        assert staged.is_set() is evaluated.is_set()
        found = evaluate(passes, before_each)
        evaluated.set()
        return found

    monkeypatch.setattr(Passes, "evaluate", noted)
    monkeypatch.setattr(checkpoint, "stage", late)
    assert same_numbers([whole], [first_report(config, tmp_path / "late", base)]) and whole.ema_eval_loss is not None
    assert len({adapter_file(tmp_path / name).read_bytes() for name in ("plain", "whole", "late")}) == 1
    assert torch.equal(saved_average(tmp_path / "late"), saved_average(tmp_path / "whole"))


@pytest.mark.parametrize("winners", [(AVERAGE, LAST, AVERAGE), (LAST, AVERAGE, LAST)])
def test_the_average_has_a_file_of_its_own_and_the_last_adapter_shares_the_checkpoint_s(config, tmp_path, base, better, winners):
    better += winners
    folder, weights = tmp_path, tmp_path / "adapter" / WEIGHTS
    for report in train(config, folder, base=base):
        is_average = better[report.rung - 1] == AVERAGE
        assert report.is_average is is_average and report.eval_loss == report.best_eval_loss
        assert os.path.samefile(weights, adapter_file(folder)) is not is_average
        average = saved_average(folder).sort().values
        assert torch.equal(values_in(weights), average) is is_average or report.step == 1
        assert is_average or torch.equal(values_in(weights), values_in(adapter_file(folder)))
        assert not torch.equal(values_in(adapter_file(folder)), average) or report.step == 1
        # the one before shared its file with the adapter that was replaced; after the last report a thread deletes it
        for state in folder.glob("checkpoint*/state.json" if report.rung < 3 else "checkpoint/state.json"):
            content = (state.parent / checkpoint.ADAPTER).read_bytes()
            assert json.loads(state.read_text())["sha256"][checkpoint.ADAPTER] == hashlib.sha256(content).hexdigest()
        assert read_sample_losses(folder, report) == one_loss(report.eval_loss)


def keep_copies(patch, folder):
    """Copy the folder before each change that a kill could prevent; return the list of copies."""
    copies, copytree = [], shutil.copytree

    def before(owner, name):
        original = getattr(owner, name)

        def copied(*args, **options):
            copies.append(folder.with_name(f"killed-{len(copies)}"))
            with pytest.MonkeyPatch.context() as inner:
                for one, (at, called) in originals.items():
                    inner.setattr(at, one, called)
                copytree(folder, copies[-1])
            return original(*args, **options)

        patch.setattr(owner, name, copied)

    places = [(os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "hardlink_to"), (Path, "write_bytes"), (Path, "mkdir")]
    originals = {name: (owner, getattr(owner, name)) for owner, name in places}
    for owner, name in places:
        before(owner, name)
    return copies


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.faults)])
def test_a_trial_killed_at_any_write_has_the_losses_of_its_adapter_and_ends_as_if_undisturbed(
    config, tmp_path, base, better, step
):
    better += [LAST, AVERAGE, LAST]
    folder, made, num_kept = tmp_path / "trial", {}, [0, 0, 0, 0]
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        copies = keep_copies(patch, folder)
        for report in train(config, folder, base=base):
            made[(folder / "adapter" / WEIGHTS).read_bytes()] = report
    whole = list(made.values())
    for copy in copies:
        weights = copy / "adapter" / WEIGHTS
        kept = made[weights.read_bytes()] if weights.is_file() else None
        assert kept is None or read_sample_losses(copy, kept) == one_loss(kept.eval_loss)
        num_kept[kept.rung if kept else 0] += 1
    assert min(num_kept) >= 9
    for copy in copies[step - 1 :: step]:
        run(config, copy, base)
        assert same_numbers(whole, read_reports(copy)) and read_sample_losses(copy, whole[-1]) == one_loss(whole[-1].eval_loss)
        for name in (f"adapter/{WEIGHTS}", f"checkpoint/{checkpoint.ADAPTER}"):
            assert (copy / name).read_bytes() == (folder / name).read_bytes()
        assert torch.equal(saved_average(copy), saved_average(folder))


@pytest.mark.gpu
def test_tensors_are_written_after_what_the_device_still_computes(tiny_config, tmp_path):
    config = parse(TrainConfig, {**tiny_config, "optim": {"ema_horizon": 0.5}})
    base = load_base(config.model, torch.device("cuda"))
    layers = attach(base.model, base.linear_names, config.lora, 0)
    adapter = FlatAdapter(layers, base.dtype)
    average, optimizer = RunningAverage(adapter, 0.5), make_optimizer(adapter.parameter, config.optim)
    files = TrialFiles(tmp_path, config, base, Tensors(layers, optimizer, average.values), average, Pace(), PartClock())
    for number in (1.0, 2.0):
        torch.cuda._sleep(10**9)  # half a second, in which the thread could read what is there now
        adapter.parameter.detach().fill_(number)
        average.values.fill_(-number)
        files.begin()
        files.save(Progress(config.fingerprint()))
        assert values_in(adapter_file(tmp_path)).unique().tolist() == [number]
        assert saved_average(tmp_path).unique().tolist() == [-number]
    files.close()
    detach(base.model, layers)
