"""Plans know how the frozen base multiplies: what stays in memory, what takes time."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from engine.config.matmul import Matmul
from engine.errors import InputError
from engine.kernels.eight_bit import int8_ops
from engine.memory.prediction import predict_memory
from engine.planning.cards import CARDS, find_card
from engine.planning.known_cards import with_known_rates
from engine.planning.planner import make_compute_plan
from engine.planning.rates import INT8_GAIN, Curve, Int8Rates, Rates
from engine.planning.sheet_rates import sheet_rates
from engine.planning.speed import predict_speed
from engine.shape.compute_limits import INT8_WIDEST, ROTATED
from engine.shape.layer_plan import cached_bytes, kept_bytes, plan_layers, scale_bytes
from engine.units import GIB
from tests.support.calibrated import SHAPES, config_of, row_name
from tests.support.paths import ROOT

SHAPE, CARD = SHAPES["llama-3.1-8b"], find_card("rtx4090")
GROUPS = {"qkv", "o", "gate_up", "down"}
MEASURED = (
    ("recompute", 1, 0, 0.0, 2, 2048, {"bf16": 6.723, "int8_backward": 6.599, "int8": 6.599}),
    ("keep", 1, 0, 0.0, 2, 2048, {"bf16": 16.911, "int8_backward": 16.787, "int8": 16.787}),
    ("offload", 3, 12, 0.0, 2, 2048, {"bf16": 6.450, "int8_backward": 6.333}),
    ("offload", 2, 14, 0.0, 1, 8192, {"bf16": 7.675, "int8_backward": 7.683, "int8": 7.738}),
)
"""Policy, kept layers, host layers, weight cache, rows and their tokens, and allocated GiB by mode: 8B, one H100, torch 2.11."""


LINES = (ROOT / "engine/bench/results/2026-11-28-h100-matmul-steps.jsonl").read_text().splitlines()
STEPS = [row for row in map(json.loads, LINES) if row["commit"] == "1281df2"]


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


def test_layers_whose_sizes_the_kernels_do_not_take_are_predicted_as_in_bf16():
    assert (ROTATED, INT8_WIDEST) == (int8_ops.GROUP, int8_ops.WIDEST)
    sizes = {"hidden_size": 2056, "intermediate_size": 5000, "num_heads": 8, "num_kv_heads": 1, "head_dim": 72}
    odd = replace(SHAPE, **sizes)
    for mode in (Matmul.INT8_BACKWARD, Matmul.INT8):
        plain, ours = (config_of(weight_cache_gib=1.0, train={"matmul": one.value}) for one in (Matmul.BF16, mode))
        assert plan_layers(ours, odd) == plan_layers(plain, odd) and plan_layers(ours, SHAPE) != plan_layers(plain, SHAPE)
        assert predict_speed(ours, odd, CARD) == predict_speed(plain, odd, CARD)
        assert predict_memory(ours, odd).phases == predict_memory(plain, odd).phases


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


@pytest.mark.parametrize("row", STEPS, ids=row_name)
def test_steps_of_each_mode_are_as_fast_as_predicted(row):
    """Recorded rows of whole samples: cuDNN computes their attention. No INT8 rate of this card has been measured."""
    card, more = with_known_rates(CARDS["h100"]), {"matmul": row["matmul"], "cuda_graphs": True}
    config = config_of(row["batch"], row["length"], 16, row["policy"], row["keep_layers"], row["weight_cache_gib"], train=more)
    predicted = predict_speed(config, SHAPES[row["model"]], card, attention="cudnn")
    assert predicted.tokens_per_second == pytest.approx(row["tokens_per_second"], rel=0.05)


INT8 = Int8Rates(*(Curve.flat(rate) for rate in (1000.0, 700.0, 900.0, 1100.0)))


def test_a_measurement_without_products_in_int8_is_read_and_their_speed_assumed():
    rates = sheet_rates(CARD)
    assert rates.int8 is None and "int8" not in rates.to_dict()
    assert rates.of_int8.matmul_tops.at(4096) == pytest.approx(INT8_GAIN * rates.matmul_tflops.at(4096))
    measured = replace(rates, int8=INT8)
    assert Rates.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured and measured.of_int8 is INT8


@pytest.mark.parametrize("change", [{"matmul_tops": 5.0}, {"more": [[1, 1]]}, {"rows_gb_s": [[1, -1]]}])
def test_an_impossible_measurement_of_int8_is_refused_by_name(change):
    values = replace(sheet_rates(CARD), int8=INT8).to_dict()
    with pytest.raises(InputError, match=r"rates\.int8"):
        Rates.from_dict({**values, "int8": {**values["int8"], **change}})


@pytest.mark.parametrize(("name", "part", "modes"), [
    ("matmul_tops", "matmuls", ("int8_backward", "int8")), ("forward_gb_s", "dequantisation", ("int8",)),
    ("backward_gb_s", "dequantisation", ("int8_backward", "int8")), ("rows_gb_s", "dequantisation", ("int8_backward", "int8")),
])  # fmt: skip
def test_a_measured_rate_of_int8_changes_the_time_of_what_it_makes_and_nothing_else(name, part, modes):
    def parts(mode: str, int8: Int8Rates) -> dict[str, float]:
        config = config_of(2, 2048, 16, "keep", 0, 0.0, train={"matmul": mode, "cuda_graphs": True})
        return predict_speed(config, SHAPE, replace(CARD, rates=replace(sheet_rates(CARD), int8=int8))).parts

    for mode in Matmul:
        before, after = parts(mode, INT8), parts(mode, replace(INT8, **{name: getattr(INT8, name).times(0.5)}))
        assert {key for key in before if before[key] != after[key]} == ({part} if mode in modes else set())
