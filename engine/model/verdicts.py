"""Find a model's verdict from its config, once for each process."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from engine.config.trial import ModelConfig
from engine.model.guard import choose_route
from engine.model.pretrained import from_pretrained, model_factory
from engine.model.route import ModelVerdict
from engine.sources.locate import locate


def verdict_of(config: ModelConfig) -> ModelVerdict:
    """Return how to compute the model. It reads config.json only. Raises InputError."""
    from transformers import AutoConfig

    found = from_pretrained(AutoConfig, config, locate(config))
    return _verdict(config, found.to_json_string(use_diff=False))


@functools.lru_cache(maxsize=32)
def _verdict(config: ModelConfig, content: str) -> ModelVerdict:
    from transformers import AutoConfig

    def make(small: Any, attention_name: str) -> nn.Module:
        options = {"trust_remote_code": config.trust_remote_code, "attn_implementation": attention_name}
        return model_factory(small).from_config(small, **options)

    found = from_pretrained(AutoConfig, config, locate(config))
    if hasattr(found, "quantization_config"):
        del found.quantization_config
    return choose_route(found, config, make)
