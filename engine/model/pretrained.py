"""Choose the class that transformers loads a model with, and turn each of its errors into one line."""

from __future__ import annotations

from typing import Any

import torch

from engine.config.trial import ModelConfig
from engine.errors import InputError, first_line


def model_factory(config: Any) -> Any:
    """Return transformers' factory for a model with this config: that of causal language models.

    Mistral 3 and others are language models with a part for images, and known to the factory for
    images and text alone. Their text decoder is trained as any other.
    """
    import transformers

    kind, text = type(config), type(config.get_text_config())
    causal, images = transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    with_images = kind not in causal and kind in images and text in causal
    return transformers.AutoModelForImageTextToText if with_images else transformers.AutoModelForCausalLM


def from_pretrained(factory: Any, config: ModelConfig, source: str, **options: Any) -> Any:
    """Return what `factory` loads from a folder or hub id. Raises InputError for any fault in it."""
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
