"""Build a library's token mixer alone, and stand for the packages whose kernels it calls."""

from __future__ import annotations

import sys
from types import ModuleType

import torch
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5 as library

from engine.adapter.lora import LoraLinear
from engine.config.trial import LoraConfig
from engine.layers.library.library_kernels import use_torch_functions
from engine.layers.library.library_mixer import LibraryMixer
from engine.quant.frozen_linear import freeze_linears
from engine.shape.mixer_shape import MixerShape

ORIGINAL_RULE, ORIGINAL_CONV = library.torch_chunk_gated_delta_rule.__wrapped__, library.causal_conv1d_fn.__wrapped__


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


def told_conv(x: Tensor, weight: Tensor, bias=None, activation=None, seq_idx: Tensor | None = None, **_) -> Tensor:
    """Stand for causal-conv1d, which reads the number of each token's sample."""
    lengths = [x.shape[2]] if seq_idx is None else seq_idx[0].bincount().tolist()
    return torch.cat([ORIGINAL_CONV(part, weight, bias, activation) for part in x.split(lengths, 2)], 2)


def told_rule(*tensors: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor | None = None, **others):
    """Stand for flash-linear-attention, which reads offsets."""
    lengths = [g.shape[1]] if cu_seqlens is None else cu_seqlens.diff().tolist()
    parts = zip(*(t.split(lengths, dim=1) for t in (*tensors, g, beta)))
    return torch.cat([ORIGINAL_RULE(q, k, v, g=g, beta=beta, **others)[0] for q, k, v, g, beta in parts], dim=1), None


def deaf(function):
    """Stand for a library that takes offsets and runs on across samples."""
    return lambda *tensors, cu_seqlens=None, seq_idx=None, **others: function(*tensors, **others)


def chunk_rule(
    *tensors: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor | None = None, chunk_indices: Tensor | None = None, **others
):
    """Stand for flash-linear-attention as a recording needs it: all that it knows of the samples is in the chunks given.

    It writes nothing for chunks behind the end of their sample, as its kernels do.
    """
    if chunk_indices is None:
        return told_rule(*tensors, g=g, beta=beta, cu_seqlens=cu_seqlens, **others)
    ends = {}
    for sample, number in chunk_indices.tolist():
        first, last = cu_seqlens[sample].item() + 64 * number, cu_seqlens[sample + 1].item()
        if first < last:
            ends[sample] = min(first + 64, last)
    lengths = [end - cu_seqlens[sample].item() for sample, end in ends.items()]
    assert sum(lengths) == g.shape[1], "chunks are missing"
    return told_rule(*tensors, g=g, beta=beta, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0), **others)


def tune_nothing(monkeypatch, package: str = "fla") -> None:
    """Leave one configuration to each kernel of a package that is imported: tuning compiles dozens, for minutes.

    It is one with few warps, stages and features at a time, which fits every card.
    """
    for name, module in list(sys.modules.items()):
        for kernel in vars(module).values() if name.startswith(f"{package}.") else ():
            while kernel is not None and not isinstance(kernel, ModuleType | type):
                configs = vars(kernel).get("configs") if hasattr(kernel, "__dict__") else None
                if isinstance(configs, list) and len(configs) > 1 and all(hasattr(one, "num_stages") for one in configs):
                    monkeypatch.setattr(kernel, "configs", [min(configs, key=_size)])
                kernel = getattr(kernel, "fn", None)


def _size(config) -> tuple[int, int, int]:
    tiles = sum(size for size in config.kwargs.values() if isinstance(size, int))
    return abs(config.num_warps - 4), abs(config.num_stages - 2), tiles


class KeepsByIdentity:
    """Stand for a library that keeps what it derives from a tensor of offsets, and knows it again by its identity."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor]] = []

    def __call__(self, *tensors: Tensor, cu_seqlens: Tensor | None = None, **others):
        if cu_seqlens is None:
            return chunk_rule(*tensors, **others)
        known = next((copy for offsets, copy in self._kept if offsets is cu_seqlens), None)
        if known is None:
            known = cu_seqlens.clone()
            self._kept.append((cu_seqlens, known))
        return chunk_rule(*tensors, cu_seqlens=known, **others)
