"""Read a model folder without its weights: config, tokenizer, linear and fusable layers."""

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

NO_LINEAR = "must have at least one linear layer for the adapter"


def model_config(config: ModelConfig) -> dict[str, Any]:
    """Return the model's config.json as transformers reads it, as plain data."""
    from transformers import AutoConfig

    return from_pretrained(AutoConfig, config, locate(config)).to_dict()


def load_tokenizer(config: ModelConfig) -> Any:
    """Load the model's tokenizer. Raises InputError if transformers cannot."""
    from transformers import AutoTokenizer

    return from_pretrained(AutoTokenizer, config, locate(config))


@dataclass(frozen=True)
class ModelFacts:
    """Hold what is known about a model without its weights.

    features: layer name -> (out, in) of each layer that an adapter may target. swaps: which layers
    run fused.
    """

    features: dict[str, tuple[int, int]]
    swaps: SwapReport


def inspect_model(config: ModelConfig) -> ModelFacts:
    """Build the model without weights and return its facts.

    Raises InputError if it is not a causal language model, or if `layers` is `strict` and some
    layer cannot run fused.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source = locate(config)
    model_config = from_pretrained(AutoConfig, config, source)
    if Path(source).is_dir():
        check_weights(Path(source), config.path)
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.trust_remote_code)
        except Exception as error:  # wrong types in config.json can raise any error in model code
            raise InputError("model.path", config.path, f"must be a causal language model ({first_line(error)})") from None
    head = model.get_output_embeddings()
    features = {
        n: (m.out_features, m.in_features) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head
    }
    if not features:
        raise InputError("model.path", config.path, NO_LINEAR)
    return ModelFacts(features, swaps_of(model, config, survey))


def swaps_of(model: nn.Module, config: ModelConfig, method: Callable[[nn.Module], SwapReport]) -> SwapReport:
    """Return the report of `method` (survey or fuse_layers) under the rule in `config.layers`.

    Raises InputError under `strict` if some layer cannot run fused.
    """
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
    except Exception as error:  # files with wrong types or sizes can raise any error in the library
        if "DefaultCPUAllocator" in str(error):  # torch's only sign that CPU memory ran out
            raise
        allowed = "must be a folder or hub id that transformers can load; its error: "
        raise InputError("model.path", config.path, allowed + first_line(error)) from error
