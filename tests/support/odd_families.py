"""Save tiny models whose layers or classes have other names: Phi-3 merges projections, Mistral 3 has a part for images."""

from __future__ import annotations

import torch

from engine.model.pretrained import model_factory
from tests.support.tiny_models import byte_tokenizer

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 16, "max_position_embeddings": 512}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
        "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 128}  # fmt: skip
MERGED = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}


def save_odd_family(folder, model_type):
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
