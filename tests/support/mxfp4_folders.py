"""Make a gpt-oss with MXFP4 experts, as it is released, and its copy in 16 bits."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny_models import byte_tokenizer

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}  # fmt: skip


def save_mxfp4_pair(folder: Path) -> tuple[Path, Path]:
    """Return a folder with MXFP4 experts, and one with the same values in 16 bits."""
    from transformers import GptOssConfig, GptOssForCausalLM
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tokenizer, generator = byte_tokenizer(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**SIZES, vocab_size=len(tokenizer))).to(torch.bfloat16)
    packed, plain, stored = folder / "mxfp4", folder / "plain", {}
    for name, parameter in model.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, width, height = parameter.shape
            blocks = torch.randint(256, (experts, height, width // 32, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(119, 123, blocks.shape[:3], dtype=torch.uint8, generator=generator)
            parameter.data = convert_moe_packed_tensors(blocks, scales)
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    for one in (packed, plain):
        model.save_pretrained(one)
        tokenizer.save_pretrained(one)
    others = {name: t for name, t in load_file(packed / "model.safetensors").items() if f"{name}_blocks" not in stored}
    save_file(others | stored, packed / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((packed / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (packed / "config.json").write_text(json.dumps(content))
    return packed, plain
