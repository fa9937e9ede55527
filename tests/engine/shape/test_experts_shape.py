"""Mixtures are counted: all parameters, those of one token, and what an adapter on experts holds."""

from __future__ import annotations

import pytest
import torch

from engine.bench.shapes import random_config
from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.errors import InputError, OutOfMemory
from engine.memory.prediction import predict_memory
from engine.planning.cards import CARDS
from engine.planning.planner import make_compute_plan
from engine.planning.speed import predict_speed
from engine.shape.layer_plan import base_bytes, num_trained, plan_layers
from engine.shape.model_shape import ModelShape
from engine.units import GIB
from tests.support.model_families import config_of, released_mixture

PLAIN = {"micro_batch_size": 1, "activation_checkpointing": True, "keep_layers": 0, "host_layers": 0, "weight_cache_gib": 0.0}


RELEASED = ("qwen3.5-35b-a3b", "gemma-4-26b-a4b")


def found(name):
    return released_mixture(name) if name in RELEASED else random_config(name)


def shape_of(name):
    return ModelShape.of(found(name).to_dict(), name)


def config(targets, **lora):
    return parse(TrainConfig, {
        "model": {"path": "m"}, "data": {"train": "random", "max_seq_length": 2048, "eval_max_seq_length": 2048},
        "lora": {"rank": 16, "target_modules": targets, **lora}, "optim": {"name": "adamw_8bit"},
        "train": {"max_tokens": 10**6, "tokens_per_step": 16384, "cuda_graphs": False, **PLAIN},
    })  # fmt: skip


def changed(config, **loop):
    return config.model_copy(update={"train": config.train.model_copy(update=loop)})


@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "gpt-oss-20b", "mixtral", "olmoe", *RELEASED])
def test_a_mixture_s_parameters_and_linear_layers_are_the_library_s(model):
    from transformers import AutoModelForCausalLM

    config = config_of(model) if model in ("mixtral", "olmoe") else found(model)
    with torch.device("meta"):
        library = AutoModelForCausalLM.from_config(config)
    shape = ModelShape.of(config.to_dict(), model)
    linear = {n: (m.out_features, m.in_features) for n, m in library.named_modules() if isinstance(m, torch.nn.Linear)}
    del linear["lm_head"]
    named = {f"model.layers.{i}.{shape.layer.path(group, name)}": one.projections()[name]
             for i, one in enumerate(shape.each) for group, names in one.groups.items() for name in names}  # fmt: skip
    assert named == linear
    assert shape.num_parameters == sum(p.numel() for p in library.parameters())
    stacked = sum(p.numel() for n, p in library.named_parameters() if n.endswith(("experts.gate_up_proj", "experts.down_proj")))
    assert shape.num_layers * shape.experts.parameters(shape.hidden_size) == stacked


def test_a_token_takes_a_few_experts_and_a_short_row_cannot_hit_all():
    experts = shape_of("qwen3-30b-a3b").experts
    assert 48 * experts.active_parameters(2048) == 1_811_939_328  # with attention, head and embedding about 3.3e9
    assert experts.hit(2048) == 128 and experts.hit(5) == 40


@pytest.mark.parametrize("model", RELEASED)
def test_a_released_mixture_with_shared_experts_or_an_mlp_beside_them_is_planned_for_a_24_gb_card(model):
    shape, card = shape_of(model).with_kernels(), CARDS["rtx4090"]
    opened = changed(config("all-linear"), micro_batch_size="auto", activation_checkpointing="auto", keep_layers="auto")
    plan = make_compute_plan(opened, shape, card)
    assert 0.7 * card.memory_gib < plan.memory.need_gib < card.memory_gib and plan.memory.rough
    assert 500 < plan.speed.tokens_per_second < 20_000
    experts = config(["all-linear", "experts"])
    numbers = [num_trained(one, shape, plan_layers(one, shape)) for one in (config("all-linear"), experts)]
    both = 3 * shape.experts.width + 2 * shape.hidden_size
    assert numbers[1] - numbers[0] == 16 * shape.num_layers * shape.experts.number * both
    with pytest.raises(OutOfMemory, match="needs at least"):
        make_compute_plan(config(["attention", "experts"], rank=64), shape, card)


def test_rank_16_on_all_experts_of_qwen3_30b_a3b_fits_23_5_gib_with_the_optimizer_s_states_on_the_host():
    shape, lean = shape_of("qwen3-30b-a3b"), config(["attention", "experts"])
    opened = changed(lean, memory_budget_gib=23.5, activation_checkpointing="auto", keep_layers="auto")
    plan = make_compute_plan(opened, shape, CARDS["h100"])
    assert plan.offload_optimizer and plan.need_gib < 23.5 and "optimizer states on the host" in plan.describe()
    assert not make_compute_plan(changed(opened, memory_budget_gib=40.0), shape, CARDS["h100"]).offload_optimizer
    with pytest.raises(OutOfMemory, match="needs at least"):
        make_compute_plan(changed(opened, offload_optimizer=False), shape, CARDS["h100"])
    peaks = [predict_memory(changed(lean, offload_optimizer=hosted), shape) for hosted in (False, True)]
    number = num_trained(lean, shape, plan_layers(lean, shape))
    assert peaks[1].host_bytes == 2 * number + peaks[0].host_bytes
    assert 0.9 * 2 * number < peaks[0].peak_bytes - peaks[1].peak_bytes < 2 * number
    speeds = [predict_speed(changed(lean, offload_optimizer=hosted), shape, CARDS["h100"]) for hosted in (False, True)]
    assert 0.9 * speeds[0].tokens_per_second < speeds[1].tokens_per_second <= speeds[0].tokens_per_second
    with pytest.raises(OutOfMemory, match="needs at least"):  # the host has no room for them
        make_compute_plan(opened, shape, CARDS["h100"], host_gib=1.0)


def test_an_adapter_on_experts_and_its_memory_are_counted():
    shape = shape_of("qwen3-30b-a3b")
    attention, both = config("attention"), config(["attention", "experts"])
    less = config(["attention", "experts"], rank_pattern={".*experts.*": 4})
    numbers = [num_trained(one, shape, plan_layers(one, shape)) for one in (attention, both, less)]
    experts = 48 * 128 * 16 * ((1536 + 2048) + (2048 + 768))
    assert numbers[1] - numbers[0] == experts and numbers[2] - numbers[0] == experts // 4
    assert num_trained(config("all-linear"), shape, plan_layers(config("all-linear"), shape)) == numbers[0]
    bits = 8 * base_bytes(both, shape)["base weights"] / (shape.num_parameters - 2 * shape.vocab_size * 2048)
    assert 4.1 < bits < 4.2
    peaks = [predict_memory(one, shape).peak_gib for one in (attention, both)]
    assert 12 * experts / 2**30 - 2 < peaks[1] - peaks[0] < 12 * experts / 2**30 + 4
    card = next(iter(CARDS.values()))
    assert predict_speed(both, shape, card).tokens_per_second < predict_speed(attention, shape, card).tokens_per_second


def test_room_to_dequantise_experts_is_counted_chosen_on_hopper_alone_and_faster_there():
    shape, size = shape_of("qwen3-30b-a3b"), 2 * 129 * (1536 + 768) * 2048  # both weights
    opened = changed(config("attention"), weight_cache_gib="auto", micro_batch_size="auto")
    plans = {name: make_compute_plan(opened, shape, CARDS[name]) for name in ("h100", "a100-80", "rtx4090")}
    assert plans["h100"].weight_cache_gib * GIB >= size and not any(plans[n].weight_cache_gib for n in ("a100-80", "rtx4090"))
    with_room = plans["h100"].apply(opened)
    without = changed(with_room, weight_cache_gib=0.0)
    assert predict_memory(with_room, shape).peak_bytes - predict_memory(without, shape).peak_bytes == size
    speeds = [predict_speed(one, shape, CARDS["h100"]).tokens_per_second for one in (with_room, without)]
    assert speeds[0] > 1.2 * speeds[1]
    same = [predict_speed(one, shape, CARDS["a100-80"]).tokens_per_second for one in (with_room, without)]
    assert same[0] == same[1]


def test_a_mixture_with_dense_layers_among_its_experts_is_not_predicted():
    content = random_config("qwen3-30b-a3b").to_dict() | {"mlp_only_layers": [0]}
    with pytest.raises(InputError, match="nothing is predicted for such a model with experts"):
        ModelShape.of(content, "m")
