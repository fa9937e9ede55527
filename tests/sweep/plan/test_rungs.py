"""Rungs are at least one optimizer step apart, at every point of the space."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InputError
from sweep.__main__ import compose, groups
from sweep.config.sweep import parse_sweep_config
from sweep.plan.rungs import check_rungs, longest_step
from sweep.space.parse import parse_space


def config_with(space=None, data=None, **train):
    return parse_sweep_config(
        {
            "model": {"path": "m"},
            "data": {"train": "t", **(data or {})},
            "train": {"max_tokens": 65_536, **train},
            "space": space or {},
        }
    )


def check(config):
    return check_rungs(config, parse_space(config.space))


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (config_with(tokens_per_step=16_384), ["train.num_reports = 8", "at most 4", "16,384", "8,192 apart"]),
        (config_with(tokens_per_step=100_000), ["train.max_tokens = 65536", "at least one step"]),
        (config_with(report_at_tokens=[30_000, 40_000], tokens_per_step=16_384), ["train.report_at_tokens", "10,000 apart"]),
        (config_with({"data.max_seq_length": {"choices": [1024, 16_384]}}, tokens_per_step=2048), ["data.max_seq_length=16384"]),
        (config_with({"train.tokens_per_step": {"low": 1024, "high": 20_000}}), ["train.tokens_per_step="]),
        (config_with({"train.gradient_accumulation_steps": {"choices": [1, 8]}}), ["train.gradient_accumulation_steps=8"]),
        (config_with({"data.packing": {"choices": [True, False]}}, {"packing": False}, tokens_per_step=16_384), ["at most 4"]),
    ],
)  # fmt: skip
def test_a_rung_without_a_step_is_refused_before_anything_starts(config, parts):
    with pytest.raises(InputError) as error:
        check(config)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_what_the_line_proposes_is_taken():
    assert check(config_with(tokens_per_step=16_384, num_reports=4)) is None
    assert check(config_with(tokens_per_step=8192)) is None


def test_without_packing_a_step_is_rarely_as_long_and_there_is_a_warning():
    assert "at least one step to each rung" in check(config_with(data={"packing": False}, tokens_per_step=16_384))
    assert check(config_with(data={"packing": False}, tokens_per_step=8192)) is None


def test_a_condition_that_keeps_long_steps_out_is_respected():
    space = {"data.max_seq_length": {"choices": [1024, 32_768]},
             "train.tokens_per_step": {"choices": [8192, 64_000], "when": {"data.max_seq_length": 1024}}}  # fmt: skip
    config = config_with(space, tokens_per_step=8192)
    assert longest_step(config.base().model_dump(mode="json"), parse_space(space)) == (
        63_488, {"data.max_seq_length": 1024, "train.tokens_per_step": 64_000})  # fmt: skip


@pytest.mark.parametrize("experiment", groups()["experiment"])
def test_committed_sweeps_have_a_step_for_every_rung(experiment):
    for debug in ([], *([f"+debug={name}"] for name in groups()["debug"])):
        assert check(parse_sweep_config(compose([f"+experiment={experiment}", *debug]))) is None


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1000, 10**6), st.sampled_from([128, 1000, 2048, 4096]), st.integers(100, 50_000))
def test_a_plan_that_passes_has_a_step_between_all_rungs(num_reports, max_tokens, length, tokens_per_step):
    config = config_with(
        None, {"max_seq_length": length}, max_tokens=max_tokens, num_reports=num_reports, tokens_per_step=tokens_per_step
    )
    try:
        assert check(config) is None
    except InputError:
        return
    step = config.base().longest_step
    for first in range(1, step, max(1, step // 7)):  # wherever the first step ends, and with steps as long as can be
        seen, passed = first, 0
        for before, rung in itertools.pairwise((0, *config.train.report_grid())):
            passed = 0 if before else 1
            while seen < rung:
                seen, passed = seen + step, passed + 1
            assert passed >= 1
