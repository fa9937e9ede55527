"""A tiny model has each kind of layer of the large one, and no part of it without effect."""

from __future__ import annotations

import pytest
import torch

from engine.model import skeleton
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
