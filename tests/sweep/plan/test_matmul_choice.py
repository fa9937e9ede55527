"""`train.matmul=auto` is decided once, by measured speeds alone, and the decision is the sweep's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.config.matmul import AUTO_MODES, Matmul
from engine.planning.cards import CARDS
from engine.planning.rates import Curve, Int8Rates
from engine.planning.sheet_rates import sheet_rates
from sweep.cluster.slots import Hardware
from sweep.config.sweep import parse_sweep_config
from sweep.plan.feasibility import Feasibility
from sweep.plan.matmul_choice import choose_matmul, with_chosen_matmul
from sweep.plan.sweep_plan import make_sweep_plan
from tests.support.calibrated import SHAPES

SHAPE = SHAPES["llama-3.1-8b"]
CONFIG = {
    "model": {"path": "m"}, "data": {"train": "t", "max_seq_length": 2048},
    "train": {"max_tokens": 10**6, "matmul": "auto", "micro_batch_size": 1, "activation_checkpointing": False, "keep_layers": 0,
              "host_layers": 0, "weight_cache_gib": 0.0, "cuda_graphs": True},
    "sweep": {"num_trials": 2, "seed": 0}, "space": {"lora.rank": {"choices": [8, 64]}},
}  # fmt: skip


def card(name: str, gain: float | None = None):
    """Return a card with measured rates, in which INT8 multiplies `gain` times as fast as bf16; None: not measured."""
    sheet = sheet_rates(CARDS[name])
    int8 = gain and Int8Rates(sheet.matmul_tflops.times(gain), *(Curve.flat(rate) for rate in (900.0, 900.0, 900.0)))
    return replace(CARDS[name], rates=replace(sheet, int8=int8))


def plan_of(**train: object):
    config = parse_sweep_config({**CONFIG, "train": {**CONFIG["train"], **train}})
    return make_sweep_plan(config, lambda cluster: Hardware(2, 1))


def chosen(*cards, plan=None, label=None):
    plan = plan or plan_of()
    kinds = {one.name: one for one in cards} if len(cards) > 1 else {}
    return choose_matmul(plan.space, plan.base(), Feasibility(SHAPE, cards[0], kinds=kinds | ({label: None} if label else {})))


def test_the_fastest_mode_that_the_quality_allows_is_chosen_on_cards_that_were_measured():
    found = chosen(card("rtx4090", 3.0))
    assert found.mode is Matmul.INT8_BACKWARD and "times the speed of bf16" in found.reason
    assert Matmul.INT8 not in AUTO_MODES  # its quality does not allow it, though it is faster
    assert chosen(card("rtx4090", 0.8)).mode is Matmul.BF16


@pytest.mark.parametrize(("cards", "label", "why"), [
    ([card("rtx4090")], None, "products in INT8 are not measured on rtx4090"),
    ([card("rtx4090", 3.0), card("l4")], None, "products in INT8 are not measured on l4"),
    ([card("rtx4090", 3.0), card("l4", 0.5)], None, "on the card that gains least: int8_backward 0"),
    ([card("rtx4090", 3.0), card("l4", 3.0)], "node", "no speed is predicted for these cards"),
])  # fmt: skip
def test_one_card_that_is_unknown_or_slower_keeps_the_whole_sweep_in_bf16(cards, label, why):
    found = chosen(*cards, label=label)
    assert found.mode is Matmul.BF16 and why in found.reason and "\n" not in found.line()


def test_what_is_chosen_goes_into_every_trial_and_a_sweep_that_goes_on_keeps_its_setting():
    feasibility = Feasibility(SHAPE, card("rtx4090", 3.0))
    plan, (line,) = with_chosen_matmul(plan_of(), feasibility, True)
    assert plan.base()["train"]["matmul"] == "int8_backward" and line.startswith("matmul     auto is int8_backward: 1.")
    assert plan.space.apply(plan.base(), {"lora.rank": 8}).matmul is Matmul.INT8_BACKWARD
    assert with_chosen_matmul(plan, feasibility, True) == (plan, [])
    old = plan_of()
    assert with_chosen_matmul(old, feasibility, False) == (old, []) and old.config.base().matmul is Matmul.BF16
    for setting in ("bf16", "int8"):
        assert with_chosen_matmul(plan_of(matmul=setting), feasibility, True)[1] == []


def test_a_base_that_is_not_nf4_stays_in_its_dtype():
    config = parse_sweep_config({**CONFIG, "model": {"path": "m", "quantization": "none"}})
    plan = make_sweep_plan(config, lambda cluster: Hardware(2, 1))
    assert chosen(card("rtx4090", 3.0), plan=plan).mode is Matmul.BF16


def test_rows_of_trained_tokens_keep_auto_at_bf16():
    base = {"model": {"train_tokens": ["<tool>"], "quantization": "nf4"}}
    assert choose_matmul(None, base, None).mode is Matmul.BF16


@pytest.mark.parametrize(("lora", "space"), [({"use_dora": True}, {}), ({}, {"lora.use_dora": {"choices": [False, True]}})])
def test_dora_keeps_auto_at_bf16(lora, space):
    config = parse_sweep_config({**CONFIG, "lora": lora, "space": {**CONFIG["space"], **space}})
    plan = make_sweep_plan(config, lambda cluster: Hardware(2, 1))
    found = chosen(card("rtx4090", 3.0), plan=plan)
    assert found.mode is Matmul.BF16 and "DoRA" in found.reason
