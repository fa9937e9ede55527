"""A number in any field of a sweep either works in whatever takes it, or is one line."""

from __future__ import annotations

import subprocess
import threading
from typing import Any

import optuna
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.errors import InputError
from sweep.cluster.slots import plan_slots
from sweep.config.pruner_options import PRUNERS
from sweep.config.sampler_options import SAMPLERS
from sweep.config.sweep import SweepConfig, parse_sweep_config
from sweep.plan.sweep_plan import make_sweep_plan
from sweep.space.parse import parse_space
from sweep.study.pruners import make_optuna_pruner, make_pruner
from sweep.study.samplers import make_sampler, proposal_seed
from tests.support.limits import NASTY, numeric_fields

GOOD = {"model": {"path": "m"}, "data": {"train": "d", "max_seq_length": 64}, "train": {"max_tokens": 2**20, "num_reports": 4}}
NUMBERS = st.sampled_from(NASTY) | st.integers() | st.floats()
FIELDS = [
    f"{section}.{path}"
    for section in ("sweep", "cluster", "tracking")
    for path in numeric_fields(SweepConfig.model_fields[section].annotation)
]
OPTIONS = [
    (kind, name, path)
    for kind, models in (("sampler", SAMPLERS), ("pruner", PRUNERS))
    for name, model in models.items()
    for path in numeric_fields(model)
]


def with_value(path: str, value: Any) -> dict[str, Any]:
    *sections, field = path.split(".")
    inner: dict[str, Any] = {field: value}
    for section in reversed(sections):
        inner = {section: inner}
    return {**GOOD, **inner}


def test_every_number_of_a_sweep_is_tried_here():
    assert len(FIELDS) == 19 and {"sweep.budget.gpu_hours", "cluster.num_gpus", "tracking.metrics_port"} <= set(FIELDS)
    assert len(OPTIONS) == 16


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(FIELDS), NUMBERS)
@example("sweep.seed", 2**64)
@example("cluster.wait_s", 1e300)
@example("cluster.num_cpu_slots", 10**400)
def test_a_number_works_or_is_one_line(path, value):
    try:
        config = parse_sweep_config(with_value(path, value))
        plan_slots(config.cluster, "cpu", 0, 4)
    except InputError as error:
        assert error.field.startswith(path.split(".")[0]) and "\n" not in str(error)
        return
    assert 0 <= proposal_seed(config.sweep.seed, config.sweep.num_trials) < 2**32
    parse_space({"lora.rank": {"choices": [2, 4]}}).shuffled_points(config.sweep.seed)
    for seconds in (config.cluster.wait_s, config.cluster.report_timeout_s or 0.0):
        assert 0.0 <= seconds < threading.TIMEOUT_MAX
    for hours in (config.sweep.budget.gpu_hours, config.sweep.budget.wall_clock_hours):
        assert hours is None or hours * 3600 < 2**53


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(OPTIONS), NUMBERS)
@example(("pruner", "successive_halving", "min_early_stopping_rate"), 64)
@example(("pruner", "hyperband", "min_rung"), 5)
@example(("sampler", "tpe", "num_ei_candidates"), 100_000)
def test_a_number_of_a_sampler_or_pruner_works_or_is_one_line(option, value):
    kind, name, path = option
    try:
        config = parse_sweep_config({**GOOD, kind: {"name": name, path: value}})
        plan = make_sweep_plan(config)
    except InputError as error:
        assert error.field == f"{kind}.{path}" and "\n" not in str(error)
        return
    sampler = make_sampler(config.sampler, 0)
    study = optuna.create_study(sampler=sampler, pruner=make_optuna_pruner(config.pruner, plan.num_rungs))
    study.ask().suggest_float("x", 0.0, 1.0)
    pruner = make_pruner(config.pruner, plan.num_rungs, "study")
    assert pruner.prunes(0, {1: 2.0}) in (True, False)


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch):
    monkeypatch.setattr("sweep.cluster.slots.count_gpus", lambda: 0)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: 1 / 0)


@pytest.mark.parametrize(
    "leaf",
    [{"low": 1, "high": 10**400}, {"low": 1e-4, "high": 1.0, "step": 1e-300}, {"low": 0.1, "high": 1.0, "step": 10**400},
     {"low": float("nan"), "high": 1.0}, {"low": 0.0, "high": float("inf")}, {"low": -(10**400), "high": 1}],
)  # fmt: skip
def test_a_range_of_the_space_has_bounds_too(leaf):
    with pytest.raises(InputError, match=r"space\.optim\.learning_rate"):
        parse_space({"optim.learning_rate": leaf})
