"""Write the values of a config.json that llama.cpp reads, and refuse those that it computes otherwise.

llama.cpp has no key for some of them: it takes one value for all models of an architecture. A
model with another value would answer wrongly without a word, so it is refused here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gguf
import torch
from torch import Tensor

from engine.errors import InputError

ARCH = gguf.MODEL_ARCH
ARCHITECTURES = {
    "LlamaForCausalLM": ARCH.LLAMA,
    "MistralForCausalLM": ARCH.LLAMA,
    "MixtralForCausalLM": ARCH.LLAMA,
    "Qwen2ForCausalLM": ARCH.QWEN2,
    "Qwen3ForCausalLM": ARCH.QWEN3,
    "Qwen3MoeForCausalLM": ARCH.QWEN3MOE,
    "OlmoeForCausalLM": ARCH.OLMOE,
    "GptOssForCausalLM": ARCH.GPT_OSS,
}
ROPES = {ARCH.LLAMA: ("default", "llama3"), ARCH.GPT_OSS: ("default", "yarn")}
YARN = ("factor", "beta_fast", "beta_slow", "truncate", "original_max_position_embeddings", "rope_theta", "rope_type")
NUM_EXPERTS = ("num_experts", "num_local_experts")


def _every_head_has_keys(config: dict[str, Any]) -> bool:
    return config.get("num_key_value_heads") in (None, config["num_attention_heads"])


def _alternate(config: dict[str, Any]) -> bool:
    kinds = ("sliding_attention", "full_attention")
    return config.get("layer_types") == [kinds[i % 2] for i in range(config["num_hidden_layers"])]


Rule = tuple[str, Callable[[dict[str, Any]], bool], str]
RULES: dict[gguf.MODEL_ARCH, tuple[Rule, ...]] = {
    ARCH.QWEN3MOE: (
        ("norm_topk_prob", lambda c: bool(c.get("norm_topk_prob")), "true"),
        ("attention_bias", lambda c: not c.get("attention_bias"), "false"),
        ("decoder_sparse_step", lambda c: c.get("decoder_sparse_step", 1) == 1, "1"),
        ("mlp_only_layers", lambda c: not c.get("mlp_only_layers"), "empty"),
        ("use_sliding_window", lambda c: not c.get("use_sliding_window"), "false"),
    ),
    ARCH.OLMOE: (
        ("norm_topk_prob", lambda c: not c.get("norm_topk_prob"), "false"),
        ("attention_bias", lambda c: not c.get("attention_bias"), "false"),
        ("num_key_value_heads", _every_head_has_keys, "num_attention_heads"),
        ("clip_qkv", lambda c: c.get("clip_qkv") is None, "null"),
    ),
    ARCH.GPT_OSS: (
        ("attention_bias", lambda c: bool(c.get("attention_bias", True)), "true"),
        ("layer_types", _alternate, "sliding and full attention by turns"),
        ("swiglu_limit", lambda c: c.get("swiglu_limit", 7.0) == 7.0, "7.0"),
    ),
}
"""What llama.cpp computes in all models of an architecture: key, test, allowed value."""


def architecture(config: dict[str, Any]) -> gguf.MODEL_ARCH:
    """Return llama.cpp's architecture for a config.json; InputError for one that it does not know or computes otherwise."""
    name = next(iter(config.get("architectures") or ()), None)
    if name not in ARCHITECTURES:
        raise InputError("architectures", name, f"no GGUF export for it; allowed: {', '.join(ARCHITECTURES)}")
    arch = ARCHITECTURES[name]
    if num_experts(config):
        for key, holds, allowed in (*RULES.get(arch, ()), ("hidden_act", lambda c: c.get("hidden_act") == "silu", "silu")):
            if not holds(config):
                raise InputError(key, config.get(key), f"must be {allowed} in a GGUF of {name}; or: --to merged")
    return arch


def num_experts(config: dict[str, Any]) -> int:
    """Return how many experts a layer has, 0 for a dense model."""
    return next((config[key] for key in NUM_EXPERTS if config.get(key)), 0)


def rope_of(config: dict[str, Any], arch: gguf.MODEL_ARCH) -> tuple[dict[str, Any], str]:
    """Return the values of RoPE and its type. InputError for one that llama.cpp does not compute like transformers."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    odd = [key for key in rope if key not in YARN and rope[key] is not None] if kind == "yarn" else []
    if kind not in ROPES.get(arch, ("default",)) or odd:
        value = f"{kind} with {odd[0]}" if odd else kind
        allowed = "allowed: default, llama3 with Llama and Mistral, and gpt-oss's yarn"
        raise InputError("rope_parameters", value, f"no GGUF export for it; {allowed}")
    return rope, kind


def known_differences(config: dict[str, Any]) -> tuple[str, ...]:
    """Return what llama.cpp computes a little differently in this model, whoever wrote its file; one line each."""
    rope, kind = rope_of(config, architecture(config))
    if kind != "yarn" or rope.get("truncate", True):
        return ()
    return ("llama.cpp rounds the ends of YaRN's ramp to whole dimensions, and this model does not: answers differ a little.",)


def add_hyperparameters(writer: gguf.GGUFWriter, config: dict[str, Any], arch: gguf.MODEL_ARCH) -> Tensor | None:
    """Write the values of a config.json that llama.cpp reads.

    Return the factors by which Llama 3.1 slows its rotation, or None for other models. InputError
    for a RoPE type that llama.cpp does not compute like transformers.
    """
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope, kind = rope_of(config, arch)
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
    if num_experts(config):
        _add_experts(writer, config, arch)
    if kind == "yarn":
        _add_yarn(writer, rope)
    return llama3_factors(rope, theta, head_dim) if kind == "llama3" else None


def _add_experts(writer: gguf.GGUFWriter, config: dict[str, Any], arch: gguf.MODEL_ARCH) -> None:
    writer.add_expert_count(num_experts(config))
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if arch in (ARCH.QWEN3MOE, ARCH.GPT_OSS):  # the others take the feed-forward length
        writer.add_expert_feed_forward_length(config.get("moe_intermediate_size") or config["intermediate_size"])
    if arch == ARCH.GPT_OSS:
        writer.add_sliding_window(config["sliding_window"])


def _add_yarn(writer: gguf.GGUFWriter, rope: dict[str, Any]) -> None:
    """Write YaRN's numbers. llama.cpp rounds the ends of its ramp to whole dimensions, as `truncate` does."""
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
    writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)


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
