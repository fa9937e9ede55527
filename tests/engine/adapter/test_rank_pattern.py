"""Layers of other ranks train, resume, are exported for PEFT and predicted as they are."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from engine.adapter.lora import attach, detach
from engine.adapter.portable import read_adapter
from engine.config.parsing import parse, to_json
from engine.config.targets import layer_ranks
from engine.config.trial import LoraConfig, TrainConfig
from engine.data.packing import collate
from engine.data.views import load_data
from engine.errors import InputError
from engine.prepare import prepare
from engine.shape.layer_plan import num_trained, plan_layers
from tests.support.trials import build, run

PATTERN = {"gate_proj": 2, "down_proj": 8, r"layers\.0\.self_attn\.[qv]_proj": 6}


@pytest.fixture
def trained(tiny_config, tmp_path, base):
    config = build(tiny_config, lora={"rank": 4, "rank_pattern": PATTERN, "use_rslora": True, "lora_alpha": 6.0})
    return config, run(config, tmp_path, base), tmp_path / "adapter"


def test_every_layer_has_its_rank_and_the_scaling_of_all(tiny_config, base):
    config = build(tiny_config, lora={"rank": 4, "rank_pattern": PATTERN})
    layers = attach(base.model, base.linear_names, config.lora, 0)
    ranks = {name: layer.lora_b.shape[1] for name, layer in layers.items()}
    detach(base.model, layers)
    assert {layer.scaling for layer in layers.values()} == {2.0}
    assert {name: rank for name, rank in ranks.items() if rank != 4} == {
        "model.layers.0.self_attn.q_proj": 6, "model.layers.0.self_attn.v_proj": 6, "model.layers.0.mlp.gate_proj": 2,
        "model.layers.1.mlp.gate_proj": 2, "model.layers.0.mlp.down_proj": 8, "model.layers.1.mlp.down_proj": 8,
    }  # fmt: skip
    assert ranks == {name: layer.lora_a.shape[0] for name, layer in layers.items()}


def test_fused_layers_have_the_gradients_of_unfused_ones(tiny_config):
    from engine.model.load import load_base
    from tests.support.trials import CPU

    gradients = []
    for option in ("auto", "original"):
        config = build(tiny_config, lora={"rank": 4, "rank_pattern": PATTERN}, model={"layers": option})
        base = load_base(config.model, CPU)
        layers = attach(base.model, base.linear_names, config.lora, 0)
        for i, layer in enumerate(layers.values()):
            torch.nn.init.normal_(layer.lora_b, std=0.1, generator=torch.Generator().manual_seed(i))
        view, _ = load_data(config.data, base.tokenizer)
        base.model.train()
        base.loss(collate([view[0], view[1]]).to(base.device)).backward()
        gradients.append({name: (layer.lora_a.grad, layer.lora_b.grad) for name, layer in layers.items()})
        detach(base.model, layers)
    for name, pair in gradients[0].items():
        for ours, theirs in zip(pair, gradients[1][name]):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_peft_loads_what_was_trained_and_so_does_every_loader_of_plain_lora(trained, base):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from engine.model.load import nf4_load_config

    config, reports, folder = trained
    values = json.loads((folder / "adapter_config.json").read_text())
    assert values["r"] == 8 and set(values["rank_pattern"].values()) == {2, 4, 6}
    model = AutoModelForCausalLM.from_pretrained(
        config.model.path, quantization_config=nf4_load_config(True, torch.float32), device_map={"": "cpu"}, dtype=torch.float32
    )
    model = PeftModel.from_pretrained(model, str(folder)).eval()
    _, view = load_data(config.data, base.tokenizer)
    total = num = 0.0
    for i in range(len(view)):
        row = collate([view[i]])
        with torch.no_grad():
            logits = model(input_ids=row.input_ids_T[None], use_cache=False).logits[0].float()
        total += torch.nn.functional.cross_entropy(logits, row.labels_T, reduction="sum", ignore_index=-100).item()
        num += row.num_targets
    best = min(report.eval_loss for report in reports)
    assert best < reports[0].eval_loss and total / num == pytest.approx(best, abs=2e-4)
    plain = read_adapter(folder)
    assert plain.rank == 8 and plain.lora_alpha / 8 != pytest.approx(config.lora.scaling)
    a, b = plain.layers["model.layers.0.mlp.gate_proj"]
    assert not a[2:].any() and not b[:, 2:].any()


def test_a_plan_counts_the_parameters_that_are_trained(tiny_config, trained):
    from engine.model.inspect import known_shape

    config, reports, _ = trained
    assert prepare([config]).num_trainable == [reports[-1].num_trainable]
    settled = {"micro_batch_size": 1, "keep_layers": 0, "host_layers": 0, "weight_cache_gib": 0.0}
    fixed = config.model_copy(update={"train": config.train.model_copy(update=settled)})
    shape = known_shape(config.model)
    assert num_trained(fixed, shape, plan_layers(fixed, shape)) == reports[-1].num_trainable


@pytest.mark.parametrize(
    ("field", "least"), [("rank_pattern", "greater than or equal to 1"), ("alpha_pattern", "greater than or equal to")]
)
@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        ({"qproj": 2}, r" = 'qproj': matches no layer that lora.target_modules picks; allowed: .*q_proj"),
        ({"q_proj": 2, "self_attn.q_proj": 3}, r" = .*: must give model\.layers\.0\.self_attn\.q_proj one"),
        ({"(": 2}, r" = '\(': must be a valid regular expression"),
        ({"q_proj": 0}, r".* = 0: .*{least}"),
    ],
)
def test_a_pattern_that_cannot_be_right_is_one_line_before_a_trial(tiny_config, field, least, pattern, line):
    with pytest.raises(InputError, match=rf"lora\.{field}" + line.replace("{least}", least)):
        prepare([build(tiny_config, lora={field: pattern})])


def test_the_order_of_entries_does_not_matter_and_older_fingerprints_stay(tiny_config):
    config = build(tiny_config, lora={"rank_pattern": {"up_proj": 2, "down_proj": 8}})
    again = parse(TrainConfig, json.loads(to_json(config)))
    assert again.fingerprint() == config.fingerprint() != build(tiny_config).fingerprint()
    names = ["a.up_proj", "a.down_proj", "a.q_proj"]
    assert layer_ranks(again.lora, names) == layer_ranks(config.lora, names) == {"a.up_proj": 2, "a.down_proj": 8, "a.q_proj": 4}
    assert layer_ranks(LoraConfig(), names) == dict.fromkeys(names, 16)
    values = copy.deepcopy(tiny_config)
    values["lora"]["rank_pattern"] = {}
    assert parse(TrainConfig, values).fingerprint() == parse(TrainConfig, tiny_config).fingerprint()
