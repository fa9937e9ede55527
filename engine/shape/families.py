"""Describe the decoder layer of each family of models whose layers run fused, as data. No torch.

A layer has two halves, attention and MLP. Each adds to the residual stream

    x + multiplier * after(half(before(x)))

where `before` and `after` are norms, and any of the three may be missing. A `Family` says which are
there and under which attribute of the library's layer. `engine/layers/layer_spec.py` reads a loaded
layer by it, and `engine/shape/model_shape.py` a config.json. A new family is a new entry.

A path is attributes from the library's decoder layer on, joined by dots.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from engine.shape.experts_shape import ROUTER, SHARED, SHARED_GATE
from engine.shape.mixer_shape import MIXER

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""Activation -> the kernels' name for it. A layer with another activation runs unfused."""

WINDOWED = "windowed"
INPUT_GATE, INPUT_PROJECTION = "input_gate", "input_projection"


@dataclass(frozen=True)
class HalfNorms:
    """The attributes of the norms before and after a half; None for one that is not there."""

    before: str | None
    after: str | None = None

    @property
    def number(self) -> int:
        return (self.before is not None) + (self.after is not None)


@dataclass(frozen=True)
class Family:
    """The decoder layer of one family.

    - name: the names of its classes begin with it.
    - attention, mlp: the norms around each half.
    - qkv, gate_up: the linear layers that make queries, keys and values, and gate and up. One
      merged layer has their features in this order.
    - qk_norm: queries and keys are normalised, each `head` alone or all heads as one `whole`, by
      the norms `qk_norms`. norms_rotated: after their rotation instead of before.
    - norm_offset: what a norm adds to its weight. norm_rounds_once: it rounds only its result.
    - window: path of the number of keys that a query sees, for layers where the flag `slides` is
      true.
    - rotary: which features turn together, those of two `halves` or neighbours (`pairs`).
    - rotates: path of a flag that is true where queries and keys rotate. WINDOWED: they rotate in
      layers with a window, and in all layers if the model has no window.
    - multiplier: path of the factor of both halves.
    - reads, stores: paths of the flags of layers that take keys and values from an earlier layer, and
      of those that leave them to later ones. A layer that reads makes queries only.
    - keys_are_values: path of the flag of layers whose values are the keys as projected.
    - normalises_values: True if values pass a norm without weights.
    - tail: the linear layers of a per-layer input, by group; `tail_norm` is the norm after them and
      `tail_width` the path of the input's features, 0 for none.
    - outside: linear layers of the decoder that make the per-layer inputs, outside its layers.
    - scalar: path of a factor of the layer's output.
    - lacks: paths of flags of what is not computed; they must be false.
    - query_scale: True if queries grow with their position in the sample, as in Llama 4.
    - output_gate: True if the layer that makes queries also makes a gate behind each head's query.
    - mixer: attribute of the library's token mixer, in layers that have one in attention's place.
      `mixing` are its linear layers.
    - experts: path of the experts of a mixture, in layers that have one in the MLP's place; what holds
      them holds the router too.
    - sinks: path of the heads' sinks. half_tables: cos and sin come without their second, equal half.
    - no_dropout: config keys of dropouts that must be 0. needs: config keys that must be true.
    - biases: config keys that say whether projections have a bias, by group; True for always.
    - defaults: what a config.json means that leaves these keys out (transformers 5.23).
    - rotary_tables: how many kinds of layers have cos and sin of their own.
    - rotary_fp32: True if cos and sin are fp32 whatever the activations are.
    """

    name: str
    attention: HalfNorms = HalfNorms("input_layernorm")
    mlp: HalfNorms = HalfNorms("post_attention_layernorm")
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    qk_norm: Literal["none", "head", "whole"] = "none"
    qk_norms: tuple[str, str] = ("q_norm", "k_norm")
    norms_rotated: bool = False
    norm_offset: float = 0.0
    norm_rounds_once: bool = False
    window: str | None = None
    slides: str | None = None
    rotary: Literal["halves", "pairs"] = "halves"
    rotates: str | None = None
    multiplier: str | None = None
    reads: str | None = None
    stores: str | None = None
    keys_are_values: str | None = None
    normalises_values: bool = False
    tail: dict[str, tuple[str, ...]] = field(default_factory=dict)
    tail_norm: str | None = None
    tail_width: str | None = None
    outside: tuple[str, ...] = ()
    scalar: str | None = None
    lacks: tuple[str, ...] = ()
    query_scale: bool = False
    output_gate: bool = False
    mixer: str | None = None
    mixing: tuple[str, ...] = ()
    experts: str | None = None
    sinks: str | None = None
    half_tables: bool = False
    no_dropout: tuple[str, ...] = ("attention_dropout",)
    needs: tuple[str, ...] = ()
    biases: dict[str, str | bool] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    rotary_tables: int = 1
    rotary_fp32: bool = False

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Return the members of each group of projections: linear layers with one input."""
        return {"qkv": self.qkv, "o": ("o_proj",), "gate_up": self.gate_up, "down": ("down_proj",)}

    @property
    def paths(self) -> dict[str, tuple[str, ...]]:
        """Return the path of each member, by group."""
        return {group: tuple(self.path(group, name) for name in members) for group, members in self.groups.items()}

    def path(self, group: str, name: str) -> str:
        """Return the path of a member. Those of a per-layer input belong to the decoder layer itself."""
        parts = {"qkv": "self_attn.", "o": "self_attn.", "gate_up": "mlp.", "down": "mlp.", MIXER: f"{self.mixer}."}
        parts |= {SHARED: "mlp." if name == SHARED_GATE else f"mlp.{SHARED}.", ROUTER: f"{ROUTER}."}
        return parts.get(group, "") + name


_ATTENTION_BIAS = {"qkv": "attention_bias", "o": "attention_bias"}
_GEMMA: dict[str, Any] = {
    "attention": HalfNorms("input_layernorm", "post_attention_layernorm"),
    "mlp": HalfNorms("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "norm_offset": 1.0,
    "biases": _ATTENTION_BIAS,
}
_GEMMA2_DEFAULTS = {
    "head_dim": 256, "tie_word_embeddings": True, "attn_logit_softcapping": 50.0, "vocab_size": 256_000,
    "num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window": 4096,
}  # fmt: skip
_GEMMA4: dict[str, Any] = _GEMMA | {
    "norm_offset": 0.0, "norm_rounds_once": True, "qk_norm": "head", "window": "self_attn.sliding_window", "rotary_tables": 2,
    "reads": "self_attn.is_kv_shared_layer", "stores": "self_attn.store_full_length_kv",
    "keys_are_values": "self_attn.use_alternative_attention", "normalises_values": True, "scalar": "layer_scalar",
}  # fmt: skip
_GEMMA4_DEFAULTS = {
    "head_dim": 256, "tie_word_embeddings": True, "vocab_size": 262_144, "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
_NORMS_AFTER: dict[str, Any] = {
    "attention": HalfNorms(None, "post_attention_layernorm"), "mlp": HalfNorms(None, "post_feedforward_layernorm"),
}  # fmt: skip
_OLMO: dict[str, Any] = {
    **_NORMS_AFTER, "qk_norm": "whole", "norm_rounds_once": True, "rotary_fp32": True, "biases": _ATTENTION_BIAS,
}  # fmt: skip
_GLM: dict[str, Any] = {"gate_up": ("gate_up_proj",), "rotary": "pairs", "biases": {"qkv": "attention_bias"}}
_ALL_BIASES = {**_ATTENTION_BIAS, "gate_up": "mlp_bias", "down": "mlp_bias"}
_EXPERTS = "mlp.experts"
_DELTA_NET = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
_OWN_WINDOW, _CONFIG_WINDOW = "self_attn.sliding_window", "self_attn.config.sliding_window"

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", biases=_ALL_BIASES),
    "mistral": Family("Mistral", window=_CONFIG_WINDOW, defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": Family("Qwen2", window=_OWN_WINDOW, biases={"qkv": True}, defaults={"num_key_value_heads": 32}),
    "qwen3": Family("Qwen3", window=_OWN_WINDOW, qk_norm="head", biases=_ATTENTION_BIAS, defaults={
        "num_key_value_heads": 32, "head_dim": 128}),
    "qwen2_vl": Family("Qwen2VL", window=_OWN_WINDOW, biases={"qkv": True}, defaults={"num_key_value_heads": 8}),
    "qwen2_5_vl": Family("Qwen2_5_VL", window=_OWN_WINDOW, biases={"qkv": True}, defaults={"num_key_value_heads": 8}),
    "qwen3_vl": Family("Qwen3VLText", qk_norm="head", biases=_ATTENTION_BIAS, defaults={
        "num_key_value_heads": 32, "head_dim": 128}),
    "gemma": Family("Gemma", norm_offset=1.0, biases=_ATTENTION_BIAS, defaults={
        "head_dim": 256, "tie_word_embeddings": True, "num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"}),
    "gemma2": Family("Gemma2", window=_OWN_WINDOW, **_GEMMA, defaults=_GEMMA2_DEFAULTS),
    "vaultgemma": Family("VaultGemma", mlp=HalfNorms("pre_feedforward_layernorm"), norm_offset=1.0, window=_OWN_WINDOW,
                         biases=_ATTENTION_BIAS, defaults=_GEMMA2_DEFAULTS),
    "gemma3": Family("Gemma3", window=_OWN_WINDOW, qk_norm="head", rotary_tables=2, **_GEMMA, defaults={
        "head_dim": 256, "tie_word_embeddings": True, "vocab_size": 262_208, "num_attention_heads": 8,
        "num_key_value_heads": 4, "sliding_window": 4096}),
    "gemma4": Family("Gemma4Text", **_GEMMA4, lacks=("enable_moe_block",), tail_norm="post_per_layer_input_norm",
                     tail={INPUT_GATE: ("per_layer_input_gate",), INPUT_PROJECTION: ("per_layer_projection",)},
                     tail_width="hidden_size_per_layer_input", outside=("per_layer_model_projection",), defaults={
                         **_GEMMA4_DEFAULTS, "sliding_window": 512, "hidden_size_per_layer_input": 256,
                         "vocab_size_per_layer_input": 262_144}),
    "gemma4_unified": Family("Gemma4UnifiedText", **_GEMMA4, defaults={**_GEMMA4_DEFAULTS, "sliding_window": 1024}),
    "smollm3": Family("SmolLM3", window=_OWN_WINDOW, rotates="self_attn.use_rope", biases=_ALL_BIASES, defaults={
        "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "granite": Family("Granite", multiplier="residual_multiplier", biases=_ALL_BIASES),
    "olmo2": Family("Olmo2", **_OLMO),
    "olmo3": Family("Olmo3", **_OLMO, window=_OWN_WINDOW, rotary_tables=2, defaults={"sliding_window": 4096}),
    "phi3": Family("Phi3", qkv=("qkv_proj",), gate_up=("gate_up_proj",), window=_CONFIG_WINDOW,
                   no_dropout=("attention_dropout", "resid_pdrop")),
    "ministral": Family("Ministral", window=_OWN_WINDOW, defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "ministral3": Family("Ministral3", window=_CONFIG_WINDOW, query_scale=True, defaults={
        "num_key_value_heads": 8, "head_dim": 128}),
    "glm": Family("Glm", **_GLM, defaults={"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True}),
    "glm4": Family("Glm4", **_GLM, attention=HalfNorms("input_layernorm", "post_self_attn_layernorm"),
                   mlp=HalfNorms("post_attention_layernorm", "post_mlp_layernorm"), defaults={
                       "num_key_value_heads": 2, "head_dim": 128, "attention_bias": True}),
    "seed_oss": Family("SeedOss", no_dropout=("attention_dropout", "residual_dropout"), biases={
        "qkv": "attention_bias", "o": "attention_out_bias", "gate_up": "mlp_bias", "down": "mlp_bias"}, defaults={
        "num_key_value_heads": 8, "head_dim": 128, "attention_bias": True, "attention_dropout": 0.1,
        "residual_dropout": 0.1}),
    "ernie4_5": Family("Ernie4_5", rotary="pairs", rotary_fp32=True, no_dropout=(),
                       biases=dict.fromkeys(_ALL_BIASES, "use_bias"), defaults={
                           "num_key_value_heads": 2, "head_dim": 128, "tie_word_embeddings": True}),
    "exaone4": Family("Exaone4", **_NORMS_AFTER, qk_norm="head", window=_OWN_WINDOW, slides="self_attn.is_sliding",
                      rotates=WINDOWED, defaults={"num_key_value_heads": 32, "sliding_window": 4096}),
    "helium": Family("Helium", norm_rounds_once=True, rotary="pairs", defaults={"num_key_value_heads": 20, "head_dim": 128},
                     biases={"qkv": "attention_bias", "gate_up": "mlp_bias", "down": "mlp_bias"}),
    "hunyuan_v1_dense": Family("HunYuanDenseV1", qk_norm="head", qk_norms=("query_layernorm", "key_layernorm"),
                               norms_rotated=True, biases=_ATTENTION_BIAS),
    "hyperclovax": Family("HyperCLOVAX", attention=HalfNorms("input_layernorm", "post_norm1"),
                          mlp=HalfNorms("post_attention_layernorm", "post_norm2"), multiplier="residual_multiplier",
                          needs=("use_post_norm",), biases=_ALL_BIASES, defaults={"use_post_norm": True}),
    "cwm": Family("Cwm", window=_OWN_WINDOW, biases={"gate_up": "mlp_bias", "down": "mlp_bias"}, defaults={
        "num_key_value_heads": 8, "head_dim": 128, "sliding_window": 8192}),
    "qwen3_5": Family("Qwen3_5", qk_norm="head", norm_offset=1.0, output_gate=True, mixer="linear_attn", biases=_ATTENTION_BIAS,
                      mixing=_DELTA_NET, defaults={"num_key_value_heads": 4, "head_dim": 256, "vocab_size": 248_320}),
    "qwen3_moe": Family("Qwen3Moe", window=_OWN_WINDOW, qk_norm="head", experts=_EXPERTS, biases=_ATTENTION_BIAS, defaults={
        "num_key_value_heads": 4, "num_local_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}),
    "mixtral": Family("Mixtral", window=_CONFIG_WINDOW, experts=_EXPERTS, lacks=("mlp.jitter_noise",), defaults={
        "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "olmoe": Family("Olmoe", qk_norm="whole", experts=_EXPERTS, lacks=("self_attn.config.clip_qkv",), biases=_ATTENTION_BIAS,
                    defaults={"num_experts": 64, "num_experts_per_tok": 8}),
    "gpt_oss": Family("GptOss", norm_rounds_once=True, window=_OWN_WINDOW, sinks="self_attn.sinks", half_tables=True,
                      experts=_EXPERTS, biases=_ATTENTION_BIAS, defaults={
                          "num_key_value_heads": 8, "head_dim": 64, "attention_bias": True, "sliding_window": 128,
                          "num_local_experts": 128, "num_experts_per_tok": 4}),
    "qwen3_5_moe": Family("Qwen3_5Moe", qk_norm="head", norm_offset=1.0, output_gate=True, mixer="linear_attn", mixing=_DELTA_NET,
                          experts=_EXPERTS, biases=_ATTENTION_BIAS, defaults={
                              "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 248_320, "num_experts": 256,
                              "num_experts_per_tok": 8, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}),
}  # fmt: skip
"""Key -> family. The key is the family's model_type."""
OTHER_TYPES = {
    "gemma3_text": "gemma3", "gemma4_text": "gemma4", "gemma4_unified_text": "gemma4_unified", "internlm3": "llama",
    "iquestcoder": "llama", "qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe",
    "qwen2_vl_text": "qwen2_vl", "qwen2_5_vl_text": "qwen2_5_vl",
    "qwen3_vl_text": "qwen3_vl",
}  # fmt: skip
"""Further model types -> the key of the family whose layers they have."""
OTHER = Family("")
"""Stands for a family whose layers run unfused: the usual names of parts, two norms, no biases."""
WITHOUT_GATE = frozenset(
    {"apertus", "arcee", "biogpt", "gpt_neox", "jais2", "nanochat", "nemotron", "persimmon", "phi", "starcoder2"}
)
"""Types of unfused models whose MLP is one layer up and one down; config.json does not say so."""
