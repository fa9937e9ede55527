"""Train models whose layers or classes have other names, and have PEFT load what was trained."""

from __future__ import annotations

import json

import pytest
import torch

from engine.data.packing import collate
from engine.data.views import load_data
from engine.model.inspect import inspect_model
from engine.model.pretrained import model_factory
from tests.support.odd_families import save_odd_family
from tests.support.tiny_models import byte_tokenizer
from tests.support.trials import CPU, build, run


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("phi3", "model.layers.1.self_attn.qkv_proj"), ("mistral3", "model.language_model.layers.1.self_attn.q_proj")],
)
def test_peft_loads_the_adapter_under_the_model_s_own_names_and_gives_its_loss(model_type, name, tiny_config, tmp_path):
    from peft import PeftModel
    from transformers import AutoConfig

    save_odd_family(tmp_path / "model", model_type)
    config = build(tiny_config, model={"path": str(tmp_path / "model"), "quantization": "none"})
    assert inspect_model(config.model).describe() == "2 of 2 decoder layers run fused"
    reports = run(config, tmp_path / "trial")
    assert reports[-1].eval_loss < reports[0].eval_loss - 1e-3
    saved = json.loads((tmp_path / "trial" / "adapter" / "adapter_config.json").read_text())
    assert any(name == target or name.endswith(f".{target}") for target in saved["target_modules"])

    kind = AutoConfig.from_pretrained(tmp_path / "model")
    base = model_factory(kind).from_pretrained(tmp_path / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "trial" / "adapter").eval()
    assert hasattr(model.base_model.model.get_submodule(name), "lora_A")
    _, view = load_data(config.data, byte_tokenizer())
    total = number = 0
    for i in range(len(view)):
        batch = collate([view[i]]).to(CPU)
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids_T[None]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, batch.labels_T, reduction="sum").item()
        number += batch.num_targets
    assert total / number == pytest.approx(reports[-1].eval_loss, abs=1e-4)
