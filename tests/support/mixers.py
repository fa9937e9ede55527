"""Build a library's token mixer alone."""

from __future__ import annotations

import torch

from engine.adapter.lora import LoraLinear
from engine.config.trial import LoraConfig
from engine.layers.library_kernels import use_torch_functions
from engine.layers.library_mixer import LibraryMixer
from engine.quant.frozen_linear import freeze_linears
from engine.shape.mixer_shape import MixerShape


def mixer_on(device: str, hidden_size: int, shape: MixerShape, lora: LoraConfig) -> LibraryMixer:
    """Return Qwen3.5's mixer of this shape in bf16, on torch operations, with adapters on all its linear layers."""
    from transformers import Qwen3_5TextConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

    config = Qwen3_5TextConfig(
        hidden_size=hidden_size, num_hidden_layers=1, layer_types=["linear_attention"], vocab_size=64,
        linear_num_key_heads=shape.key_heads, linear_num_value_heads=shape.value_heads, linear_key_head_dim=shape.key_dim,
        linear_value_head_dim=shape.value_dim, linear_conv_kernel_dim=shape.conv_width,
    )  # fmt: skip
    with torch.device(device):
        module = Qwen3_5GatedDeltaNet(config, 0).to(torch.bfloat16).requires_grad_(False)
    use_torch_functions(module)
    for name in freeze_linears(module):
        with torch.device("cpu"):
            layer = LoraLinear(module.get_submodule(name), lora, torch.Generator().manual_seed(0))
        module.set_submodule(name, layer.to(device))
    return LibraryMixer(module)
