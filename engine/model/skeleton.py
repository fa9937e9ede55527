"""Build a tiny model with random weights from a checkpoint's own config.

The tiny model has the classes, layer kinds and options of the large one, in small widths. What goes
wrong in it for reasons of structure goes wrong in the large one too, and it costs a fraction of a
second to find out. It is not a model of sizes, speed or numerical precision.

A width is recognised by its name in the config. `build` raises where the small numbers do not fit
together; then nothing is known.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

VOCABULARY = 160
HIDDEN, HEADS, HEAD = 64, 4, 16
MAX_LAYERS = 8
MAX_KEPT_WIDTH = 1024
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "depth")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "num_global_key_value_heads", "swa_num_key_value_heads")
# Names of widths in config.json -> their value in the tiny model.
WIDTHS: dict[int, tuple[str, ...]] = {
    VOCABULARY: ("vocab_size", "vocab_size_per_layer_input", "codebook_size"),
    HIDDEN: ("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim", "attention_hidden_size",
             "lru_width", "dim_model", "input_hidden_size", "embedding_dim"),
    2 * HIDDEN: ("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff", "ffn_hidden_size",
                 "intermediate_size_mlp", "mlp_hidden_dim", "block_ff_dim", "mamba_d_ssm", "dim_ff", "d_inner",
                 "dense_intermediate_size"),
    HIDDEN // 2: ("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size",
                  "shared_intermediate_size", "q_lora_rank", "kv_lora_rank", "expert_ffn_hidden_size", "index_head_dim",
                  "hidden_size_per_layer_input", "laurel_rank", "expert_intermediate_size", "o_lora_rank"),
    HEADS: ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads",
            "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "linear_num_value_heads",
            "index_n_heads", "swa_num_attention_heads", "num_linear_heads", "num_query_heads"),
    HEAD: ("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_channels", "global_head_dim", "d_kv",
           "swa_head_dim", "linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "ssm_state_size",
           "state_size", "mamba_dt_rank", "time_step_rank", "attention_head_dim", "rotary_dim", "swa_v_head_dim", "dim_head",
           "head_size", "index_topk"),
    HEADS // 2: ("linear_num_key_heads", "num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k_experts",
                 "moe_top_k", "num_selected_experts"),
    1: ("n_group", "topk_group", "first_k_dense_replace", "num_dense_layers", "n_shared_experts", "num_nextn_predict_layers"),
}  # fmt: skip
STATE_HEADS = {"mamba_n_heads": 8, "mamba_num_heads": 8, "mamba_d_head": HEAD, "mamba_head_dim": HEAD}
"""Their product must be the width of the state, whatever it was."""
SMALL = {name: value for value, names in WIDTHS.items() for name in names}
WINDOWS = ("sliding_window", "attention_chunk_size", "local_attention", "attention_window_size", "window_size")
WINDOW = 12


def build(config: Any, make: Callable[[Any], nn.Module], works: Callable[[nn.Module], object], seed: int = 0) -> nn.Module:
    """Return the tiny model in fp32 on the CPU, with large random weights.

    make: config -> model. works: raises if the model cannot compute. Raises the first of these
    errors if no way to shrink the config works.
    """
    first: Exception | None = None
    for shrunk in (_with_small_widths, _derived_again, _with_few_layers):
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = make(shrunk(config))
                _make_loud(model)
            model = model.float().eval().requires_grad_(False)
            with torch.no_grad():
                works(model)
            return model
        except Exception as error:  # the small numbers need not fit together, and model code may raise anything
            first = first or error
    raise first


def _with_small_widths(config: Any) -> Any:
    small = copy.deepcopy(config)
    _shrink(small)
    return small


def _derived_again(config: Any) -> Any:
    """Return small widths, from which the config's own class derives the others."""
    return type(config).from_dict(_with_small_widths(config).to_dict())


def _with_few_layers(config: Any) -> Any:
    """Return a copy that keeps its widths, if that is no large model."""
    small = copy.deepcopy(config)
    _shrink(small, widths=False)
    text = small.get_text_config()
    if (text.hidden_size or 0) > MAX_KEPT_WIDTH:
        raise ValueError(f"hidden_size above {MAX_KEPT_WIDTH}")
    return small


def _shrink(config: Any, widths: bool = True) -> None:
    chosen, total = _chosen_layers(config)
    given = dict(vars(config))
    for name, value in given.items():
        if hasattr(value, "to_dict"):
            _shrink(value, widths)
        elif isinstance(value, list | tuple | str) and total > MAX_LAYERS // 2 and len(value) == total:
            picked = [value[i] for i in chosen]
            setattr(config, name, "".join(picked) if isinstance(value, str) else type(value)(picked))
        elif isinstance(value, dict) and "rope" in name and widths:
            setattr(config, name, _rope(value))
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        elif name in LAYER_COUNTS:
            setattr(config, name, len(chosen))
        elif name in WINDOWS and value > 0:
            setattr(config, name, min(value, WINDOW))
        elif name.endswith("token_id"):
            setattr(config, name, min(value, VOCABULARY - 1))
        elif not widths and SMALL.get(name) != VOCABULARY:
            continue
        elif name in KV_HEADS:
            as_many = value == given.get("num_attention_heads")
            setattr(config, name, value if value == 1 else HEADS if as_many else HEADS // 2)
        elif name in STATE_HEADS and value > 0:
            setattr(config, name, STATE_HEADS[name])
        elif name == "num_heads" and "expand" in given:
            setattr(config, name, given["expand"] * HIDDEN // HEAD)
        elif name in SMALL and value > 0:
            setattr(config, name, min(value, SMALL[name]))


def _chosen_layers(config: Any) -> tuple[list[int], int]:
    """Return the layers to keep, two of each kind and at most MAX_LAYERS, and their number before."""
    counts = [getattr(config, name) for name in LAYER_COUNTS if isinstance(getattr(config, name, None), int)]
    total = counts[0] if counts else 0
    kinds = [value for value in vars(config).values() if isinstance(value, list | tuple | str) and len(value) == total]
    seen: dict[str, int] = {}
    chosen = []
    for i in range(total):
        kind = repr([value[i] for value in kinds])
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] <= 2 and len(chosen) < MAX_LAYERS:
            chosen.append(i)
    return chosen, total


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    """Return rope settings whose lists fit the small head."""
    small = {key: _rope(part) if isinstance(part, dict) else part for key, part in value.items()}
    rotated = int(HEAD * small.get("partial_rotary_factor", 1.0) or HEAD)
    for key in ("short_factor", "long_factor"):
        if isinstance(small.get(key), list):
            small[key] = small[key][: rotated // 2]
    if isinstance(small.get("mrope_section"), list):
        third = rotated // 2 // 3
        small["mrope_section"] = [rotated // 2 - 2 * third, third, third]
    return small


@torch.no_grad()
def _make_loud(model: nn.Module) -> None:
    """Draw weights so large that each part of the model shows in the loss.

    A fresh model predicts nearly the same for every input, whatever its attention does.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and "embed" not in name:
            parameter.normal_(std=1.2 * parameter.shape[-1] ** -0.5)
        elif parameter.dim() >= 2:
            parameter.normal_(std=0.3)
        else:
            parameter.add_(0.2 * torch.randn_like(parameter))
