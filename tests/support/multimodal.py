"""Make tiny folders of models that read images or sound too, as their publishers write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engine.model import skeleton
from engine.model.pretrained import model_factory
from tests.support.tiny_models import byte_tokenizer

PROPORTIONAL = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
}
MROPE = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}
TEXT: dict[str, dict[str, Any]] = {
    "gemma4": {"num_hidden_layers": 12, "num_kv_shared_layers": 6, "rope_parameters": PROPORTIONAL},
    "qwen2_5_vl": {"rope_parameters": MROPE},
}
"""What released checkpoints have in their text_config, and the defaults of the class lack."""
TOWERS = {"gemma4": ("vision_config", "audio_config")}
KINDS = ("gemma3", "gemma4", "mistral3", "qwen2_5_vl", "qwen3_5", "qwen3_vl")


def multimodal_config(kind: str) -> Any:
    """Return a config with the defaults of its class and the numbers of released checkpoints."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

    given: dict[str, Any] = {"text_config": TEXT[kind]} if kind in TEXT else {}
    for tower in TOWERS.get(kind, ()):
        given[tower] = {}
    config = CONFIG_MAPPING[kind](**given)
    config.architectures = [CLASSES[kind]]
    return config


def save_multimodal(folder: Path, kind: str) -> Path:
    """Save a tiny model with loud random weights and a byte-level tokenizer."""
    small = skeleton.shrink(multimodal_config(kind))
    tokenizer = byte_tokenizer()
    text = small.get_text_config()
    for name in ("vocab_size", "vocab_size_per_layer_input"):
        if getattr(text, name, None):
            setattr(text, name, len(tokenizer))
    for config in (small, text):
        for name in [name for name in vars(config) if name.endswith("token_id")]:
            setattr(config, name, len(tokenizer) - 1)
    torch.manual_seed(0)
    model = model_factory(small).from_config(small).float()
    skeleton.make_loud(model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
