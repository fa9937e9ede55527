"""The running average is the weighted mean that it says, and changes places with the adapter to the bit."""

from __future__ import annotations

import pytest
import torch

from engine.adapter import running_average
from engine.adapter.flat import FlatAdapter
from engine.adapter.lora import attach, detach
from engine.adapter.running_average import RunningAverage, step_weight
from engine.config.trial import LoraConfig
from engine.evaluation.better_adapter import evaluate_both
from engine.sample_losses import SampleLosses

STEPS = [7, 100, 31, 64, 1, 250, 90]  # tokens


@pytest.fixture
def adapter(base):
    layers = attach(base.model, base.linear_names, LoraConfig(rank=4), 0)
    yield FlatAdapter(layers, base.dtype)
    detach(base.model, layers)


def change(adapter, number):
    drawn = torch.randn(adapter.parameter.shape, generator=torch.Generator().manual_seed(number))
    adapter.parameter.detach().copy_(drawn)
    adapter.refresh()
    return drawn.double()


def by_definition(adapters, horizon):
    """Return the mean over tokens seen t, weighted by t^(1 / horizon - 1), in fp64."""
    ends = torch.tensor(STEPS, dtype=torch.float64).cumsum(0)
    shares = (ends / ends[-1]) ** (1 / horizon)
    weights = torch.diff(shares, prepend=torch.zeros(1, dtype=torch.float64))
    return (weights[:, None] * torch.stack(adapters)).sum(0)


@pytest.mark.parametrize("horizon", [1.0, 0.5, 0.1, 0.01, 1e-6])
def test_the_average_is_the_weighted_mean_over_tokens(adapter, horizon):
    average, adapters, seen = RunningAverage(adapter, horizon), [], 0
    for number, num_tokens in enumerate(STEPS):
        adapters.append(change(adapter, number))
        seen += num_tokens
        average.update(num_tokens, seen)
    torch.testing.assert_close(average.values.double(), by_definition(adapters, horizon), rtol=1e-5, atol=1e-6)
    other = by_definition(adapters, 0.3)  # twin
    assert not torch.allclose(average.values.double(), other, atol=1e-2)


def test_the_first_step_is_the_average_and_the_plain_mean_counts_tokens():
    assert step_weight(64, 64, 0.1) == 1.0
    assert step_weight(50, 200, 1.0) == pytest.approx(0.25)
    assert step_weight(1, 10**12, 0.1) == pytest.approx(1e-11, rel=1e-6)


def test_the_average_takes_the_adapter_s_place_and_gives_it_back(adapter, monkeypatch):
    monkeypatch.setattr(running_average, "EXCHANGED", 1000)
    average = RunningAverage(adapter, 0.5)
    change(adapter, 0), average.update(10, 10)
    change(adapter, 1), average.update(10, 20)
    held = [adapter.parameter, adapter.memory.cast, average.values]
    last, cast, mean = (tensor.detach().clone() for tensor in held)
    places = [tensor.data_ptr() for tensor in held]
    with average.in_place():
        assert torch.equal(adapter.parameter, mean) and torch.equal(average.values, last)
        assert not torch.equal(adapter.memory.cast, cast)
    with pytest.raises(RuntimeError), average.in_place():
        raise RuntimeError
    for tensor, before in zip(held, (last, cast, mean), strict=True):
        assert torch.equal(tensor, before)
    assert [tensor.data_ptr() for tensor in held] == places


def test_without_a_horizon_there_is_no_average_and_nothing_moves(adapter):
    average, before = RunningAverage(adapter, None), change(adapter, 0)
    average.update(10, 10)
    assert average.values is None and torch.equal(adapter.parameter.double(), before)
    evaluated = evaluate_both(lambda: SampleLosses("d", (1.0,), (1,)), average, lambda: None)
    assert evaluated.average is None and torch.equal(adapter.parameter.double(), before)
