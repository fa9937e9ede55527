"""A trial's report says what its time went to, and the parts add up."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from engine.errors import Interrupted
from engine.training.checkpoint import Sums
from engine.training.loop import train
from engine.training.passes import Passes
from engine.training.step_sums import StepSums
from engine.trial_report import RECORDING, SAVING, START, TRAIN, PartClock
from tests.support.trials import build

STEP = (torch.tensor(2.0), torch.tensor(1.0))


class Steps:
    """Steps of a trial on a clock that the test sets."""

    def __init__(self, sums: Sums | None = None) -> None:
        self.now_s = 100.0
        self.parts = PartClock(TRAIN, lambda: self.now_s)
        self.sums = StepSums(torch.device("cpu"), 100, sums or Sums(), self.parts)

    def take(self, seconds: float, num_tokens: int, is_first: bool = False) -> None:
        self.now_s += seconds
        self.sums.add(*STEP, num_tokens, 2, is_first)

    def closed(self) -> tuple[float, float]:
        self.sums.close()
        return self.sums.sums.seconds, self.sums.sums.recording_s


def test_what_a_first_step_takes_beyond_the_others_is_no_steady_training():
    steps = Steps()
    steps.take(7.0, 200, is_first=True)  # a steady step of 200 tokens takes 2 s
    for num_tokens in (100, 300):
        steps.take(num_tokens / 100, num_tokens)
    assert steps.closed() == (11.0, 5.0) and steps.parts.seconds(TRAIN) == 6.0
    alone = Steps()
    alone.take(7.0, 200, is_first=True)
    assert alone.closed() == (7.0, 7.0)
    fast = Steps()  # the twin: a first step that is no slower than the others
    fast.take(1.0, 200, is_first=True)
    fast.take(2.0, 200)
    assert fast.closed() == (3.0, 0.0)


def test_saves_between_two_reports_are_no_steps_and_a_continued_trial_adds_up():
    steps = Steps(Sums(num_tokens=50, num_targets=2, num_steps=1, seconds=4.0, recording_s=1.0))
    steps.take(1.0, 100)
    with steps.parts.part(SAVING):
        steps.now_s += 30.0
    steps.take(1.0, 100)
    assert steps.closed() == (6.0, 1.0)
    steps.now_s += 5.0
    steps.parts.move(TRAIN, RECORDING, 3.0)  # graphs of the evaluation
    assert steps.sums.recorded_since_s == 3.0 and steps.sums.sums.seconds == 6.0


def test_the_parts_of_a_trial_add_up_to_its_time_and_its_reports_say_them(tmp_path, tiny_config):
    read: list[float] = []
    parts = PartClock(clock=lambda: read.append(time.perf_counter()) or read[-1])
    reports = list(train(build(tiny_config), tmp_path, parts=parts))
    taken = parts.take()
    assert sum(taken.values()) == pytest.approx(read[-1] - read[0], abs=1e-4)
    last, elapsed_s = reports[-1], [0.0, *(report.elapsed_s for report in reports)]
    for report, (before, after) in zip(reports, itertools.pairwise(elapsed_s)):
        assert report.train_s + report.recording_s == pytest.approx(after - before)
        assert report.eval_s > 0.0
    assert [report.save_s > 0.0 for report in reports] == [False] + [True] * (len(reports) - 1)
    assert 0.5 * last.setup_s < last.model_s + last.data_s + last.attach_s <= last.setup_s and last.data_s > 0.0
    assert sum(report.train_s for report in reports) == pytest.approx(taken[TRAIN], abs=1e-3)
    assert sum(report.eval_s for report in reports) == pytest.approx(taken["eval"], abs=1e-3)


class Recorded:
    """Passes that take some time to record: before the first step, for a row, and in an evaluation."""

    def __init__(self, monkeypatch) -> None:
        self.recorded_s, self.seconds = 0.0, {"record": 0.2, "gradients": 0.005, "evaluate": 0.1}
        monkeypatch.setattr(Passes, "recording_s", property(lambda passes: self.recorded_s))
        for name in self.seconds:
            monkeypatch.setattr(Passes, name, self._slower(name, getattr(Passes, name)))

    def _slower(self, name, compute):
        def computed(passes, *args):
            began_s = time.perf_counter()
            time.sleep(self.seconds[name])
            self.recorded_s += time.perf_counter() - began_s
            return compute(passes, *args)

        return computed


def test_recording_counts_where_it_happened_and_once(tmp_path, tiny_config, monkeypatch):
    passes, parts = Recorded(monkeypatch), PartClock()
    reports = train(build(tiny_config), tmp_path, parts=parts)
    first = next(reports)
    before_first_s = first.setup_s - first.model_s - first.data_s - first.attach_s
    assert passes.seconds["record"] <= before_first_s < passes.seconds["record"] + 0.1
    first_step_s = first.recording_s - (passes.recorded_s - before_first_s)  # what it took beyond the others
    assert first_step_s > -0.1 and first.train_s > 0.0
    before_s = passes.recorded_s
    for report in reports:
        assert report.recording_s == pytest.approx(passes.recorded_s - before_s) and report.train_s > 0.0
        before_s = passes.recorded_s
    assert parts.seconds(RECORDING) == pytest.approx(passes.recorded_s + first_step_s, abs=0.1)


def test_a_stopped_trial_tells_its_caller_what_it_did(tmp_path, tiny_config):
    parts, asked = PartClock(), itertools.count()
    with pytest.raises(Interrupted):
        list(train(build(tiny_config), tmp_path, parts=parts, interrupted=lambda: next(asked) == 1))
    taken = parts.take()
    assert taken[TRAIN] > 0.0 and taken[SAVING] > 0.0 and parts.enter(START) == START
