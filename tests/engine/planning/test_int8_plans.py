"""Plans know how the frozen base multiplies: what stays in memory, what takes time."""

from __future__ import annotations

import json

import pytest

from engine.config.matmul import Matmul
from engine.memory.prediction import predict_memory
from engine.planning.cards import find_card
from engine.planning.planner import make_compute_plan
from engine.planning.rates import INT8_GAIN, Rates
from engine.planning.sheet_rates import sheet_rates
from engine.planning.speed import predict_speed
from engine.shape.layer_plan import cached_bytes, kept_bytes, plan_layers, scale_bytes
from engine.units import GIB
from tests.support.calibrated import SHAPES, config_of

SHAPE, CARD = SHAPES["llama-3.1-8b"], find_card("rtx4090")
GROUPS = {"qkv", "o", "gate_up", "down"}
MEASURED = (
    ("recompute", 1, 0, 0.0, 2, 2048, {"bf16": 6.723, "int8_backward": 6.599, "int8": 6.599}),
    ("keep", 1, 0, 0.0, 2, 2048, {"bf16": 16.911, "int8_backward": 16.787, "int8": 16.787}),
    ("offload", 3, 12, 0.0, 2, 2048, {"bf16": 6.450, "int8_backward": 6.333}),
    ("offload", 2, 14, 0.0, 1, 8192, {"bf16": 7.675, "int8_backward": 7.683, "int8": 7.738}),
)
"""Policy, kept layers, host layers, weight cache, rows and their tokens, and allocated GiB by mode: 8B, one H100, torch 2.11."""


@pytest.mark.parametrize(("policy", "keep_layers", "host_layers", "cache", "batch", "length", "peaks"), MEASURED)
def test_the_predicted_peak_of_each_mode_is_the_measured_one(policy, keep_layers, host_layers, cache, batch, length, peaks):
    for mode, measured in peaks.items():
        more = {"host_layers": host_layers, "matmul": mode}
        config = config_of(batch, length, 16, policy, keep_layers, cache, train=more)
        assert predict_memory(config, SHAPE, evaluation=False).peak_gib == pytest.approx(measured, rel=0.015), mode


def test_the_cache_takes_whole_forms_in_turn_and_counts_their_bytes():
    def kept(mode: Matmul, gib: float) -> tuple[list[frozenset[str]], int]:
        config = config_of(weight_cache_gib=gib, train={"matmul": mode.value})
        plans = plan_layers(config, SHAPE)
        return [plan.cached for plan in plans], cached_bytes(config, SHAPE, plans)

    weights = SHAPE.all_linear_parameters
    for mode, size in ((Matmul.BF16, 2), (Matmul.INT8_BACKWARD, 3), (Matmul.INT8, 2)):
        assert kept_bytes(config_of(train={"matmul": mode.value})) == size
        everything, used = kept(mode, 24.0)
        assert used == size * weights and len(everything[0]) == 4 * len(mode.forms)
    half, used = kept(Matmul.INT8, weights / GIB)
    assert used == weights and all(layer == {f"{group}.forward" for group in GROUPS} for layer in half)
    half, _ = kept(Matmul.INT8_BACKWARD, weights / GIB)
    assert all(layer == {f"{group}.backward" for group in GROUPS} for layer in half)


def test_int8_is_predicted_faster_where_products_take_the_time_and_slower_where_codes_do():
    def speed(mode: Matmul, batch: int) -> float:
        config = config_of(batch, 2048, train={"matmul": mode.value})
        return predict_speed(config, SHAPE, CARD).tokens_per_second

    many, one = ([speed(mode, batch) for mode in Matmul] for batch in (2, 1))
    assert many == sorted(many) and many[-1] > 1.15 * many[0]
    assert many[-1] / many[0] > one[-1] / one[0]


def test_a_plan_of_each_mode_fits_and_says_how_it_multiplies():
    texts = {}
    for mode in Matmul:
        config = config_of(train={"matmul": mode.value, "micro_batch_size": "auto", "activation_checkpointing": "auto",
                                  "keep_layers": "auto", "weight_cache_gib": "auto", "tokens_per_step": 16384})  # fmt: skip
        plan = make_compute_plan(config, SHAPE, CARD)
        assert plan.need_gib <= CARD.memory_gib and plan.apply(config).fingerprint() == config.fingerprint()
        texts[mode] = plan.describe()
    assert "INT8" not in texts[Matmul.BF16]
    assert "input gradients in INT8" in texts[Matmul.INT8_BACKWARD] and "products in INT8" in texts[Matmul.INT8]


def test_scales_are_a_number_for_each_feature_of_a_group():
    qkv, o, gate_up, down = 4096 + 1024 * 2 + 4096, 4096 + 4096, 2 * 14336 + 4096, 4096 + 14336
    assert scale_bytes(SHAPE) == 4 * (qkv + o + gate_up + down)


def test_a_measurement_without_the_gain_of_int8_is_read_with_the_assumed_one():
    rates = sheet_rates(CARD)
    assert rates.int8_gain == INT8_GAIN and "int8_gain" not in rates.to_dict()
    values = {**rates.to_dict(), "int8_gain": 2.5}
    assert Rates.from_dict(json.loads(json.dumps(values))).to_dict() == values
