"""The guard: a model is trained only if its losses and gradients are the library's own."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.bench.shapes import random_config
from engine.config.trial import ModelConfig
from engine.errors import InputError
from engine.layers import attention
from engine.model import guard, verdicts
from engine.model.comparison import library_losses, our_losses, random_samples
from engine.model.guard import check_loaded
from engine.model.route import ModelVerdict, Route
from engine.quant.bnb import library_linear
from engine.quant.frozen_linear import FrozenLinear
from tests.support.model_families import judge, kind

PACKED = "its own layers"
SINGLE = "its own layers; one sample a row"


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", "fused layers"),
        ("qwen3", "fused layers"),
        ("gemma3_text", "fused layers"),
        ("olmo2", "fused layers"),
        ("granite", "fused layers"),
        ("apertus", PACKED),
        ("starcoder2", PACKED),
        ("deepseek_v3", PACKED),
        ("qwen3_moe", PACKED),
        ("qwen3_5_text", SINGLE),
        ("lfm2", SINGLE),
        ("granitemoehybrid", SINGLE),
        ("hyperclovax", "fused layers"),
        ("falcon_h1", "its own layers; the model's own logits, one sample a row"),
        ("gpt_oss", "its own layers; the model's own attention (eager), one sample a row"),
        ("stablelm", "its own layers; the model's own attention (sdpa), one sample a row"),
    ],
)
def test_each_family_is_computed_in_a_way_that_gives_the_library_s_losses(model_type, expected):
    assert kind(judge(model_type)) == expected


LATER = [pytest.param(name, marks=pytest.mark.faults) for name in ("phi-3-mini", "ministral-8b", "glm-4-9b", "exaone-4-1.2b")]


@pytest.mark.parametrize("model", ["smollm3-3b", "granite-3.3-8b", "olmo-3-7b", "phi-4-mini", "ministral-3-8b", *LATER])
def test_released_models_run_fused_with_their_own_multipliers_layer_kinds_and_rotary_settings(model):
    from transformers import AutoModelForCausalLM

    verdict = guard.choose_route(
        random_config(model),
        ModelConfig(path=model),
        lambda small, name: AutoModelForCausalLM.from_config(small, attn_implementation=name),
    )
    assert kind(verdict) == "fused layers" and verdict.checked and not verdict.without_gradient


@pytest.mark.parametrize(
    ("model_type", "line"), [("roberta", "later tokens change earlier losses"), ("gpt2", "plain linear layer")]
)
def test_a_model_that_cannot_be_trained_is_refused_in_one_line(model_type, line):
    found = judge(model_type)
    assert isinstance(found, InputError)
    assert found.field == "model.path" and line in str(found) and "\n" not in str(found)


def test_layers_that_text_never_reaches_get_no_adapter():
    verdict = judge("whisper")
    assert isinstance(verdict, ModelVerdict)
    assert not verdict.adapts("model.decoder.layers.3.encoder_attn.q_proj")
    assert verdict.adapts("model.decoder.layers.3.self_attn.q_proj")


def test_layers_whose_weight_the_model_reads_itself_stay_as_they_are():
    verdict = judge("mamba")
    assert isinstance(verdict, ModelVerdict)
    assert verdict.read_directly == ("backbone.layers.*.mixer.dt_proj",)
    assert not verdict.adapts("backbone.layers.0.mixer.dt_proj") and verdict.adapts("backbone.layers.0.mixer.in_proj")


def test_wrong_fused_layers_give_way_to_the_model_s_own(monkeypatch):
    right = guard.fuse_layers

    def wrongly_scaled(half):
        return replace(half, options=replace(half.options, scaling=0.1))

    def wrong(model):
        report = right(model)
        for layer in model.model.layers:
            layer.spec = replace(layer.spec, attention=wrongly_scaled(layer.spec.attention))
        return report

    monkeypatch.setattr(guard, "fuse_layers", wrong)
    verdict = judge("llama")
    assert kind(verdict) == PACKED and "a loss differs" in verdict.faults[0]
    with pytest.raises(InputError, match="a loss differs"):
        raise judge("llama", layers="strict")


def test_wrong_attention_gives_way_to_the_library_s(monkeypatch):
    right = attention.attend
    monkeypatch.setattr(attention, "attend", lambda q, k, v, documents, options: right(q, k, 1.1 * v, documents, options))
    assert kind(judge("apertus")) == "its own layers; the model's own attention (sdpa), one sample a row"


def test_a_wrong_gradient_is_found_though_the_losses_are_right(monkeypatch):
    from engine.quant.frozen_linear import _FrozenMatmul

    right = _FrozenMatmul.backward
    monkeypatch.setattr(_FrozenMatmul, "backward", staticmethod(lambda ctx, grad: (1.1 * right(ctx, grad)[0], None)))
    assert "gradient" in str(judge("apertus"))


def test_a_loaded_model_whose_losses_differ_is_refused_and_a_leak_means_one_sample_a_row(base, monkeypatch):
    samples = random_samples(base.model.config.vocab_size)
    theirs = [our_losses(base, [sample])[0] for sample in samples]
    assert check_loaded(base, samples, theirs).route.shares_rows
    with pytest.raises(InputError, match=r"model\.path.*differ"):
        check_loaded(base, samples, [theirs[0] + 0.05, theirs[1]])

    def leaking(given, some):
        return [losses + 0.05 * (len(some) > 1) for losses in our_losses(given, some)]

    monkeypatch.setattr(guard, "our_losses", leaking)
    assert not check_loaded(base, samples, theirs).route.shares_rows


def test_losses_of_a_loaded_model_are_those_of_transformers(base, tiny_config):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_config["model"]["path"], attn_implementation="eager")
    for name in base.linear_names:
        model.get_submodule(name).weight.data = base.model.get_submodule(name).dequantized(torch.float32)
    samples = random_samples(model.config.vocab_size)
    with torch.no_grad():
        theirs = [library_losses(model, sample) for sample in samples]
    for ours, their in zip(our_losses(base, samples), theirs):
        np.testing.assert_allclose(ours.numpy(), their.numpy(), atol=1e-4)
    assert not np.allclose(our_losses(copy.copy(base), samples[::-1])[0], theirs[0][: len(theirs[1])], atol=1e-2)


def test_the_library_leaves_packed_weights_as_they_are_on_cpus_where_it_would_repack_them(monkeypatch):
    from bitsandbytes.nn import modules

    class Model(torch.nn.Module):
        config = SimpleNamespace(_attn_implementation="sdpa")
        set_attn_implementation = staticmethod(lambda name: None)

        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(32, 64)
            self.head = library_linear(torch.randn(32, 64), torch.float32)

        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=self.head(self.embedding(input_ids)))

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    model = Model().requires_grad_(False).eval()
    assert model.head.support_avx512bf16_for_cpu  # else bitsandbytes decides it in another way now
    stored = model.head.weight.data.clone()
    guard.loaded_losses(model, random_samples(32))
    assert torch.equal(model.head.weight.data, stored)
    FrozenLinear(model.head).dequantized(torch.float32)


def test_a_caller_without_gradients_gets_the_same_verdict(tiny_model_dir):
    given = ModelConfig(path=str(tiny_model_dir))
    verdicts._verdict.cache_clear()
    with torch.no_grad():
        assert verdicts.verdict_of(given).route == Route()
