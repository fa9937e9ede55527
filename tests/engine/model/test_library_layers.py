"""What is measured of a library's layers without values is what its real code keeps with them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from engine.adapter.lora import attach
from engine.bench.shapes import random_base
from engine.command_answers import Facts
from engine.config.trial import LoraConfig, ModelConfig
from engine.memory.prediction import predict_memory
from engine.memory.trial_walk import TrialWalk
from engine.model import library_layers
from engine.model.inspect import known_shape
from engine.quant.expert_quantizer import place_experts
from engine.quant.frozen_experts import freeze_experts
from engine.quant.frozen_linear import freeze_linears
from engine.shape.library_bytes import MEASURED_RANK
from engine.shape.model_shape import ModelShape
from engine.training.card_plan import _with_library_bytes
from tests.support.calibrated import config_of
from tests.support.model_families import MIXTURE_OF_GEMMA4

SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64,
         "num_hidden_layers": 5, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
FAMILIES = ("olmo", "starcoder2", "cohere", "arcee")


def found(kind: str, **changes):
    return CONFIG_MAPPING[kind](**SIZES | changes)


def make(config, attention_name: str):
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention_name)


def saved_a_token(kind: str, dropout: bool) -> float:
    """Return the bytes that autograd saves inside the second layer on the CPU, for one more token."""
    model = make(found(kind, num_hidden_layers=2), "sdpa").to(torch.bfloat16).requires_grad_(False).train()
    names = freeze_linears(model, skip=[model.get_output_embeddings()])
    adapters = attach(model, names, LoraConfig(rank=MEASURED_RANK, lora_dropout=0.1 if dropout else 0.0), 0)
    for adapter in adapters.values():  # torch's CPU code keeps a mask of two bytes, CUDA's one
        adapter.drop = lambda x: torch.native_dropout(x, 0.1, True)[0]
    sums = [saved_bytes(model, tokens) for tokens in (256, 512)]
    return (sums[1] - sums[0]) / 256


def saved_bytes(model, tokens: int) -> int:
    """Return the bytes that the second layer saves of what is made in it."""
    saved: dict[int, int] = {}
    outside = {p.data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def enter(module, given, named):
        places = torch.utils._pytree.tree_leaves((given, named))
        outside.update(t.untyped_storage().data_ptr() for t in places if isinstance(t, torch.Tensor))
        hooks.__enter__()

    layer, hooks = model.get_decoder().layers[1], saved_tensors_hooks(keep, lambda tensor: tensor)
    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True),
               layer.register_forward_hook(lambda *_: hooks.__exit__(None, None, None))]  # fmt: skip
    ids = torch.ones(1, tokens, dtype=torch.long)
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state  # the graph keeps what was saved
    for handle in handles:
        handle.remove()
    assert hidden.requires_grad
    return sum(size for place, size in saved.items() if place not in outside)


@pytest.fixture(scope="module")
def measured():
    return {kind: library_layers.measure(found(kind), make) for kind in FAMILIES}


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_layer_keeps_what_autograd_saves_in_it(measured, kind, dropout):
    """Its output comes on top, because the next layer reads it."""
    output = 2 * SIZES["hidden_size"]
    kept = measured[kind].of(False, dropout).layer - output
    assert kept == pytest.approx(saved_a_token(kind, dropout), rel=0.01)
    assert measured[kind].of(True, dropout).layer == output


def test_norms_and_activations_of_families_differ(measured):
    """OLMo normalises in fp32, StarCoder2 in 16 bits and without a gate, Cohere step by step in fp32."""
    kept = {kind: one.of(False, False).layer for kind, one in measured.items()}
    assert kept["starcoder2"] < kept["arcee"] < kept["cohere"] < kept["olmo"]
    again = {kind: one.of(True, False).backward for kind, one in measured.items()}
    assert again["starcoder2"] < 0.8 * again["olmo"]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("policy", ["recompute", "keep"])
def test_the_walk_of_all_layers_and_another_rank_counts_what_they_allocate(measured, policy, dropout):
    config, tokens = found("olmo"), library_layers.TOKENS
    with torch.device("meta"):
        model = make(config, library_layers.NAME).to(torch.bfloat16).requires_grad_(False)
        names = freeze_linears(model, skip=[model.get_output_embeddings()])
    adapters = attach(model, names, LoraConfig(rank=32), 0)
    for adapter in adapters.values():
        adapter.drop = library_layers._Mask.apply
    whole = library_layers._train(model, adapters, [], policy == "recompute", dropout > 0.0)
    counted = (5 * whole.layer + max(whole.forward, whole.backward)) * tokens
    shape = replace(ModelShape.of(config.to_dict(), "x"), library=measured["olmo"])
    trial = config_of(batch=4, length=tokens // 4, rank=32, policy=policy, lora={"lora_dropout": dropout})
    walk = TrialWalk(trial, shape, "flash")
    walk.train()
    inputs = 2 * tokens * SIZES["hidden_size"] + 40 * tokens + walk.live.components["batch and rotary"]
    assert walk.live.highest - inputs == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize(("targets", "most"), [("all-linear", 1.03), (["q_proj", "k_proj", "v_proj", "o_proj"], 1.04)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("policy", ["recompute", "keep"])
@pytest.mark.parametrize("kind", ["olmo", "starcoder2"])
def test_the_walk_counts_dora_and_what_adapters_of_attention_alone_save(measured, kind, policy, dropout, targets, most):
    """DoRA keeps two more outputs of each adapted layer; a frozen layer needs no input for its backward pass."""
    config, tokens, found_bytes = found(kind), library_layers.TOKENS, {}
    shape = replace(ModelShape.of(config.to_dict(), "x"), library=measured[kind])
    for dora in (False, True):
        with torch.device("meta"):
            model = make(config, library_layers.NAME).to(torch.bfloat16).requires_grad_(False)
            names = freeze_linears(model, skip=[model.get_output_embeddings()])
        adapters = attach(model, names, LoraConfig(rank=32, target_modules=targets), 0)
        whole = library_layers._train(model, adapters, [], policy == "recompute", dropout > 0.0, dora)
        counted = (5 * whole.layer + max(whole.forward, whole.backward)) * tokens
        lora = {"lora_dropout": dropout, "use_dora": dora, "target_modules": targets}
        trial = config_of(batch=4, length=tokens // 4, rank=32, policy=policy, lora=lora)
        walk = TrialWalk(trial, shape, "flash")
        walk.train()
        inputs = 2 * tokens * SIZES["hidden_size"] + 40 * tokens + walk.live.components["batch and rotary"]
        assert 0.995 <= (walk.live.highest - inputs) / counted <= most
        found_bytes[dora] = counted
    assert found_bytes[True] > 1.05 * found_bytes[False]


def test_the_walk_counts_the_rank_of_each_layer(measured):
    """Of five layers four have rank 64: the walk is four fifths of the way from rank 8 in all to rank 64 in all."""
    shape, tokens = replace(ModelShape.of(found("olmo").to_dict(), "x"), library=measured["olmo"]), library_layers.TOKENS

    def graph(rank: int, **lora) -> int:
        walk = TrialWalk(config_of(batch=4, length=tokens // 4, rank=rank, policy="keep", lora=lora), shape, "flash")
        walk.train()
        return walk.live.highest

    low, high = graph(8), graph(64)
    mixed = graph(8, rank_pattern={r".*layers\.[0-3]\..*": 64})
    assert mixed - low == pytest.approx(0.8 * (high - low), rel=0.02) and high > 1.02 * low


@pytest.mark.parametrize("policy", ["recompute", "keep"])
def test_the_walk_of_a_mixture_in_the_library_s_layers_is_an_upper_estimate(policy):
    """Gemma 4 has its MLP beside the experts, and global layers with wider heads."""
    tokens = library_layers.TOKENS
    config = CONFIG_MAPPING["gemma4_text"](**SIZES | MIXTURE_OF_GEMMA4 | {
        "num_hidden_layers": 6, "head_dim": 32, "global_head_dim": 64, "hidden_size_per_layer_input": 0})  # fmt: skip
    with torch.device("meta"):
        model = make(config, library_layers.NAME).to(torch.bfloat16).requires_grad_(False)
        place_experts(model, double_quantization=True)
        names = freeze_linears(model, skip=[model.get_output_embeddings()]) + freeze_experts(model)
    targets = ["all-linear", "experts"]
    adapters = attach(model, names, LoraConfig(rank=32, target_modules=targets), 0)
    whole = library_layers._train(model, adapters, [1] * 6, policy == "recompute", dropout=False)
    counted = (6 * whole.layer + max(whole.forward, whole.backward)) * tokens
    shape = library_layers.with_library_bytes(ModelShape.of(config.to_dict(), "x"), ModelConfig(path="x"), config, make)
    trial = config_of(batch=4, length=tokens // 4, rank=32, policy=policy, lora={"target_modules": targets})
    walk = TrialWalk(trial, shape, "flash")
    walk.train()
    inputs = 2 * tokens * SIZES["hidden_size"] + 40 * tokens + walk.live.components["batch and rotary"]
    assert 1.0 <= (walk.live.highest - inputs) / counted <= 1.1
    assert not walk.is_rough


def test_what_cannot_run_without_values_is_estimated():
    def broken(config, attention_name):
        raise ValueError("needs values")

    config = found("olmo")
    shape = ModelShape.of(config.to_dict(), "x")
    assert library_layers.with_library_bytes(shape, ModelConfig(path="x"), config, broken) is shape
    assert predict_memory(config_of(), shape).rough


def test_what_loops_over_tokens_is_estimated(tiny_model_dir, monkeypatch):
    config = ModelConfig(path=str(tiny_model_dir), layers="original")
    monkeypatch.setattr(library_layers, "MAX_OPERATIONS", 100)
    assert known_shape(config).library is None


def test_a_worker_measures_the_layers_of_its_base_once(monkeypatch):
    base = random_base("tiny", torch.device("cpu"), torch.float32, fused=False)
    shape, config = ModelShape.of(base.model.config.to_dict(), "tiny"), ModelConfig(path="tiny", layers="original")
    found = _with_library_bytes(shape, config, base)
    assert found.library is not None and base.model.config.num_hidden_layers == shape.num_layers
    monkeypatch.setattr(library_layers, "measure", None)
    assert _with_library_bytes(shape, config, base) == found


def test_only_layers_of_the_library_are_measured_and_the_driver_gets_the_bytes(tiny_model_dir):
    assert known_shape(ModelConfig(path=str(tiny_model_dir))).library is None
    shape = known_shape(ModelConfig(path=str(tiny_model_dir), layers="original"))
    assert len(shape.library.passes) == 16 and min(p.layer for p in shape.library.passes) > 0
    assert Facts.from_dict(json.loads(json.dumps(Facts(shape=shape).to_dict()))).shape == shape
    predicted = predict_memory(config_of(model={"layers": "original"}), shape)
    assert not predicted.rough and math.isclose(predicted.fragmentation, 0.08)
