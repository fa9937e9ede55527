"""What a model folder says without its weights: config, tokenizer, linear layers, and which layers can run fused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.config.trial import ModelConfig
from engine.errors import InputError, first_line
from engine.layers.swap import SwapReport, require_fused, survey
from engine.sources.locate import locate
from engine.sources.weight_files import check_weights

NO_LINEAR = "has no linear layer that an adapter could sit on"


def model_config(config: ModelConfig) -> dict[str, Any]:
    """The model's config.json as transformers reads it, as plain data; no weights are needed."""
    from transformers import AutoConfig

    return from_pretrained(AutoConfig, config, locate(config)).to_dict()


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's own tokenizer."""
    from transformers import AutoTokenizer

    return from_pretrained(AutoTokenizer, config, locate(config))


@dataclass(frozen=True)
class ModelFacts:
    """What a model folder says without its weights. features: (out, in) of each layer an adapter may sit on, by name."""

    features: dict[str, tuple[int, int]]
    swaps: SwapReport


def inspect_model(config: ModelConfig) -> ModelFacts:
    """Build the model without weights. InputError where it is no causal language model, or `strict` asks for more than it has."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source = locate(config)
    model_config = from_pretrained(AutoConfig, config, source)
    if Path(source).is_dir():
        check_weights(Path(source), config.path)
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.trust_remote_code)
        except Exception as error:  # a config.json of the wrong types fails anywhere in the model's code
            raise InputError("model.path", config.path, f"must be a causal language model ({first_line(error)})") from None
    head = model.get_output_embeddings()
    features = {
        n: (m.out_features, m.in_features) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head
    }
    if not features:
        raise InputError("model.path", config.path, NO_LINEAR)
    return ModelFacts(features, swaps_of(model, config, survey))


def swaps_of(model: nn.Module, config: ModelConfig, method: Callable[[nn.Module], SwapReport]) -> SwapReport:
    """What `method` (survey or fuse_layers) reports under `config.layers`."""
    if config.layers == "original":
        return SwapReport((), {"all": "model.layers = original"})
    report = method(model)
    if config.layers == "strict":
        require_fused(report, config.path)
    return report


def from_pretrained(factory: Any, config: ModelConfig, source: str, **options: Any) -> Any:
    try:
        return factory.from_pretrained(
            source, revision=config.revision or "main", trust_remote_code=config.trust_remote_code, **options
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # files of the wrong types or sizes fail anywhere in the library, as whatever comes up
        if "DefaultCPUAllocator" in str(error):  # the CPU's way to say that memory ran out
            raise
        allowed = "a folder or hub id that transformers can load; it said: "
        raise InputError("model.path", config.path, allowed + first_line(error)) from error
