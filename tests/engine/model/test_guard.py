"""The guard: a model is trained only if its losses and gradients are the library's own."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.bench.shapes import random_config
from engine.config.trial import ModelConfig
from engine.errors import InputError
from engine.layers import attention
from engine.model import guard, load, loaded_check, verdicts
from engine.model.base import Base
from engine.model.comparison import library_losses, mean_difference, our_losses, random_samples
from engine.model.loaded_check import LibraryLosses, check_loaded, loaded_losses
from engine.model.route import ModelVerdict, Route
from engine.model.skeleton import make_loud
from engine.quant.bnb import library_linear
from engine.quant.frozen_linear import FrozenLinear, freeze_linears
from tests.support.model_families import LFM2_LAYERS, judge, kind
from tests.support.trials import CPU

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
        ("qwen3_moe", "fused layers"),
        ("qwen3_5_text", "fused layers"),
        ("lfm2", SINGLE),
        ("granitemoehybrid", SINGLE),
        ("hyperclovax", "fused layers"),
        ("falcon_h1", "its own layers; the model's own logits, one sample a row"),
        ("gpt_oss", "fused layers"),
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


def test_what_depends_on_the_place_in_a_long_row_means_one_sample_a_row():
    from transformers import AutoModelForCausalLM, Llama4TextConfig

    assert kind(judge("gpt_neo")) == SINGLE  # its mask is as large as its positions, and a row may be longer
    given = ModelConfig(path="llama4")
    layers = {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4, "no_rope_layers": [0] * 4}
    config = Llama4TextConfig(**layers, attn_temperature_tuning=True)
    make = lambda small, name: AutoModelForCausalLM.from_config(small, attn_implementation=name)  # noqa: E731
    assert config.floor_scale > 1000 and not guard.choose_route(config, given, make).route.shares_rows
    config.attn_temperature_tuning = False  # twin: queries that do not grow with their place
    assert guard.choose_route(config, given, make).route.shares_rows


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


def test_layers_whose_weight_the_model_reads_and_calls_stay_as_they_are():
    verdict = judge("gemma3n_text")
    assert kind(verdict) == PACKED and verdict.adapts("model.layers.0.self_attn.q_proj")
    assert "model.layers.*.altup.prediction_coefs" in verdict.read_directly


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
    monkeypatch.setattr(attention, "attend", lambda q, k, v, *rest: right(q, k, 1.1 * v, *rest))
    assert kind(judge("apertus")) == "its own layers; the model's own attention (sdpa), one sample a row"


def test_a_wrong_gradient_is_found_though_the_losses_are_right(monkeypatch):
    from engine.quant.frozen_linear import _FrozenMatmul

    right = _FrozenMatmul.backward
    monkeypatch.setattr(_FrozenMatmul, "backward", staticmethod(lambda ctx, grad: (1.1 * right(ctx, grad)[0], None)))
    assert "gradient" in str(judge("apertus"))


def test_a_loaded_model_whose_losses_differ_is_refused_and_a_leak_means_one_sample_a_row(base, monkeypatch):
    samples = random_samples(base.model.config.vocab_size)
    theirs = LibraryLosses(samples, [our_losses(base, [sample])[0] for sample in samples])
    assert check_loaded(base, theirs).route.shares_rows
    apart_by = replace(theirs, losses=[theirs.losses[0] + 0.05, theirs.losses[1]])
    with pytest.raises(InputError, match=r"model\.path.*differ"):
        check_loaded(base, apart_by)
    assert check_loaded(base, replace(apart_by, rounding=0.01)).route.shares_rows  # twin: the library rounds as much

    def leaking(given, some):
        return [losses + 0.05 * (len(some) > 1) for losses in our_losses(given, some)]

    monkeypatch.setattr(loaded_check, "our_losses", leaking)
    assert not check_loaded(base, theirs).route.shares_rows


@pytest.mark.parametrize(("hidden", "layers"), [(64, 12), (256, 4)])
def test_rounding_takes_our_losses_from_the_library_s_as_far_as_its_own_attentions_are_apart(hidden, layers):
    from transformers import AutoModelForCausalLM, Qwen3Config

    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers, "head_dim": 16}
    config = Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, vocab_size=500)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    make_loud(model)
    model.to(torch.bfloat16).requires_grad_(False)
    samples = random_samples(500)
    theirs = loaded_losses(model, samples)
    attention.register()
    model.set_attn_implementation("packed")
    names = freeze_linears(model, skip=[model.get_output_embeddings()])
    swaps = guard.fuse_layers(model)
    base = Base(model, None, ModelConfig(path="x"), CPU, torch.bfloat16, names, swaps)
    gap = mean_difference(our_losses(base, samples), theirs.losses)
    assert 0.5 < gap / theirs.rounding < 2.0 and check_loaded(base, theirs) is base
    for layer in model.model.layers:  # twin: every query sees 12 keys
        half = layer.spec.attention
        layer.spec = replace(layer.spec, attention=replace(half, options=replace(half.options, sliding_window=12)))
    with pytest.raises(InputError, match="its losses differ"):
        check_loaded(base, theirs)


def test_a_model_that_has_passed_is_not_checked_again_until_its_files_change(tiny_config, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_config["model"]["path"], tmp_path / "model")
    monkeypatch.setenv("QLORA_SWEEP_CACHE", str(tmp_path / "cache"))
    checked = []
    right = load.loaded_losses
    monkeypatch.setattr(load, "loaded_losses", lambda *given: checked.append(1) or right(*given))
    given = ModelConfig(path=str(folder))
    routes = [load.load_base(given, CPU).route for _ in range(3)]
    assert len(checked) == 2 and len(set(routes)) == 1  # as quantised here, and as read from the shared copy
    (folder / "model.safetensors").touch()
    load.load_base(given, CPU)
    assert len(checked) == 3


def test_a_verdict_is_kept_on_this_machine_and_a_refusal_is_not(tmp_path, monkeypatch, tiny_model_dir):
    monkeypatch.setenv("QLORA_SWEEP_CACHE", str(tmp_path / "cache"))
    found = []
    right = verdicts.choose_route
    monkeypatch.setattr(verdicts, "choose_route", lambda *given: found.append(1) or right(*given))
    given = ModelConfig(path=str(tiny_model_dir))
    kept = []
    for _ in range(2):
        verdicts._verdict.cache_clear()  # as in another process
        kept.append(verdicts.verdict_of(given))
    assert len(found) == 1 and kept[0] == kept[1]
    verdicts._verdict.cache_clear()
    verdicts.verdict_of(given.model_copy(update={"quantization": "none"}))
    assert len(found) == 2
    monkeypatch.setenv("QLORA_SWEEP_CACHE", "/proc/no-such-place")
    verdicts._verdict.cache_clear()
    assert verdicts.verdict_of(given) == kept[0] and len(found) == 3


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
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(_attn_implementation="sdpa"))
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
    loaded_losses(model, random_samples(32))
    assert torch.equal(model.head.weight.data, stored)
    FrozenLinear(model.head).dequantized(torch.float32)


def test_a_caller_without_gradients_gets_the_same_verdict(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_SWEEP_CACHE", str(tmp_path / "cache"))
    given = ModelConfig(path=str(tiny_model_dir))
    verdicts._verdict.cache_clear()
    with torch.no_grad():
        assert verdicts.verdict_of(given).route == Route()


def apart(hidden_states, weight, bias=None, activation=None, seq_idx=None, **_):
    """Convolve each sample on its own, as the kernels of causal-conv1d do."""
    from transformers.activations import ACT2FN

    cuts = torch.bincount(seq_idx[0]).tolist() if seq_idx is not None else [hidden_states.shape[-1]]
    padded = [torch.nn.functional.pad(part, (weight.shape[-1] - 1, 0)) for part in hidden_states.split(cuts, dim=-1)]
    out = torch.cat([torch.nn.functional.conv1d(p, weight.unsqueeze(1), bias, groups=len(weight)) for p in padded], dim=-1)
    return ACT2FN[activation](out) if activation else out


def test_layers_that_can_be_told_where_samples_begin_share_rows_if_that_keeps_the_losses(monkeypatch):
    from transformers.models.lfm2 import modeling_lfm2

    faults = judge("lfm2").faults
    assert "a shared row changes a loss" in faults[0] and "can't keep packed sequences apart" in faults[1]
    monkeypatch.setattr(modeling_lfm2, "causal_conv1d_fn", apart)
    verdict = judge("lfm2")
    assert verdict.route == Route(fused=False, boundaries=True)
    # twin: kernels that take the boundaries and ignore them
    monkeypatch.setattr(modeling_lfm2, "causal_conv1d_fn", lambda *args, seq_idx=None, **more: apart(*args, **more))
    verdict = judge("lfm2")
    assert kind(verdict) == SINGLE and "told where samples begin: a shared row changes a loss" in verdict.faults[1]


def test_a_leak_too_small_for_the_losses_is_found_in_the_gradients(monkeypatch):
    right = attention.attend
    leak = lambda v: 1e-4 * v.cumsum(0).mean(1, keepdim=True)  # noqa: E731
    monkeypatch.setattr(attention, "attend", lambda q, k, v, *rest: right(q, k, v, *rest) + leak(v) - leak(v).detach())
    verdict = judge("apertus")
    assert not verdict.route.shares_rows and "a loss has a gradient in the sample before it" in str(verdict.faults)


def test_a_card_whose_kernels_keep_samples_apart_shares_rows(monkeypatch, tmp_path):
    from transformers import Lfm2Config
    from transformers.models.lfm2 import modeling_lfm2

    Lfm2Config(layer_types=LFM2_LAYERS).save_pretrained(tmp_path)
    given = ModelConfig(path=str(tmp_path))
    alone = verdicts.verdict_of(given)
    monkeypatch.setattr(modeling_lfm2, "causal_conv1d_fn", apart)
    assert verdicts.with_rows_of(given, alone, CPU) == alone  # twin: no package with such kernels is installed
    monkeypatch.setattr(verdicts, "_version", lambda name: "1.0")
    shared = verdicts.with_rows_of(given, alone, CPU)
    assert not alone.route.shares_rows and shared.route == replace(alone.route, shares_rows=True, boundaries=True)


def test_a_model_that_cannot_be_tried_is_refused_unless_its_own_layers_are_asked_for():
    line = r"model\.path = 'qwen4_exp_text': cannot be tried on a tiny model.*model\.layers=original"
    with pytest.raises(InputError, match=line):
        raise judge("qwen4_exp_text")
    verdict = judge("qwen4_exp_text", layers="original")
    assert not verdict.checked and verdict.route == guard.UNTRIED


def test_layers_dead_in_some_places_get_no_adapter_there_only():
    alike = {0: [0, 1, 2], 1: [3, 4]}
    names = [f"model.layers.{i}.mlp.{p}" for i in (0, 1) for p in ("up_proj", "down_proj")]
    dead = guard._kinds_of_dead(names, {"model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"}, alike)
    assert dead == tuple(f"model.layers.{i}.mlp.{p}" for i in (3, 4) for p in ("down_proj", "up_proj"))
    verdict = ModelVerdict(Route(), dead)
    assert verdict.adapts("model.layers.2.mlp.up_proj") and not verdict.adapts("model.layers.4.mlp.up_proj")
    assert guard._kinds_of_dead(names, set(), alike) == ("model.layers.*.mlp.down_proj", "model.layers.*.mlp.up_proj")
