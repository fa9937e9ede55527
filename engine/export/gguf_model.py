"""Write GGUF files for llama.cpp: an adapter, or a whole merged model with its tokenizer.

Tensor names come from the gguf package's maps. Matrices keep their 16 bits; vectors, biases and
routers become fp32, as llama.cpp requires. One tensor is in memory at a time.

Llama, Mistral and Mixtral are llama.cpp's `llama`, which rotates neighbouring dimensions of a head;
transformers rotates the two halves. The rows of q_proj and k_proj therefore change their order, and
in an adapter the rows of B do. The other architectures rotate as in transformers, so their rows stay.
Mistral's sliding window is ignored, as in llama.cpp's own converter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from engine.adapter.portable import Adapter
from engine.config.targets import is_expert
from engine.config.trial import ModelConfig
from engine.errors import InputError
from engine.export.gguf_experts import GgufTensor, adapter_tensors, expert_tensors
from engine.export.gguf_settings import add_hyperparameters, architecture, num_experts
from engine.export.gguf_vocab import add_vocab
from engine.sources.weight_files import tensor_files
from engine.system.command_line import tell

SUFFIXES = (".weight", ".bias")
SINKS = ".sinks"  # a parameter of transformers' layer, without a suffix
ROTATED = re.compile(r"\.self_attn\.([qk])_proj\.(weight|bias)$")
ROUTER = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.FFN_GATE_INP].rpartition(".")[2]
FILE_TYPES = {
    torch.float32: gguf.LlamaFileType.ALL_F32,
    torch.float16: gguf.LlamaFileType.MOSTLY_F16,
    torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
}


def permute(rows: Tensor, num_heads: int) -> Tensor:
    """Return q_proj's or k_proj's rows [out, ...] in llama.cpp's order.

    Dimensions i and i + head_dim / 2 of a head become neighbours.
    """
    half = rows.shape[0] // num_heads // 2
    return rows.reshape(num_heads, 2, half, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape).contiguous()


class Naming:
    """Translate tensor names and row orders from transformers to llama.cpp, for one model."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.arch = architecture(config)
        self._map = gguf.get_tensor_name_map(self.arch, config["num_hidden_layers"])
        heads = config["num_attention_heads"]
        self._heads = {"q": heads, "k": config.get("num_key_value_heads") or heads}

    def name(self, key: str) -> str:
        found = self._map.get_name(f"{key}.weight" if key.endswith(SINKS) else key, try_suffixes=SUFFIXES)
        if found is None:
            raise InputError("tensor", key, f"llama.cpp's {gguf.MODEL_ARCH_NAMES[self.arch]} has no such tensor")
        return found

    def rows(self, key: str, tensor: Tensor) -> Tensor:
        """Return `tensor` (a weight, a bias, or an adapter's B) with rows in llama.cpp's order."""
        found = ROTATED.search(key)
        return permute(tensor, self._heads[found[1]]) if found and self.arch == gguf.MODEL_ARCH.LLAMA else tensor


def write_adapter(adapter: Adapter, config: dict[str, Any], path: Path) -> None:
    """Write the adapter as a GGUF file. config: the base model's config.json.

    llama.cpp adds adapter.lora.alpha / rank * B A and reads the rank from the tensors.
    """
    naming = Naming(config)
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[naming.arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.lora_alpha))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    tensors: list[tuple[str, Tensor]] = []
    for layer, (a_RD, b_OR) in adapter.layers.items():
        if is_expert(layer):
            tensors += adapter_tensors(layer, (a_RD, b_OR), adapter.rank, naming.arch)
            continue
        key = f"{layer}.weight"
        tensors += [(f"{naming.name(key)}.lora_a", a_RD), (f"{naming.name(key)}.lora_b", naming.rows(key, b_OR))]
    _write(writer, [GgufTensor(name, tuple(tensor.shape), lambda t=tensor: t) for name, tensor in tensors], torch.float32, path)


def write_model(folder: Path, config: dict[str, Any], path: Path, name: str) -> None:
    """Write a merged model and its tokenizer as a GGUF file.

    folder: holds the model. config: its config.json.
    """
    naming, dtype = Naming(config), getattr(torch, config["dtype"])
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[naming.arch])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    factors = add_hyperparameters(writer, config, naming.arch)
    add_vocab(writer, folder, config["vocab_size"])
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    tensors = _tensors(folder, naming, config)
    if factors is not None:
        tensors.append(GgufTensor("rope_freqs.weight", tuple(factors.shape), lambda: factors))
    _write(writer, tensors, dtype, path)


def _tensors(folder: Path, naming: Naming, config: dict[str, Any]) -> list[GgufTensor]:
    files, tied = tensor_files(folder), config.get("tie_word_embeddings", False)

    def read(key: str) -> Tensor:
        with safe_open(files[key], framework="pt") as opened:
            return opened.get_tensor(key)

    tensors, done = [], set()
    if num_experts(config):
        tensors, done = expert_tensors(ModelConfig(path=str(folder)), files, read, naming.arch)
    for key, file in files.items():
        if key in done or key.endswith(".rotary_emb.inv_freq") or (tied and key == "lm_head.weight"):
            continue
        with safe_open(file, framework="pt") as opened:
            shape = tuple(opened.get_slice(key).get_shape())
        tensors.append(GgufTensor(naming.name(key), shape, partial(_rows, naming, key, read)))
    return tensors


def _rows(naming: Naming, key: str, read: Any) -> Tensor:
    return naming.rows(key, read(key))


def _write(writer: gguf.GGUFWriter, tensors: Iterable[GgufTensor], dtype: torch.dtype, path: Path) -> None:
    """Write the file, one tensor after the other. numpy has no bfloat16, so its bytes are written with their GGUF type."""
    tensors = list(tensors)
    dtypes = [torch.float32 if _is_fp32(tensor) else dtype for tensor in tensors]
    try:
        for tensor, kept in zip(tensors, dtypes):
            size, raw = kept.itemsize * int(np.prod(tensor.shape)), None
            shape, stored = tensor.shape, np.dtype(np.float16 if kept == torch.float16 else np.float32)
            if kept == torch.bfloat16:
                shape, stored = (*shape[:-1], 2 * shape[-1]), np.dtype(np.uint8)
                raw = gguf.GGMLQuantizationType.BF16
            writer.add_tensor_info(tensor.name, shape, stored, size, raw)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for number, (tensor, kept) in enumerate(zip(tensors, dtypes)):
            tell("writing GGUF tensors", number, len(tensors))
            values = tensor.make().to(kept).contiguous()
            writer.write_tensor_data((values.view(torch.uint8) if kept == torch.bfloat16 else values).numpy())
    finally:
        writer.close()


def _is_fp32(tensor: GgufTensor) -> bool:
    return len(tensor.shape) == 1 or tensor.name.endswith(".bias") or f".{ROUTER}." in tensor.name
