"""Train models whose layers or classes have other names, and have PEFT load what was trained."""

from __future__ import annotations

import json

import pytest
import torch

from engine.data.packing import collate
from engine.data.views import load_data
from engine.model.inspect import inspect_model
from engine.model.pretrained import model_factory
from tests.support.tiny_models import byte_tokenizer
from tests.support.trials import CPU, build, run

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 16, "max_position_embeddings": 512}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
        "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 128}  # fmt: skip
MERGED = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}


def save_model(folder, model_type):
    """Save a random model with a tokenizer of bytes; Mistral 3 is one with a part for images."""
    from transformers import CONFIG_MAPPING

    tokenizer = byte_tokenizer()
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    if model_type == "mistral3":
        eyes = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
                "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
        text = {"model_type": "ministral3", **SIZES, **tokens, "rope_parameters": YARN}
        config = CONFIG_MAPPING["mistral3"](text_config=text, vision_config=eyes)
    else:
        config = CONFIG_MAPPING["phi3"](**SIZES, **tokens, rope_parameters=MERGED)
    torch.manual_seed(0)
    model_factory(config).from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("phi3", "model.layers.1.self_attn.qkv_proj"), ("mistral3", "model.language_model.layers.1.self_attn.q_proj")],
)
def test_peft_loads_the_adapter_under_the_model_s_own_names_and_gives_its_loss(model_type, name, tiny_config, tmp_path):
    from peft import PeftModel
    from transformers import AutoConfig

    save_model(tmp_path / "model", model_type)
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
