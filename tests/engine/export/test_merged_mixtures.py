"""A merged mixture, loaded by transformers alone, has the losses of base and adapter as we measured them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from engine.adapter.lora import attach
from engine.adapter.peft_files import export_adapter
from engine.adapter.portable import read_adapter
from engine.config.trial import DataConfig, LoopConfig, LoraConfig, ModelConfig, TrainConfig
from engine.export import merge
from engine.model.load import load_base
from tests.support.fp8_folders import BLOCKS, save_pair
from tests.support.merged import merged_difference, save_base
from tests.support.mxfp4_folders import save_mxfp4_pair
from tests.support.tiny_models import byte_tokenizer
from tests.support.trials import CPU


def lora(*targets, **more):
    return LoraConfig(rank=4, lora_alpha=8, lora_dropout=0.0, target_modules=list(targets), **more)


EVERYTHING = lora("all-linear", "experts")
RANKS = lora("attention", "experts", rank_pattern={".*experts.*": 2, ".*q_proj": 3}, use_rslora=True)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("qwen3_moe", [lora("attention"), EVERYTHING]),
        ("gpt_oss", [lora("experts"), RANKS]),
        ("mixtral", [EVERYTHING, RANKS]),
        ("olmoe", [EVERYTHING, lora("experts.down_proj")]),
    ],
)
def test_its_losses_are_those_of_base_and_adapter(model_type, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "merged_dtype", lambda files: (torch.float32, False))  # else rounding is all that shows
    base = save_base(model_type, tmp_path)
    for number, given in enumerate(settings):
        (tmp_path / str(number)).mkdir()
        merged, learned = merged_difference(base, given, tmp_path / str(number))
        assert merged < 3e-5
        assert learned > 1.0  # twin


def fp8_mixture(folder):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 144, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 40,
             "moe_intermediate_size": 136, "num_experts": 4, "num_experts_per_tok": 2,
             "vocab_size": len(byte_tokenizer())}  # fmt: skip
    torch.manual_seed(0)
    return save_pair(Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)), folder, BLOCKS, "block")


@pytest.mark.parametrize("saved", [fp8_mixture, save_mxfp4_pair])
def test_packed_weights_are_merged_into_what_they_stand_for(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "FILE_BYTES", 1 << 18)  # several files
    packed, plain = saved(tmp_path)
    given = ModelConfig(path=str(packed), dtype="float32")
    base = load_base(given, CPU)
    layers = attach(base.model, base.linear_names, EVERYTHING, seed=0)
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_b, std=0.2)
    config = TrainConfig(model=given, data=DataConfig(train="none"), lora=EVERYTHING, train=LoopConfig(max_tokens=100))
    export_adapter(tmp_path / "adapter", config, layers, base.model, base.tokenizer)
    adapter, states = read_adapter(tmp_path / "adapter"), []
    for place, folder in (("of-packed", packed), ("of-plain", plain)):
        (tmp_path / place).mkdir()
        merge.write_merged(adapter, merge.base_folder(adapter, str(folder)), tmp_path / place, ModelConfig(path=str(folder)))
        files = sorted((tmp_path / place).glob("*.safetensors"))
        states.append({name: tensor for file in files for name, tensor in load_file(file).items()})
    assert len(list((tmp_path / "of-packed").glob("*.safetensors"))) > 1
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    content = json.loads((tmp_path / "of-packed" / "config.json").read_text())
    assert content["dtype"] == "bfloat16" and "quantization_config" not in content
    index = json.loads((tmp_path / "of-packed" / merge.INDEX).read_text())["weight_map"]
    assert index.keys() == states[0].keys()
