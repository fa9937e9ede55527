"""Check predicted speed against measured rows, in its order, and without torch."""

from __future__ import annotations

from typing import Any

import pytest

from engine.planning.cards import CARDS, Card
from engine.planning.speed import predict_speed
from engine.shape.model_shape import ModelShape
from engine.shape.policies import LADDER
from tests.support.calibrated import ROWS, SHAPES, config_of, config_of_row, row_name
from tests.support.published_models import LLAMA_8B

POLICIES = tuple(policy.value for policy in reversed(LADDER))


@pytest.mark.parametrize("row", [row for row in ROWS if row["tokens_per_second"]], ids=row_name)
def test_predicted_speed_is_near_what_was_measured(row: dict[str, Any]) -> None:
    predicted = predict_speed(config_of_row(row), SHAPES[row["model"]], CARDS["h100"], attention="cudnn")
    assert predicted.tokens_per_second == pytest.approx(row["tokens_per_second"], rel=0.05)
    assert sum(predicted.parts.values()) == pytest.approx(predicted.step_time_ms)


def test_offload_waits_for_a_slow_bus_and_only_then() -> None:
    slow = Card("slow", 80.0, 3350.0, 989.0, pcie_gb_s=1.0)
    config, shape = config_of(policy="offload"), SHAPES["llama-3.1-8b"]
    assert predict_speed(config, shape, slow).parts["waiting for copies"] > 100.0
    fast = predict_speed(config, shape, CARDS["rtx3090"])
    # Nothing overlaps with the first and the last copy.
    assert fast.parts["waiting for copies"] < 0.002 * fast.step_time_ms


def test_small_steps_wait_for_the_host() -> None:
    small = predict_speed(config_of(batch=1, length=64), SHAPES["llama-3.2-1b"], CARDS["h100"])
    assert small.parts["waiting for the host"] > 0.0
    assert predict_speed(config_of(), SHAPES["llama-3.1-8b"], CARDS["h100"]).parts["waiting for the host"] == 0.0


def test_keeping_is_faster_than_recomputing_and_a_better_card_is_faster() -> None:
    shape = SHAPES["llama-3.1-8b"]
    speeds = [predict_speed(config_of(policy=p), shape, CARDS["rtx4090"]).tokens_per_second for p in POLICIES]
    assert speeds == sorted(speeds) and speeds[0] < speeds[-1]
    ascending = ("a10g", "rtx3090ti", "rtx4090", "a100-80", "h100")
    cards = [predict_speed(config_of(), shape, CARDS[name]).tokens_per_second for name in ascending]
    assert cards == sorted(cards)


def test_cached_weights_save_time() -> None:
    config = config_of_row(next(row for row in ROWS if row["weight_cache_gib"] == 4.0))
    without = config.model_copy(update={"train": config.train.model_copy(update={"weight_cache_gib": 0.0})})
    times = [predict_speed(one, SHAPES["llama-3.1-8b"], CARDS["h100"]).step_time_ms for one in (config, without)]
    assert times == sorted(times) and times[0] < times[1]


@pytest.mark.parametrize("changes", [{"model": {"layers": "original"}}, {}], ids=["original", "other family"])
def test_unfused_layers_are_slower(changes: dict[str, Any]) -> None:
    shape = SHAPES["llama-3.1-8b"] if changes else ModelShape.of({**LLAMA_8B, "model_type": "olmo"}, "x")
    fused = predict_speed(config_of(), SHAPES["llama-3.1-8b"], CARDS["rtx4090"])
    assert predict_speed(config_of(**changes), shape, CARDS["rtx4090"]).tokens_per_second < fused.tokens_per_second


def test_an_mlp_without_a_gate_is_no_work_of_three_matrices() -> None:
    kinds = ({**LLAMA_8B, "model_type": kind} for kind in ("olmo", "starcoder2"))
    gated, plain = (predict_speed(config_of(), ModelShape.of(kind, "x"), CARDS["rtx4090"]).parts for kind in kinds)
    features, width = 4096 * 14336, 4096 * 4096
    expected = (2 * features + 2.5 * width) / (3 * features + 2.5 * width)
    assert plain["matmuls"] / gated["matmuls"] == pytest.approx(expected, rel=1e-3)
    assert plain["dequantisation"] < gated["dequantisation"] and plain["adapters"] < gated["adapters"]
    assert plain["norms, rotation, activation"] < gated["norms, rotation, activation"]
    assert plain["attention"] == gated["attention"]
