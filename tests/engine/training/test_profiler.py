"""train.profile_steps writes a trace of a few steps and changes nothing else."""

from __future__ import annotations

import gzip
import json

import pytest

from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.errors import InputError
from engine.model.device import one_thread
from engine.training.loop import train
from tests.support.trials import build, run, same_numbers


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


def marks(folder):
    """Return the names of the profiler's step marks in the trace."""
    with gzip.open(folder / "profile" / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    return sorted({event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")})


def test_so_many_steps_are_traced_and_the_trial_is_the_same(tiny_config, tmp_path):
    plain = build(tiny_config)
    traced = build(tiny_config, train={"profile_steps": 2})
    assert plain.fingerprint() == traced.fingerprint()
    assert same_numbers(run(traced, tmp_path / "traced"), run(plain, tmp_path / "plain"))
    assert marks(tmp_path / "traced") == ["ProfilerStep#2", "ProfilerStep#3"]  # steps 3 and 4
    ops = (tmp_path / "traced" / "profile" / "ops.txt").read_text()
    assert "aten::mm" in ops and "Self CPU" in ops
    assert not (tmp_path / "plain" / "profile").exists()


def test_a_trial_that_ends_among_the_traced_steps_leaves_those_that_were_made(tiny_config, tmp_path):
    config = build(tiny_config, train={"profile_steps": 4, "report_at_tokens": [800]})
    reports = train(config, tmp_path)
    next(reports)  # the fourth step reaches 800 tokens
    reports.close()
    # step 5: only the evaluation before it
    assert marks(tmp_path) == ["ProfilerStep#2", "ProfilerStep#3", "ProfilerStep#4"]


@pytest.mark.parametrize("steps", [5, -1, 1.5, "all"])
def test_more_steps_than_there_are_is_one_line(tiny_config, steps):
    # six steps but the first two
    parse(TrainConfig, {**tiny_config, "train": {**tiny_config["train"], "profile_steps": 4}})
    with pytest.raises(InputError) as error:
        parse(TrainConfig, {**tiny_config, "train": {**tiny_config["train"], "profile_steps": steps}})
    assert str(error.value).startswith(f"train.profile_steps = {steps!r}: ") and "\n" not in str(error.value)
