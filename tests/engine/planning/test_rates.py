"""Rates interpolate between sizes, and a measured rate changes what it should and nothing else."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.errors import InputError
from engine.planning.cards import CARDS, match_card
from engine.planning.known_cards import KEPT, KIND, with_known_rates
from engine.planning.measured_card import MeasuredCard
from engine.planning.rates import Curve, Rates, curve_of
from engine.planning.sheet_rates import rates_of, sheet_rates
from engine.planning.speed import predict_speed
from engine.shape.model_shape import ModelShape
from tests.support.calibrated import ROWS, SHAPES, config_of_row, row_name
from tests.support.paths import ROOT

CARD = CARDS["rtx4090"]
SHAPE = ModelShape(
    num_layers=4, hidden_size=2048, intermediate_size=8192, num_heads=32, num_kv_heads=8, head_dim=64, vocab_size=128256
)
PARTS = {
    "matmul_tflops": {"matmuls"}, "head_tflops": {"head"}, "norm_gb_s": {"norms, rotation, activation", "optimizer"},
    "adapter_gb_s": {"adapters"}, "activation_gb_s": {"norms, rotation, activation"}, "nf4_gb_s": {"dequantisation"},
    "attention_tflops": {"attention"}, "loss_gb_s": {"loss"}, "link_gb_s": {"embedding"},
}  # fmt: skip


def parts(rates: Rates, **train: object) -> dict[str, float]:
    config = parse(TrainConfig, {
        "model": {"path": "m"}, "data": {"train": "x", "max_seq_length": 2048}, "lora": {"rank": 16},
        "train": {"max_tokens": 10**6, "micro_batch_size": 4, "gradient_accumulation_steps": 1, "activation_checkpointing": True,
                  "keep_layers": 0, "host_layers": 0, "weight_cache_gib": 0.0, "cuda_graphs": True, **train},
    })  # fmt: skip
    return predict_speed(config, SHAPE, replace(CARD, rates=rates)).parts


def test_a_curve_is_straight_over_the_logarithm_of_size_and_flat_outside():
    curve = curve_of([(4000, 300), (1000, 100)])
    assert [curve.at(size) for size in (1, 1000, 2000, 4000, 9000)] == pytest.approx([100, 100, 200, 300, 300])
    assert Curve.flat(7.0).at(123) == 7.0


@pytest.mark.parametrize("name", PARTS)
def test_a_rate_that_is_half_doubles_the_time_of_its_own_parts(name):
    sheet = sheet_rates(CARD)
    value = getattr(sheet, name)
    half = replace(sheet, **{name: value / 2 if isinstance(value, float) else Curve.flat(value.at(1) / 2)})
    before, after = parts(sheet), parts(half)
    changed = {part for part in before if not math.isclose(before[part], after[part], rel_tol=1e-9, abs_tol=1e-12)}
    assert changed == PARTS[name]
    if len(changed) == 1 and name != "activation_gb_s":
        assert after[changed.pop()] == pytest.approx(2 * before[next(iter(PARTS[name]))])


def test_backward_attention_and_short_samples_have_their_own_rates():
    sheet = sheet_rates(CARD)
    slow = parts(replace(sheet, attention_backward=Curve.flat(0.445)))["attention"]
    # forward, recomputed forward counted in a backward pass's work, and backward with 2.5 times the work
    assert slow / parts(sheet)["attention"] == pytest.approx((1 + (2.5 + 0.89) / 0.445) / (2 + 2.5 / 0.89))
    short = parts(replace(sheet, half_length=Curve.flat(2048.0)))["attention"]
    assert short / parts(sheet)["attention"] == pytest.approx(2.0 / (1 + 1000 / 2048))


def test_the_factor_of_whole_steps_is_on_all_that_kernels_compute():
    sheet = sheet_rates(CARD)
    before, after = parts(replace(sheet, gaps=Curve.flat(1.0))), parts(replace(sheet, gaps=Curve.flat(2.0)))
    waits = {"embedding", "waiting for the host", "waiting for copies"}
    assert {name: after[name] for name in before} == pytest.approx({n: ms * (1 if n in waits else 2) for n, ms in before.items()})


def test_a_slow_host_is_waited_for_unless_launches_are_recorded():
    slow = replace(sheet_rates(CARD), host_ms=1000.0)
    assert parts(slow, cuda_graphs=False)["waiting for the host"] > 3000 > parts(slow)["waiting for the host"]


@pytest.mark.parametrize("row", [row for row in ROWS if row["tokens_per_second"]], ids=row_name)
def test_a_measurement_of_a_minute_predicts_whole_models(row):
    """Three layers at three widths on one H100 tell the speed of Llama 8B and 1B on another."""
    card = with_known_rates(CARDS["h100"])
    assert card.rates is not None
    predicted = predict_speed(config_of_row(row), SHAPES[row["model"]], card, attention="cudnn")
    assert predicted.tokens_per_second == pytest.approx(row["tokens_per_second"], rel=0.07)


def test_rates_of_an_h200_predict_its_longest_row():
    """The row of 131,072 tokens ran on a card of the same kind, half an hour after the measurement."""
    row = json.loads((ROOT / "engine/bench/results/2026-11-27-h200-long.jsonl").read_text())
    card = with_known_rates(CARDS["h200"])
    assert card.measured.startswith(KIND) and row["card"] == "NVIDIA H200"
    predicted = predict_speed(config_of_row(row), SHAPES[row["model"]], card, attention="cudnn")
    assert predicted.tokens_per_second == pytest.approx(row["tokens_per_second"], rel=0.02)


@pytest.mark.parametrize("file", sorted(KEPT.glob("*.json")), ids=lambda file: file.stem)
def test_a_kept_card_is_whole_and_names_a_known_kind(file):
    kept = MeasuredCard.read(file)
    assert match_card(kept.stack.card) is not None
    assert all(abs(step["predicted_ms"] / step["measured_ms"] - 1.0) < 0.025 for step in kept.steps.values())


def test_rates_survive_json():
    rates = replace(sheet_rates(CARD), gaps=curve_of([(576, 1.3), (4096, 1.1)]))
    assert Rates.from_dict(json.loads(json.dumps(rates.to_dict()))) == rates
    assert rates_of(replace(CARD, rates=rates)) is rates and rates_of(CARD) == sheet_rates(CARD)


@pytest.mark.parametrize("change", [
    {"link_gb_s": 0.0}, {"link_gb_s": -1.0}, {"link_gb_s": math.nan}, {"link_gb_s": 1e9}, {"link_gb_s": True},
    {"link_gb_s": [[1, 2]]}, {"gaps": 1.0}, {"gaps": []}, {"gaps": [[1.0]]}, {"gaps": [[2, 1], [1, 1]]},
    {"gaps": [[1, 1], [1, 2]]},    {"gaps": [["a", 1]]}, {"unknown": 1.0},
])  # fmt: skip
def test_impossible_rates_are_refused_by_name(change):
    with pytest.raises(InputError) as error:
        Rates.from_dict({**sheet_rates(CARD).to_dict(), **change})
    assert next(iter(change)) in str(error.value) or "must hold exactly" in str(error.value)
