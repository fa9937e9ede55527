"""Adapters on experts that PEFT wrote are read, and merged into the weights that PEFT merges them into."""

from __future__ import annotations

import copy

import pytest
import torch

from engine.adapter.portable import read_adapter
from engine.config.trial import ModelConfig
from engine.export.merge import write_merged
from engine.model.pretrained import model_factory
from engine.model.skeleton import make_loud, shrink
from tests.support.model_families import config_of


def peft_adapter(model_type, folder, **options):
    """Save a small model and an adapter that PEFT made; return the weights before, and as PEFT merges them."""
    from peft import LoraConfig, get_peft_model

    config = shrink(config_of(model_type))
    torch.manual_seed(0)
    model = model_factory(config).from_config(config, attn_implementation="eager").eval()
    make_loud(model)
    model.save_pretrained(folder / "base")
    given = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**given))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
        adapted.base_model.model.config._name_or_path = str(folder / "base")
        adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
        adapted.save_pretrained(folder / "adapter")
        return model.state_dict(), adapted.merge_and_unload().state_dict()


BOTH = ["experts.gate_up_proj", "experts.down_proj"]
PATTERN = {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"experts.down_proj": 5}, "use_rslora": True}


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("qwen3_moe", {"target_parameters": BOTH}),
        ("gpt_oss", {"target_parameters": BOTH}),
        ("mixtral", {"target_parameters": BOTH[:1], "target_modules": []}),
        ("qwen3_moe", {"target_parameters": BOTH, **PATTERN}),
    ],
)
def test_a_merged_mixture_has_the_weights_of_peft_rounded_once(model_type, options, tmp_path):
    before, wanted = peft_adapter(model_type, tmp_path, **options)
    adapter = read_adapter(tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    write_merged(adapter, tmp_path / "base", tmp_path / "merged", ModelConfig(path=str(tmp_path / "base")))
    factory = model_factory(shrink(config_of(model_type)))
    merged = factory.from_pretrained(tmp_path / "merged", dtype=torch.float32, attn_implementation="eager").state_dict()
    changed = [name for name in wanted if not torch.equal(before[name], wanted[name])]
    assert {name.rpartition(".")[2] for name in changed} >= {name.rpartition(".")[2] for name in options["target_parameters"]}
    for name in wanted:
        assert (merged[name] - wanted[name]).abs().max() <= 2**-8 * wanted[name].abs().max()
        if name in changed:  # twin: rounding is small next to what the adapter changes
            assert (before[name] - wanted[name]).abs().max() > 2**-6 * wanted[name].abs().max()
