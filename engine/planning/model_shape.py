"""Read the numbers that decide a model's memory and speed from its config.json. No torch.

Shape letters: D hidden, F MLP hidden, H query heads, G key/value heads, K head dim, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from engine.errors import InputError

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2",
            "gemma3": "Gemma3", "gemma3_text": "Gemma3"}  # fmt: skip
"""model_type -> family whose decoder layers run fused. The names of its classes begin with it."""
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""Activation -> the kernels' name for it. A layer with another activation runs unfused."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
"""Keys of config.json that say how many experts a layer has."""
# Values that transformers (5.17) uses if a config.json leaves a key out, as those of Gemma 3 do.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 256, "tie_word_embeddings": True, "attn_logit_softcapping": 50.0},
    "gemma3": {"head_dim": 256, "tie_word_embeddings": True, "vocab_size": 262_208, "num_attention_heads": 8,
               "num_key_value_heads": 4},
}  # fmt: skip


@dataclass(frozen=True)
class ModelShape:
    """The shape of a model's text decoder.

    - four_norms: True if norms stand before and after each half of a layer, as in Gemma.
    - family: one of FAMILIES' values in lower case, or "other".
    - attention_softcap: True if scores pass through a tanh, which no fast attention supports.
    - sliding_window: number of keys that a query sees; None if it sees all.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    four_norms: bool = False
    family: str = "llama"
    attention_softcap: bool = False
    sliding_window: int | None = None

    @classmethod
    def known(cls, config: dict[str, Any], where: str) -> ModelShape | None:
        """Return `of`, or None if the config has other names for these numbers.

        Such a model can be trained, but nothing is predicted for it.
        """
        try:
            return cls.of(config, where)
        except InputError:
            return None

    @classmethod
    def of(cls, config: dict[str, Any], where: str) -> ModelShape:
        """Return the shape in the content of a config.json, or in its `text_config` if it has one.

        Raises InputError, which names `where`, for a number that is missing or not positive.
        """
        outer, config = config, config.get("text_config") or config
        if not isinstance(config, dict):
            raise InputError(f"{where}: text_config", config, "must be an object")
        for key in EXPERTS:
            if isinstance(config.get(key), int) and config[key] > 1:
                raise InputError(f"{where}: {key}", config[key], "nothing is predicted for a model with experts")
        kind = str(config.get("model_type") or outer.get("model_type") or "")
        activation = config.get("hidden_activation") or config.get("hidden_act") or "silu"
        family = FAMILIES.get(kind, "other").lower() if activation in ACTIVATIONS else "other"
        known = {"tie_word_embeddings": outer.get("tie_word_embeddings"), **DEFAULTS.get(family, {})}
        values = {**{k: v for k, v in known.items() if v is not None}, **{k: v for k, v in config.items() if v is not None}}

        def number(key: str, default: int | None = None) -> int:
            value = values.get(key, default)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{where}: {key}", value, "must be a positive whole number in config.json")
            return value

        num_heads = number("num_attention_heads")
        hidden_size = number("hidden_size")
        window = values.get("sliding_window")
        if family in ("qwen2", "qwen3") and not values.get("use_sliding_window", False):
            window = None
        return cls(
            num_layers=number("num_hidden_layers"),
            hidden_size=hidden_size,
            intermediate_size=number("intermediate_size"),
            num_heads=num_heads,
            num_kv_heads=number("num_key_value_heads", num_heads),
            head_dim=number("head_dim", hidden_size // num_heads),
            vocab_size=number("vocab_size"),
            tied_embeddings=bool(values.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or bool(values.get("attention_bias", False)),
            qk_norm=family in ("qwen3", "gemma3"),
            four_norms=family in ("gemma2", "gemma3"),
            family=family,
            attention_softcap=family == "gemma2" and bool(values.get("attn_logit_softcapping")),
            sliding_window=window if isinstance(window, int) and not isinstance(window, bool) else None,
        )

    def projections(self) -> dict[str, tuple[int, int]]:
        """Return (output, input) features of a decoder layer's seven linear layers, by name."""
        D, F = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (q, D), "k_proj": (kv, D), "v_proj": (kv, D), "o_proj": (D, q),
            "gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F),
        }  # fmt: skip

    @property
    def linear_parameters(self) -> int:
        """Return the number of weights in the linear layers of one decoder layer."""
        return sum(math.prod(features) for features in self.projections().values())

    @property
    def vector_parameters(self) -> int:
        """Return the number of values in all norms and biases, the final norm included."""
        D, K = self.hidden_size, self.head_dim
        norms = (4 if self.four_norms else 2) * D + (2 * K if self.qk_norm else 0)
        bias = (self.num_heads + 2 * self.num_kv_heads) * K if self.qkv_bias else 0
        return self.num_layers * (norms + bias) + D

    @property
    def num_parameters(self) -> int:
        """Return the number of all parameters; tied embeddings count once."""
        embeddings = (1 if self.tied_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.num_layers * self.linear_parameters + self.vector_parameters + embeddings
