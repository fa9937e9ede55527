"""Write a random mixture as its publishers lay it out, without a GPU: the folder that Unsloth reads.

    python -m tests.bench.mixtures.folder MODEL LAYERS FOLDER

gpt-oss has bitsandbytes' NF4 and one linear layer for each expert, as the 4-bit copies published for
Unsloth. Qwen3-MoE has 16 bits and one weight for each expert, as its release. Layers share their
random values, because drawing and packing billions takes minutes; router and head have their own.

Shape letters: D hidden, E experts, F expert hidden, H query heads, G key/value heads, K head dim,
V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.bench.model_folder import SPECIAL, byte_tokenizer
from engine.bench.process import hand_back
from engine.bench.shapes import SHAPES, family_kind, random_config
from engine.quant.bnb import load_library
from tests.bench.mixtures.builders import GPT_OSS, mixtures

Named = Iterator[tuple[str, Tensor]]
NF4 = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "_load_in_4bit": True, "_load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": ["router", "lm_head", "embed_tokens"],
    "llm_int8_threshold": 6.0, "llm_int8_has_fp16_weight": False, "llm_int8_enable_fp32_cpu_offload": False,
}  # fmt: skip
INDEX = "model.safetensors.index.json"


def folder_name(model: str, layers: int) -> str:
    """Return a name that depends on the shape. Unsloth knows a folder of packed weights by the end of its name."""
    shape = hashlib.sha256(json.dumps([SHAPES[model], layers], sort_keys=True).encode()).hexdigest()[:8]
    return f"{model}-{layers}-{shape}{'-unsloth-bnb-4bit' if family_kind(model) == GPT_OSS else ''}"


def write_folder(model: str, layers: int, folder: Path) -> None:
    """Write the model with this number of layers into `folder`, which appears when it is whole."""
    from safetensors.torch import save_file

    config, files = random_config(model, layers), {}
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for number, tensors in enumerate(_files(config, family_kind(model) == GPT_OSS)):
        name = f"model-{number:05d}.safetensors"
        save_file({key: one.clone() for key, one in tensors}, part / name, metadata={"format": "pt"})  # it takes no shared ones
        files[name] = [key for key, _ in tensors]
    places = {key: name for name, keys in files.items() for key in keys}
    (part / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": places}))
    (part / "config.json").write_text(json.dumps(_config_values(config, family_kind(model) == GPT_OSS)))
    byte_tokenizer(config.max_position_embeddings).save_pretrained(part)
    part.rename(folder)


def _config_values(config: Any, is_oss: bool) -> dict[str, Any]:
    special = {f"{name}_token_id": list(SPECIAL).index(f"{name}_token") for name in ("bos", "eos", "pad")}
    values = {**config.to_dict(), **special, "torch_dtype": "bfloat16", "dtype": "bfloat16"}
    values["architectures"] = ["GptOssForCausalLM" if is_oss else "Qwen3MoeForCausalLM"]
    return {**values, "quantization_config": NF4} if is_oss else values


def _files(config: Any, is_oss: bool) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield the tensors of each file: what is no layer, then layer by layer."""
    values, d = RandomValues(), config.hidden_size
    yield [
        ("model.embed_tokens.weight", values.new(config.vocab_size, d)), ("model.norm.weight", values.ones(d)),
        ("lm_head.weight", values.new(config.vocab_size, d)),
    ]  # fmt: skip
    for number in range(config.num_hidden_layers):
        path = f"model.layers.{number}."
        yield [(path + name, tensor) for name, tensor in _layer(config, values, is_oss)]


def _layer(config: Any, values: RandomValues, is_oss: bool) -> Named:
    d, k = config.hidden_size, config.head_dim
    h, g = config.num_attention_heads * k, config.num_key_value_heads * k
    linear = values.packed if is_oss else values.plain
    for name, height, width in (("q", h, d), ("k", g, d), ("v", g, d), ("o", d, h)):
        yield from linear(f"self_attn.{name}_proj", height, width)
    yield "input_layernorm.weight", values.ones(d)
    yield "post_attention_layernorm.weight", values.ones(d)
    yield from (_oss_rest if is_oss else _qwen_rest)(config, values, linear)


def _oss_rest(config: Any, values: RandomValues, linear: Callable[[str, int, int], Named]) -> Named:
    d, f, e = config.hidden_size, config.intermediate_size, config.num_local_experts
    yield "self_attn.sinks", values.zeros(config.num_attention_heads)
    yield "mlp.router.linear.weight", values.new(e, d)
    yield "mlp.router.linear.bias", values.zeros(e)
    for expert in range(e):
        yield from linear(f"mlp.experts.gate_up_projs.{expert}", 2 * f, d)
        yield from linear(f"mlp.experts.down_projs.{expert}", d, f)


def _qwen_rest(config: Any, values: RandomValues, linear: Callable[[str, int, int], Named]) -> Named:
    d, f, e = config.hidden_size, config.moe_intermediate_size, config.num_experts
    yield "self_attn.q_norm.weight", values.ones(config.head_dim)
    yield "self_attn.k_norm.weight", values.ones(config.head_dim)
    yield "mlp.gate.weight", values.new(e, d)
    for expert in range(e):
        for name, height, width in (("gate", f, d), ("up", f, d), ("down", d, f)):
            yield from linear(f"mlp.experts.{expert}.{name}_proj", height, width)


class RandomValues:
    """Draw values in bfloat16, of a linear layer once for each shape."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._known: dict[tuple[int, int, bool], dict[str, Tensor]] = {}

    def new(self, *shape: int) -> Tensor:
        """Return new values [*shape]."""
        return (torch.randn(*shape, generator=self._generator) * 0.02).to(torch.bfloat16)

    @staticmethod
    def ones(size: int) -> Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    @staticmethod
    def zeros(size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.bfloat16)

    def plain(self, name: str, height: int, width: int) -> Named:
        """Yield a linear layer's weight [height, width]."""
        found = self._known.get((height, width, False)) or {"weight": self.new(height, width)}
        self._known[height, width, False] = found
        yield from ((f"{name}.{key}", tensor) for key, tensor in found.items())

    def packed(self, name: str, height: int, width: int) -> Named:
        """Yield a linear layer's NF4 weight of [height, width] with double quantisation, its state, and its bias [height]."""
        found = self._known.get((height, width, True))
        if found is None:
            load_library()
            from bitsandbytes.functional import quantize_4bit

            packed, state = quantize_4bit(self.new(height, width), compress_statistics=True, quant_type="nf4")
            states = {f"weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
            found = {"weight": packed, **states, "bias": self.zeros(height)}
            self._known[height, width, True] = found
        yield from ((f"{name}.{key}", tensor) for key, tensor in found.items())


def main(arguments: list[str]) -> int:
    model, layers, folder = arguments
    if model not in mixtures():
        raise SystemExit(f"error: MODEL {model}: must be one of {', '.join(mixtures())}")
    write_folder(model, int(layers), Path(folder))
    hand_back({})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
