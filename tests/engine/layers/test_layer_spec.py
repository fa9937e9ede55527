"""A layer is fused only if its description fits: names, numbers and flags are those of the library."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers

from engine.config.trial import LoraConfig
from engine.layers import attention
from engine.layers.layer_spec import family_of, layer_spec, obstacle
from engine.layers.swap import FusedLayer, survey
from engine.shape.families import FAMILIES as DESCRIPTIONS
from engine.shape.policies import Policy
from tests.support.fused_layers import FAMILIES, MIXTURES, batch, build, hidden_states, run, worst

MERGED = [("qkv_proj",), ("gate_up_proj",), ("o_proj", "down_proj"), ("layers.1.mlp.gate_up_proj", "layers.2.self_attn.qkv_proj")]


def first_layer(family, **changes):
    model, _, _ = build(family)
    layer = model.model.layers[0]
    for name, value in changes.items():
        setattr(layer.self_attn.config, name, value)
    return layer


def test_every_family_is_described_once_and_tested_here():
    built = {type(first_layer(family)).__name__ for family in (*FAMILIES, *MIXTURES)}
    assert built == {f"{family.name}DecoderLayer" for family in DESCRIPTIONS.values()}


@pytest.mark.parametrize("targets", MERGED)
def test_any_subset_of_merged_targets_has_the_same_gradients(targets):
    lora = LoraConfig(rank=3, target_modules=targets)
    theirs = run(*build("Phi3")[:2], lora)
    assert worst(run(*build("Phi3", "fused")[:2], lora, policy=Policy.RECOMPUTE), theirs) < 2e-5


WRONG = {
    "SmolLM3": lambda half: {"rotary": "halves" if half.rotary is None else None},
    "Granite": lambda half: {"multiplier": 0.23},
    "Olmo3": lambda half: {"options": attention.AttentionOptions(half.options.scaling, 4)},
    "Phi3": lambda half: {"rotary": "pairs"},
    "Ministral3": lambda half: {"query_scale": None},
    "Glm4": lambda half: {"rotary": "halves"},
    "Exaone4": lambda half: {"rotary": "halves"},
    "HyperCLOVAX": lambda half: {"multiplier": None},
    "HunYuanDenseV1": lambda half: {"norms_rotated": False},
}
"""What the description of a family says that others do not -> the same, wrong."""


@pytest.mark.parametrize("family", WRONG)
def test_what_a_family_alone_has_shows_in_the_comparison(family):
    lora = LoraConfig(rank=3)
    theirs = run(*build(family)[:2], lora)
    model, names, _ = build(family, "fused")
    for module in model.modules():
        if isinstance(module, FusedLayer):
            half = module.spec.attention
            module.spec = dataclasses.replace(module.spec, attention=dataclasses.replace(half, **WRONG[family](half)))
    assert worst(run(model, names, lora), theirs) > 2e-4


@pytest.mark.parametrize(
    ("family", "key"), [("Llama", "attention_dropout"), ("Phi3", "resid_pdrop"), ("SeedOss", "residual_dropout")]
)
def test_a_layer_with_dropout_of_its_own_runs_unfused(family, key):
    assert obstacle(first_layer(family)) is None
    assert obstacle(first_layer(family, **{key: 0.1})) == f"{key} = 0.1 is not computed"


def test_a_layer_that_lacks_what_its_description_names_runs_unfused():
    layer = first_layer("SmolLM3")
    del layer.self_attn.use_rope
    assert obstacle(layer) == "SmolLM3DecoderLayer has no self_attn.use_rope"
    layer = first_layer("Phi3")
    del layer.mlp.gate_up_proj
    assert "mlp.gate_up_proj" in obstacle(layer)
    gated = first_layer("Llama")  # as if half of what the layer makes were an output gate
    gated.self_attn.q_proj = torch.nn.Linear(48, 128)
    assert "makes 192 features of queries, keys and values instead of 128" in obstacle(gated)


def test_queries_are_scaled_by_their_place_in_the_sample_not_in_the_row():
    """The library gives each sample alone the same hidden states as our packed row."""
    model, _, _ = build("Ministral3", "fused")
    lengths = (11, 3, 18)
    with torch.no_grad():
        packed = hidden_states(model, batch(lengths))[0].split(lengths)
        ids = batch(lengths).input_ids_T.split(lengths)
        theirs, _, _ = build("Ministral3")
        theirs.set_attn_implementation("eager")
        for ours, own in zip(packed, ids):
            torch.testing.assert_close(ours, theirs.model(input_ids=own[None]).last_hidden_state[0], rtol=1e-4, atol=1e-5)


def test_short_samples_need_no_query_factors():
    model, _, _ = build("Ministral3", "fused")
    layer = model.model.layers[0]
    positions = torch.arange(6)[None]
    assert layer._query_factors(positions, (4, 2)) is None
    assert layer._query_factors(positions, (6,)).tolist() == pytest.approx([1, 1, 1, 1, 1.20794, 1.20794], rel=1e-4)


def test_the_library_s_window_and_rotation_are_read_layer_by_layer():
    model, _, _ = build("Exaone4")
    halves = [layer_spec(layer).attention for layer in model.model.layers]
    assert [(half.options.sliding_window, half.rotary) for half in halves] == [(5, "halves"), (None, None), (5, "halves")]
    assert family_of(model.model.layers[0]).name == "Exaone4"
    assert len(survey(transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2))).fused) == 2  # fmt: skip
