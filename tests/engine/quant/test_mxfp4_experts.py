"""A gpt-oss in MXFP4, as it is released, is trained like its 16-bit copy."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config.trial import ModelConfig
from engine.errors import InputError
from engine.export.merge import base_folder
from engine.model.comparison import difference, our_losses, random_samples
from engine.model.inspect import inspect_model
from engine.model.load import load_base
from engine.quant.frozen_experts import frozen_experts
from tests.support.tiny_models import byte_tokenizer
from tests.support.trials import CPU

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a folder with MXFP4 experts, and one with the same values in 16 bits."""
    from transformers import GptOssConfig, GptOssForCausalLM
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tokenizer, generator = byte_tokenizer(), torch.Generator().manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**SIZES, vocab_size=len(tokenizer))).to(torch.bfloat16)
    packed, plain = (tmp_path_factory.mktemp(name) for name in ("mxfp4", "plain"))
    stored = {}
    for name, parameter in model.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, width, height = parameter.shape
            blocks = torch.randint(256, (experts, height, width // 32, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(119, 123, blocks.shape[:3], dtype=torch.uint8, generator=generator)
            parameter.data = convert_moe_packed_tensors(blocks, scales)
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    for folder in (packed, plain):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    others = {name: t for name, t in load_file(packed / "model.safetensors").items() if f"{name}_blocks" not in stored}
    save_file(others | stored, packed / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((packed / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (packed / "config.json").write_text(json.dumps(content))
    return packed, plain


def test_its_experts_and_losses_are_those_of_the_16_bit_copy(folders):
    given = [ModelConfig(path=str(folder), dtype="float32") for folder in folders]
    assert inspect_model(given[0]).features == inspect_model(given[1]).features
    bases = [load_base(one, CPU) for one in (*given, given[0])]  # the last from the shared cache
    experts = [dict(frozen_experts(base.model)) for base in bases]
    for name, module in experts[1].items():
        for weight in module.shapes:
            assert all(torch.equal(getattr(other[name], weight), getattr(module, weight)) for other in experts)
    samples = random_samples(200)
    losses = [our_losses(base, samples) for base in bases]
    assert difference(losses[0], losses[1]) < 1e-5 and difference(losses[0], losses[2]) < 1e-5


def test_where_it_cannot_be_used_one_line_says_so(folders):
    with pytest.raises(InputError, match=r"model.quantization = 'none': .* are MXFP4; allowed here: nf4"):
        inspect_model(ModelConfig(path=str(folders[0]), quantization="none"))
    with pytest.raises(InputError, match="holds MXFP4 weights; allowed: a 16-bit copy, or --to peft"):
        base_folder(None, str(folders[0]))
