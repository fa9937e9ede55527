"""Build random models of real shapes.

Speed and memory do not depend on the weights, so none has to be downloaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine.config.trial import ModelConfig
from engine.layers import attention
from engine.layers.host_embedding import place_embedding
from engine.layers.swap import SwapReport, fuse_layers
from engine.model.base import Base
from engine.model.route import Route
from engine.quant.bnb import library_linear
from engine.quant.frozen_linear import freeze_linears

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True},
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                     "num_key_value_heads": 3, "vocab_size": 49152, "rope_theta": 100000.0, "tie_word_embeddings": True},
    "llama-3.1-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                     "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "tie_word_embeddings": False},
    "llama-3.2-3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
                     "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "tie_word_embeddings": True},
    "llama-3.2-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                     "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "tie_word_embeddings": True},
}  # fmt: skip


def random_model(name: str, device: torch.device, dtype: torch.dtype, attention_name: str) -> tuple[nn.Module, list[str]]:
    """Return an NF4 Llama (double quantisation) on bitsandbytes' layers, and the layers' names.

    It is built layer by layer on the device, so no unquantised copy of the whole model exists.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[name], max_position_embeddings=131072, attn_implementation=attention_name)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    head = model.get_output_embeddings()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    generator = torch.Generator(device).manual_seed(0)

    def values(shape: torch.Size) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)

    for layer_name in names:
        shape = model.get_submodule(layer_name).weight.shape
        model.set_submodule(layer_name, library_linear(values(shape), dtype))
    for module in list(model.modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                new = torch.ones(parameter.shape, dtype=dtype, device=device) if parameter.dim() == 1 else values(parameter.shape)
                setattr(module, key, nn.Parameter(new, requires_grad=False))
    if config.tie_word_embeddings:
        head.weight = model.get_input_embeddings().weight
    with torch.device(device):  # the rotary buffers are computed, not loaded
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model.requires_grad_(False), names


def random_base(name: str, device: torch.device, dtype: torch.dtype, fused: bool) -> Base:
    """Return the same model as a Base, as `load_base` would, but without a tokenizer."""
    attention.register()
    model, names = random_model(name, device, dtype, attention.NAME)
    freeze_linears(model, skip=[model.get_output_embeddings()])
    swaps = fuse_layers(model) if fused else SwapReport((), {"all": "asked for unfused"})
    config = ModelConfig(path=name, embeddings="auto" if fused else "device")
    place_embedding(model, config)
    return Base(model, None, config, device, dtype, names, swaps, Route(fused))
