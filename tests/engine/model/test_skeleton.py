"""A tiny model has each kind of layer of the large one, and no part of it without effect."""

from __future__ import annotations

import math

import pytest
import torch

from engine.config.trial import ModelConfig
from engine.errors import InputError
from engine.model import skeleton
from engine.model.guard import choose_route
from engine.model.pretrained import model_factory
from tests.support.model_families import config_of


@pytest.mark.parametrize(
    ("model_type", "chosen", "alike"),
    [
        ("jamba", [0, 1, 2, 3, 4], {4: [4, 12, 20, 28]}),  # its class makes every eighth layer attention
        ("recurrent_gemma", [0, 1, 2], {2: [2, 5, 8, 11, 14, 17, 20, 23]}),
        ("qwen3_next", [0, 1, 3, 7], {2: list(range(3, 48, 4))}),  # twin: its config lists the kinds
        ("bamba", [0, 1], {0: list(range(32))}),
    ],
)
def test_layers_of_a_kind_that_only_the_config_s_class_knows_are_tried_too(model_type, chosen, alike):
    config = config_of(model_type)
    assert skeleton.shrink(config).num_hidden_layers == len(chosen)
    assert skeleton._chosen_layers(config)[0] == chosen
    found = skeleton.layers_alike(config)
    assert {number: found[number] for number in alike} == alike


def test_buffers_that_a_checkpoint_holds_are_moved_and_computed_ones_are_not():
    config = skeleton.shrink(config_of("glm4_moe"))
    plain, loud = (model_factory(config).from_config(config).float() for _ in range(2))
    with torch.no_grad():
        for one, other in zip(plain.parameters(), loud.parameters(), strict=True):
            one.copy_(other)
    skeleton.make_loud(loud)
    before, after = dict(plain.named_buffers()), dict(loud.named_buffers())
    moved = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"e_score_correction_bias"}


def test_gradients_that_are_no_numbers_are_a_fault_though_the_losses_are_finite():
    from transformers import Gemma2Config

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 32}
    config = Gemma2Config(vocab_size=200, num_key_value_heads=1, final_logit_softcapping=0.0, **sizes)

    def make(small, name):
        return model_factory(small).from_config(small, attn_implementation=name)

    with pytest.raises(InputError, match=r"the gradient of .* is not finite"):  # the library divides by the cap
        choose_route(config, ModelConfig(path="x"), make)


def test_a_leak_that_is_no_number_is_a_leak(monkeypatch):
    monkeypatch.setattr("engine.model.guard.leaked_gradient", lambda *_: math.nan)
    config = config_of("llama")
    verdict = choose_route(config, ModelConfig(path="x"), lambda small, name: model_factory(small).from_config(small))
    assert not verdict.route.shares_rows
