"""A trial stopped or killed between reports continues with the uninterrupted trial's numbers."""

from __future__ import annotations

import gc
import json

import pytest
import torch

import engine.training.loop
from engine.errors import CheckpointError, Interrupted
from engine.model.load import load_base
from engine.training.checkpoint import Pace
from engine.training.loop import train
from engine.training.saving import TrialFiles
from tests.support.trials import CPU, build, run, same_numbers

NUM_STEPS = 7  # of the uninterrupted trial


class Killed(BaseException):
    """End the trial without warning, like SIGKILL."""


@pytest.fixture
def trial(tiny_config):
    """Return a config with dropout, so that random state matters, and its base model."""
    config = build(tiny_config, lora={"lora_dropout": 0.1}, optim={"warmup_ratio": 0.3})
    base, before = load_base(config.model, CPU), torch.get_num_threads()
    torch.set_num_threads(1)  # two would wait for each other longer than they compute
    gc.freeze()  # collections then see only the objects of the latest piece
    yield config, base
    gc.unfreeze()
    torch.set_num_threads(before)


@pytest.fixture
def num_steps(monkeypatch):
    """Return a list with one entry per computed optimizer step."""
    counted, original = [], engine.training.loop._Run._step
    monkeypatch.setattr(engine.training.loop._Run, "_step", lambda self: (counted.append(1), original(self))[1])
    return counted


def at_call(number, end=None):
    """Return an `interrupted` that returns True, or raises `end`, at call `number`."""
    calls = iter(range(1, 10**9))

    def interrupted():
        yes = next(calls) == number
        if yes and end is not None:
            raise end
        return yes

    return interrupted


def train_in_pieces(trial, folder, interrupted, end, **options):
    """Train until the trial is done, starting again after each `end`; return reports and pieces."""
    config, base = trial
    folder.mkdir()
    reports, num_pieces = [], 0
    while True:
        num_pieces += 1
        try:
            for report in train(config, folder, base=base, interrupted=interrupted(), **options):
                reports.append(report)
            return reports, num_pieces
        except end:
            pass


def same_files(one, two):
    for name in ("adapter/adapter_model.safetensors", "checkpoint/adapter.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    saved = [torch.load(folder / "checkpoint/optimizer.pt", weights_only=True) for folder in (one, two)]
    averages = [[file["average"]] if "average" in file else [] for file in saved]
    states = [[*file["optimizer"]["state"][0].values(), file["random"]["cpu"], *mean] for file, mean in zip(saved, averages)]
    assert all(torch.equal(*pair) for pair in zip(*states, strict=True))
    drop = {"elapsed_s", "peak_allocated_gib", "peak_reserved_gib", "sha256", "reports"}
    progress = [json.loads((folder / "checkpoint/state.json").read_text()) for folder in (one, two)]
    assert len({json.dumps({k: v for k, v in state.items() if k not in drop}) for state in progress}) == 1


def test_a_trial_interrupted_after_every_step_is_the_undisturbed_one_and_trains_no_step_twice(trial, tmp_path, num_steps):
    whole = run(trial[0], tmp_path / "whole", trial[1])
    assert len(num_steps) == NUM_STEPS
    num_steps.clear()
    parts, num_pieces = train_in_pieces(trial, tmp_path / "parts", lambda: at_call(2), Interrupted)
    assert same_numbers(whole, parts)
    same_files(tmp_path / "whole", tmp_path / "parts")
    # each but the last took one step
    assert len(num_steps) == NUM_STEPS and num_pieces >= NUM_STEPS


def test_a_trial_killed_at_any_moment_is_the_undisturbed_one_and_loses_what_came_after_its_last_save(trial, tmp_path, num_steps):
    whole = run(trial[0], tmp_path / "whole", trial[1])
    for number, (pace, most_again) in enumerate([(Pace(0.0, float("inf")), 1), (Pace(1e9), 3)]):
        num_steps.clear()
        ends = iter([*(at_call(k, Killed()) for k in range(2, 8)), at_call(0)])
        parts, num_pieces = train_in_pieces(trial, tmp_path / f"parts-{number}", ends.__next__, Killed, pace=pace)
        # A report may be lost with its process, and is not computed twice.
        heard = {report.rung: report for report in parts}
        assert same_numbers([whole[rung - 1] for rung in heard], list(heard.values()))
        same_files(tmp_path / "whole", tmp_path / f"parts-{number}")
        assert len(num_steps) <= NUM_STEPS + most_again * (num_pieces - 1)


def test_a_trial_stopped_while_its_average_is_evaluated_goes_on_with_the_last_adapter(trial, tmp_path, monkeypatch):
    optim = trial[0].optim.model_copy(update={"ema_horizon": 0.5})
    trial = trial[0].model_copy(update={"optim": optim}), trial[1]
    whole, saved, place = run(trial[0], tmp_path / "whole", trial[1]), [], TrialFiles._place
    noted = lambda files, *args: (saved.append(files._average._is_in_place), place(files, *args))  # noqa: E731
    monkeypatch.setattr(TrialFiles, "_place", noted)
    # the first and the third end come in an average's evaluation with steps to save, the last in one without
    ends = iter([*map(at_call, (5, 3, 4, 2)), at_call(0)])
    parts, _ = train_in_pieces(trial, tmp_path / "parts", ends.__next__, Interrupted, pace=Pace(1e9))
    assert same_numbers(whole, parts) and saved == [True, False, True, False, False]
    same_files(tmp_path / "whole", tmp_path / "parts")
    assert (tmp_path / "whole/sample_losses.json").read_bytes() == (tmp_path / "parts/sample_losses.json").read_bytes()


def test_an_end_asked_for_before_the_first_step_writes_nothing(trial, tmp_path):
    with pytest.raises(Interrupted, match="after step 0"):
        next(train(trial[0], tmp_path, base=trial[1], interrupted=lambda: True))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_between_reports_whose_sums_do_not_fit_is_refused(trial, tmp_path):
    with pytest.raises(Interrupted):
        next(train(trial[0], tmp_path, base=trial[1], interrupted=at_call(2)))
    state = tmp_path / "checkpoint" / "state.json"
    text = state.read_text()
    assert '"num_steps": 1' in text
    state.write_text(text.replace('"num_steps": 1', '"num_steps": 2'))
    with pytest.raises(CheckpointError, match="do not match"):
        next(train(trial[0], tmp_path, base=trial[1]))


def test_saving_between_reports_costs_at_most_its_share_of_the_time():
    now = [0.0]
    pace = Pace(60.0, 0.01, lambda: now[0])
    assert not pace.is_due()
    now[0] = 60.0
    assert pace.is_due()
    now[0] += 5.0  # a slow disk
    pace.saved(5.0)
    now[0] += 499.0
    assert not pace.is_due()
    now[0] += 1.0
    assert pace.is_due()
