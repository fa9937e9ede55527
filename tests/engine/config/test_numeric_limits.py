"""A number in any field of a trial either works in whatever takes it, or is one line."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from engine.adapter.running_average import step_weight
from engine.config.parsing import MAX_COUNT, parse
from engine.config.trial import MAX_BINS, TrainConfig
from engine.data.packing import Cursor
from engine.errors import InputError
from engine.preference.pair_losses import pair_losses
from engine.training.optim import learning_rate, make_optimizer, step_middle
from tests.support.limits import NASTY, numeric_fields

GOOD = {"model": {"path": "m"}, "data": {"train": "d"}, "train": {"max_tokens": 2**20, "num_reports": 4}}
FIELDS = numeric_fields(TrainConfig)


def test_every_number_of_a_trial_is_tried_here():
    assert len(FIELDS) == 42 and {"train.seed", "lora.lora_alpha", "train.keep_layers", "train.report_at_tokens"} <= set(FIELDS)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FIELDS), st.sampled_from(NASTY) | st.integers() | st.floats())
@example("train.seed", 2**64)
@example("train.max_tokens", 10**30)
def test_a_number_works_or_is_one_line(path, value):
    section, field = path.split(".")
    given_value = [value] if field == "report_at_tokens" else value
    try:
        data = {**GOOD["data"], "format": "preference" if section == "preference" else "auto"}
        good = {**GOOD, "data": data}
        config = parse(TrainConfig, {**good, section: {**good.get(section, {}), field: given_value}})
    except InputError as error:
        assert error.field.startswith((path, section)) and "\n" not in str(error)
        return
    use(config)


def use(config: TrainConfig) -> None:
    """Hand every number to what takes it in a trial."""
    torch.manual_seed(config.train.seed)
    Cursor(np.array([5, 9]), config.data.max_seq_length, True, config.train.seed).take(min(config.bins_per_step, 3))
    grid = config.train.report_grid()
    assert grid[-1] == config.train.max_tokens and all(before < after for before, after in itertools.pairwise(grid))
    assert 1 <= config.within_epochs(1000).train.report_grid()[-1] <= config.train.max_tokens
    assert 0 < config.bins_per_step <= MAX_BINS and 0 < config.longest_step < 2**63
    weight = torch.nn.Parameter(torch.ones(4))
    weight.grad = torch.full((4,), 0.5)
    optimizer = make_optimizer(weight, config.optim, 2)
    norm = torch.nn.utils.clip_grad_norm_(weight, config.optim.max_grad_norm or float("inf"))
    assert norm == 1.0 and bool((weight.grad > 0).all())
    rate = learning_rate(config.optim, 0.5)
    assert torch.tensor(rate, dtype=torch.float32) > 0
    optimizer.step()
    assert bool(torch.isfinite(weight).all())
    assert 0.0 < step_weight(1, config.train.max_tokens, config.optim.ema_horizon or 1.0) <= 1.0
    assert 0 < torch.tensor(config.lora.scaling, dtype=torch.float32) < float("inf")
    assert len(range(100)[: config.data.train_max_samples]) >= 1
    logp = torch.tensor([-900.0, -1.0], dtype=torch.float64, requires_grad=True)
    pair_losses(config.preference, logp, torch.tensor([9, 3]), logp.detach().flip(0))[0].sum().backward()
    assert bool(torch.isfinite(logp.grad).all())


def test_the_limits_are_limits_of_the_fields_alone():
    """Twin: the same numbers are taken where they work."""
    for section, field, value in (("train", "seed", 2**63 - 1), ("train", "max_tokens", MAX_COUNT), ("lora", "rank", 65_536)):
        parse(TrainConfig, {**GOOD, section: {**GOOD.get(section, {}), field: value}})


@pytest.mark.parametrize(
    ("train", "field"),
    [
        ({"tokens_per_step": 10**9}, "tokens_per_step"),
        ({"gradient_accumulation_steps": 10**6, "micro_batch_size": 2}, "gradient_accumulation_steps"),
    ],
)
def test_a_step_of_more_rows_than_a_list_can_hold_is_refused(train, field):
    with pytest.raises(InputError, match=rf"train\.{field} = .*at most 1,000,000 rows in one step"):
        parse(TrainConfig, {**GOOD, "data": {"train": "d", "max_seq_length": 8}, "train": {"max_tokens": MAX_COUNT, **train}})


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 10**8), st.integers(1, 10**6), st.integers(0, 10**8),
       st.sampled_from(["constant", "linear", "cosine", "wsd"]), st.floats(0, 0.99), st.sampled_from([0.0, 0.1]))  # fmt: skip
@example(4096, 4000, 4095, "cosine", 0.0, 0.0)
@example(1000, 16_384, 0, "linear", 0.03, 0.0)
def test_no_step_of_any_schedule_has_rate_0_by_running_past_the_end(max_tokens, num_tokens, seen, schedule, warmup, floor):
    assume(num_tokens * 10**6 >= max_tokens)
    middle = step_middle(seen, num_tokens, max_tokens)
    assert 0.0 < middle < 1.0
    if seen + num_tokens <= max_tokens:  # as it always was, to the bit
        assert middle == (seen + num_tokens / 2) / max_tokens
    values = {"lr_schedule": schedule, "warmup_ratio": warmup, "min_lr_ratio": floor, "decay_ratio": 0.01}
    optim = parse(TrainConfig, {**GOOD, "optim": values}).optim
    rate = learning_rate(optim, middle)
    assert 0.0 < rate <= optim.learning_rate
    # not less than a step that ends exactly at the end, nor before its own place
    assert middle <= 1.0 - min(num_tokens, max_tokens) / 2 / max_tokens + 1e-12
