"""An adapter gets only layers whose tensors PEFT puts back in their place."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from engine.adapter.lora import LoraLinear, adapter_state, attach
from engine.adapter.peft_files import PREFIX, peft_config
from engine.adapter.peft_fit import misplaced_layers, without_repeats
from engine.config.trial import LoraConfig, ModelConfig
from engine.model import skeleton
from engine.model.comparison import library_losses, random_samples
from engine.model.device import one_thread
from engine.model.guard import plain_linears
from engine.model.pretrained import without_weights
from engine.model.route import pattern_of
from engine.quant.frozen_linear import freeze_linears
from tests.support.model_families import config_of
from tests.support.trials import build

LOST = {
    "deepseek_v3": {"gate_proj", "up_proj", "down_proj"},  # PEFT takes them for parts of the experts
    "falcon_h1": {"out_proj"},  # PEFT refuses this name in Mamba layers
    "laguna": {"gate_proj", "up_proj", "down_proj"},  # PEFT renames their tensors
}


@pytest.fixture(scope="module", params=sorted(LOST))
def family(request):
    """Return a family, its tiny config, its layers' features, and the kinds of layers that PEFT loses."""
    config = skeleton.shrink(config_of(request.param))

    def make():
        return without_weights(copy.deepcopy(config), ModelConfig(path="x"))

    features = {name: (layer.out_features, layer.in_features) for name, layer in plain_linears(make()).items()}
    return request.param, config, features, misplaced_layers(make, features, pattern_of)


def test_the_layers_that_peft_would_lose_are_found(family):
    name, _, features, lost = family
    assert {kind.rpartition(".")[2] for kind in lost} == LOST[name] and lost < {pattern_of(name) for name in features}


def test_a_deep_model_without_its_repeats_keeps_every_kind_of_layer_and_its_names():
    config = config_of("qwen3_next")
    config.num_hidden_layers, config.num_experts = 12, 4
    config.layer_types = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 3
    whole, thin = (without_weights(copy.deepcopy(config), ModelConfig(path="x")) for _ in range(2))
    without_repeats(thin)
    kept = {name: type(module) for name, module in thin.named_modules()}
    every = {name: type(module) for name, module in whole.named_modules()}
    assert kept.items() < every.items()
    assert {pattern_of(name) for name in kept} == {pattern_of(name) for name in every}
    assert sorted(thin.get_decoder().layers._modules) == ["0", "1", "3", "7"]


@pytest.mark.parametrize("family", ["deepseek_v3", "laguna"], indirect=True)
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_choice_of_the_other_layers_has_equal_losses_in_peft(family, tiny_config, tmp_path_factory, data):
    _, config, features, lost = family
    kinds = sorted({pattern_of(layer) for layer in features} - lost)
    chosen = data.draw(st.sets(st.sampled_from(kinds), min_size=1))
    with one_thread():
        ours, theirs, plain = losses(config, [n for n in features if pattern_of(n) in chosen], tiny_config, tmp_path_factory)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(theirs, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["deepseek_v3"], indirect=True)
def test_losses_would_differ_with_the_layers_that_are_left_out(family, tiny_config, tmp_path_factory):
    _, config, features, _ = family
    with one_thread():
        ours, theirs, _ = losses(config, list(features), tiny_config, tmp_path_factory)
    assert not torch.allclose(theirs, ours, rtol=1e-4, atol=1e-4)


def losses(config, targets: list[str], tiny_config, tmp_path_factory) -> list[torch.Tensor]:
    """Return the losses with an adapter on these layers in our layers, in PEFT from its files, and without it."""
    from peft import PeftModel

    torch.manual_seed(0)
    library = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    skeleton.make_loud(library)
    sample = random_samples(skeleton.VOCABULARY)[0]
    ours = copy.deepcopy(library)
    names = freeze_linears(ours, skip=[ours.get_output_embeddings()])
    lora = LoraConfig(rank=2, lora_alpha=4.0, target_modules=tuple(targets))
    layers: dict[str, LoraLinear] = attach(ours, names, lora, 0)
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_b, std=0.5 * layer.out_features**-0.5)
    folder = tmp_path_factory.mktemp("adapter")
    save_file({PREFIX + n: t.contiguous() for n, t in adapter_state(layers).items()}, folder / "adapter_model.safetensors")
    values = peft_config(build(tiny_config, lora=lora.model_dump()), list(layers), [n for n, _ in library.named_modules()])
    (folder / "adapter_config.json").write_text(json.dumps(values))
    with torch.no_grad():
        plain, own = library_losses(library, sample), library_losses(ours, sample)
        return [own, library_losses(PeftModel.from_pretrained(library, folder).eval(), sample), plain]
