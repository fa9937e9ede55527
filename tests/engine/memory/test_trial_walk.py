"""What a trial allocates outside its layers is what the library's code allocates there."""

from __future__ import annotations

import pytest
import torch

from engine.adapter.lora import attach
from engine.kernels import ops
from engine.memory.trial_walk import TrialWalk
from engine.model.library_layers import Storages
from engine.shape.layer_plan import adapted_outside
from engine.shape.model_shape import ModelShape
from tests.support import fused_layers
from tests.support.calibrated import config_of

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
