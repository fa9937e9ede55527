"""Write GGUF files for llama.cpp: an adapter, or a whole merged model with its tokenizer.

Tensor names come from the gguf package's maps. Matrices keep their 16 bits; vectors become fp32, as
llama.cpp requires.

Llama and Mistral are llama.cpp's `llama`, which rotates neighbouring dimensions of a head;
transformers rotates the two halves. The rows of q_proj and k_proj therefore change their order, and
in an adapter the rows of B do. Qwen2 and Qwen3 rotate as in transformers, so their rows stay.
Mistral's sliding window is ignored, as in llama.cpp's own converter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import safe_open
from torch import Tensor

from engine.adapter.portable import Adapter
from engine.errors import InputError
from engine.export.gguf_vocab import add_vocab
from engine.sources.weight_files import tensor_files
from engine.system.command_line import tell

ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "MistralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
}
SUFFIXES = (".weight", ".bias")
ROTATED = re.compile(r"\.self_attn\.([qk])_proj\.(weight|bias)$")
FILE_TYPES = {
    torch.float32: gguf.LlamaFileType.ALL_F32,
    torch.float16: gguf.LlamaFileType.MOSTLY_F16,
    torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
}


def architecture(config: dict[str, Any]) -> gguf.MODEL_ARCH:
    """Return llama.cpp's architecture for a config.json; InputError for any not listed above."""
    name = next(iter(config.get("architectures") or ()), None)
    if name not in ARCHITECTURES:
        raise InputError("architectures", name, f"no GGUF export for it; allowed: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


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
        found = self._map.get_name(key, try_suffixes=SUFFIXES)
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
    for layer, (a_RD, b_OR) in adapter.layers.items():
        key = f"{layer}.weight"
        writer.add_tensor(f"{naming.name(key)}.lora_a", a_RD.contiguous().numpy())
        writer.add_tensor(f"{naming.name(key)}.lora_b", naming.rows(key, b_OR).contiguous().numpy())
    _write(writer, path)


def write_model(folder: Path, config: dict[str, Any], path: Path, name: str) -> None:
    """Write a merged model and its tokenizer as a GGUF file.

    folder: holds the model. config: its config.json.
    """
    naming = Naming(config)
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[naming.arch])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    factors = add_hyperparameters(writer, config, naming.arch)
    add_vocab(writer, folder, config["vocab_size"])
    writer.add_file_type(FILE_TYPES[getattr(torch, config["dtype"])])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    tied = config.get("tie_word_embeddings", False)
    for key, tensor in _tensors(folder):
        if key.endswith(".rotary_emb.inv_freq") or (tied and key == "lm_head.weight"):
            continue
        _add(writer, naming.name(key), naming.rows(key, tensor))
    if factors is not None:
        _add(writer, "rope_freqs.weight", factors)
    _write(writer, path)


def add_hyperparameters(writer: gguf.GGUFWriter, config: dict[str, Any], arch: gguf.MODEL_ARCH) -> Tensor | None:
    """Write the values of a config.json that llama.cpp reads.

    Return the factors by which Llama 3.1 slows its rotation, or None for other models. InputError
    for a RoPE type that llama.cpp does not compute like transformers.
    """
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3") or (kind == "llama3" and arch != gguf.MODEL_ARCH.LLAMA):
        raise InputError("rope_parameters", kind, "no GGUF export for it; allowed: default, and llama3 with Llama and Mistral")
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    return llama3_factors(rope, theta, head_dim) if kind == "llama3" else None


def llama3_factors(rope: dict[str, Any], theta: float, head_dim: int) -> Tensor:
    """Return the factors [head_dim / 2] by which llama.cpp divides the frequencies.

    Each is the default frequency over the one that transformers uses (Llama 3.1's wavelength
    bands).
    """
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, rope_parameters={**rope, "rope_theta": theta}
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    default = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return default / scaled


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    files = tensor_files(folder)
    for done, (key, file) in enumerate(files.items()):
        tell("writing GGUF tensors", done, len(files))
        with safe_open(file, framework="pt") as opened:
            yield key, opened.get_tensor(key)


def _add(writer: gguf.GGUFWriter, name: str, tensor: Tensor) -> None:
    """Add a tensor. numpy has no bfloat16, so its bytes are added with their GGUF type."""
    tensor = tensor.float() if tensor.dim() == 1 else tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        raw = tensor.view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, tensor.numpy())


def _write(writer: gguf.GGUFWriter, path: Path) -> None:
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
