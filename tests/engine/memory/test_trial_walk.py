"""What a trial allocates outside its layers is what the library's code allocates there."""

from __future__ import annotations

import pytest
import torch

from engine.adapter.lora import attach
from engine.kernels import ops
from engine.memory.prediction import predict_memory
from engine.memory.trial_walk import TrialWalk
from engine.model.library_layers import Storages
from engine.shape.layer_plan import adapted_outside, num_trained, plan_layers
from engine.shape.model_shape import ModelShape
from tests.support import fused_layers
from tests.support.calibrated import SHAPES, config_of

TOKENS = 2048


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]], ids=["trained", "frozen"])
def test_inputs_of_every_layer_are_made_as_the_walk_says(targets, monkeypatch):
    """The peak while Gemma 4's per-layer inputs are made, and what stays of them."""
    monkeypatch.setattr(ops, "rms_norm", lambda x, *_: (torch.empty_like(x), torch.empty(x.shape[0], device="meta")))
    monkeypatch.setitem(fused_layers.FAMILIES["Gemma4Text"], "hidden_size_per_layer_input", 64)
    model, names, _ = fused_layers.build("Gemma4Text", "fused", torch.bfloat16)
    config = config_of(1, TOKENS, 8, lora={"target_modules": targets})
    shape = ModelShape.of(model.config.to_dict(), "x")
    attach(model, names, config.lora, 0)
    decoder = model.to("meta").get_decoder()
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    embedded = torch.empty(1, TOKENS, shape.hidden_size, dtype=torch.bfloat16, device="meta")
    with Storages() as storages, torch.set_grad_enabled(True):
        storages.ignore(ids, embedded, *model.parameters(), *model.buffers())
        inputs = decoder.get_per_layer_inputs(ids, embedded)
        inputs = decoder.project_per_layer_inputs(embedded, inputs)
        kept, highest = storages.alive, storages.highest
    assert inputs.requires_grad is bool(adapted_outside(config, shape))
    walk = TrialWalk(config, shape, "flash")
    sizes = walk._begin("forward", TOKENS, TOKENS)
    walked = walk.live.components["per-layer inputs"]
    assert walked == pytest.approx(kept, rel=0.05)  # rstd and the low-rank hidden are left out
    assert walk.live.highest - walk.live.total + walked >= 0.97 * highest
    assert walk.live.highest - walk.live.total + walked <= highest + 1.1 * sizes.inputs


@pytest.mark.parametrize(("start", "copies"), [("pissa", 2), ("loftq", 3)])
def test_a_start_from_the_weights_counts_their_copies_in_fp32_beside_the_factors(start, copies):
    shape, configs = SHAPES["llama-3.1-8b"], [config_of(1, 128, 64, lora={"start": one}) for one in ("default", start)]
    usual, phases = (predict_memory(config, shape).phases for config in configs)
    number, held = (num_trained(config, shape, plan_layers(config, shape)) for config in configs)
    without_adapter = usual["at rest"] - (4 + 4 + 2 + 2) * number
    assert phases["start"] == pytest.approx(without_adapter + 8 * held + copies * 4 * 14336 * 4096, rel=0.01)
    assert "start" not in usual


def test_the_adapter_is_kept_while_the_base_is_evaluated_beside_it():
    shape, sets = SHAPES["llama-3.1-8b"], {"eval": {"a": "x", "b": "y"}}
    usual, limited = (config_of(1, 128, 64, data={**sets, **more}) for more in ({}, {"eval_limits": {"a": {"above_base": 0.1}}}))
    number = num_trained(usual, shape, plan_layers(usual, shape))
    before, now = predict_memory(usual, shape).phases, predict_memory(limited, shape).phases
    assert {name: now[name] - size for name, size in before.items() if now[name] != size} == {"evaluation": 4 * number}


def test_a_recorded_row_counts_the_gaps_that_flash_attention_leaves_between_its_places_for_samples():
    configs = [config_of(2, 4096, train={"cuda_graphs": graphs}) for graphs in (False, True)]
    walks = [TrialWalk(config, SHAPES["llama-3.1-8b"], "flash") for config in configs]
    plain, recorded = (walk._begin("forward", 8192, 4096) for walk in walks)
    heads = 32 * 129 * 4  # dq and a sum of each head in fp32
    assert recorded.documents == 64 and recorded.flash_workspace - plain.flash_workspace == 64 * 128 * heads
