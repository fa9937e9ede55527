"""Build a tiny model with random weights from a checkpoint's own config.

The tiny model has the classes, layer kinds and options of the large one, in small widths. What goes
wrong in it for reasons of structure goes wrong in the large one too, and it costs a fraction of a
second to find out. It is not a model of sizes, speed or numerical precision.

A width is recognised by its name in the config. `build` raises where the small numbers do not fit
together; then nothing is known.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from engine.layers.library.library_kernels import use_torch_functions

VOCABULARY = 160
HIDDEN, HEADS, HEAD = 64, 4, 16
MAX_LAYERS = 8
MAX_PARAMETERS, MAX_WIDE = 300_000_000, 100_000_000  # the second where widths are kept; parts for images may stay large
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "depth")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "num_global_key_value_heads", "swa_num_key_value_heads",
            "kv_n_heads")  # fmt: skip
# Names of widths in config.json -> their value in the tiny model.
WIDTHS: dict[int, tuple[str, ...]] = {
    VOCABULARY: ("vocab_size", "vocab_size_per_layer_input", "codebook_size",
                 "encoder_hash_byte_group_vocab"),
    HIDDEN: ("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim",
             "lru_width", "dim_model", "input_hidden_size", "embedding_dim", "out_hidden_size", "text_hidden_size"),
    2 * HIDDEN: ("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff", "ffn_hidden_size",
                 "intermediate_size_mlp", "mlp_hidden_dim", "block_ff_dim", "mamba_d_ssm", "dim_ff", "d_inner",
                 "dense_intermediate_size"),
    HIDDEN // 2: ("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size",
                  "shared_intermediate_size", "q_lora_rank", "kv_lora_rank", "expert_ffn_hidden_size", "index_head_dim",
                  "hidden_size_per_layer_input", "laurel_rank", "expert_intermediate_size", "o_lora_rank",
                  "shared_experts_intermediate_size"),
    HEADS: ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads",
            "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "linear_num_value_heads",
            "index_n_heads", "swa_num_attention_heads", "num_linear_heads", "num_query_heads", "linear_num_heads"),
    HEAD: ("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_channels", "global_head_dim", "d_kv",
           "swa_head_dim", "linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "ssm_state_size",
           "state_size", "mamba_dt_rank", "time_step_rank", "attention_head_dim", "rotary_dim", "swa_v_head_dim", "dim_head",
           "head_size", "index_topk", "linear_head_dim"),
    HEADS // 2: ("linear_num_key_heads", "num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k_experts",
                 "moe_top_k", "num_selected_experts"),
    1: ("n_group", "num_expert_group", "topk_group", "first_k_dense_replace", "num_dense_layers", "n_shared_experts",
        "num_nextn_predict_layers"),
}  # fmt: skip
STATE_HEADS = {"mamba_n_heads": 8, "mamba_num_heads": 8, "n_mamba_heads": 8,
               "mamba_d_head": HEAD, "mamba_head_dim": HEAD, "mamba_headdim": HEAD}  # fmt: skip
"""Their product must be the width of the state, whatever it was."""
SMALL = {name: value for value, names in WIDTHS.items() for name in names}
# The heads keep their widths, for configs in which another number depends on them.
WIDE_HIDDEN, WIDE_HEADS = 256, 2
WIDE = {name: {HIDDEN: WIDE_HIDDEN, HEADS: WIDE_HEADS}.get(value, value) for name, value in SMALL.items() if value != HEAD}
WIDE |= {name: HEADS for name in WIDTHS[HEADS] if "expert" in name}
WINDOWS = ("sliding_window", "attention_chunk_size", "local_attention", "attention_window_size", "window_size",
           "sliding_window_size", "keep_window_size", "local_attention_window_len", "rel_extent", "floor_scale",
           "log_scaling_n_floor", "chunk_size", "mamba_chunk_size", "block_size", "index_block_size")  # fmt: skip
"""Numbers of tokens beyond which a model computes something else. The samples must be longer."""
WINDOW = 12
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
POSITION = 48  # a sample is shorter, and a row of two is longer
ORIGINAL = "original_max_position_embeddings"  # a rotation with it also depends on how the two numbers compare
SHARED = "num_kv_shared_layers"  # the last layers, which take keys and values from earlier ones
COMPUTED = ("layers_block_type", "layers_num_experts")  # lists by layer that are no settings, but properties
INDICES = re.compile(r"(layer|attn|attention)\w*(_ids|_idxs?|_indices|_layers)$")  # names of lists of layer numbers


def build(config: Any, make: Callable[[Any], nn.Module], works: Callable[[nn.Module], object], seed: int = 0) -> nn.Module:
    """Return the tiny model in fp32 on the CPU, with large random weights.

    make: config -> model. works: raises if the model cannot compute. Raises the first of these
    errors if no way to shrink the config works.
    """
    first: Exception | None = None
    for shrunk in (shrink, _derived_again, _with_wide_heads, with_few_layers):
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                small = shrunk(config)
                _require_small(small, make, MAX_WIDE if shrunk is with_few_layers else MAX_PARAMETERS)
                model = make(small)
                make_loud(model)
            model = model.float().eval().requires_grad_(False)
            use_torch_functions(model)
            with torch.no_grad():
                works(model)
            return model
        except Exception as error:  # the small numbers need not fit together, and model code may raise anything
            first = first or error
    raise first


def _require_small(config: Any, make: Callable[[Any], nn.Module], most: int) -> None:
    with torch.device("meta"):
        number = sum(p.numel() for p in make(copy.deepcopy(config)).parameters())
    if number > most:
        raise ValueError(f"{number:,} parameters")


def shrink(config: Any) -> Any:
    small = copy.deepcopy(config)
    _shrink(small)
    return small


def _derived_again(config: Any) -> Any:
    """Return small widths, from which the config's own class derives the others."""
    return type(config).from_dict(shrink(config).to_dict())


def _with_wide_heads(config: Any) -> Any:
    """Return small widths with heads as wide as they are."""
    small = copy.deepcopy(config)
    _shrink(small, WIDE)
    return small


def with_few_layers(config: Any) -> Any:
    """Return a copy that keeps its widths."""
    small = copy.deepcopy(config)
    _shrink(small, {})
    return small


def _shrink(config: Any, sizes: dict[str, int] = SMALL) -> None:
    """Give the config a few layers, a small vocabulary, and the widths in `sizes`."""
    chosen, total = _chosen_layers(config)
    given, overrides = dict(vars(config)), _overrides(config)
    if overrides:
        config.per_layer_config = None
    heads, can_shorten = sizes.get("num_attention_heads"), ORIGINAL not in str(given.get("rope_parameters"))
    for name, value in given.items():
        if hasattr(value, "to_dict"):
            _shrink(value, sizes)
        elif len(chosen) < total and _is_by_layer(name, value, total):
            picked = [sizes.get(name, value[i]) if type(value[i]) is int and value[i] > 1 else value[i] for i in chosen]
            setattr(config, name, "".join(picked) if isinstance(value, str) else type(value)(picked))
        elif _are_layer_numbers(name, value, total):
            setattr(config, name, type(value)(chosen.index(i) for i in value if i in chosen))
        elif isinstance(value, dict) and "rope" in name and "head_dim" in sizes:
            setattr(config, name, _rope(value))
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        elif name in LAYER_COUNTS:
            setattr(config, name, len(chosen))
        elif name == SHARED:
            setattr(config, name, len([i for i in chosen if i >= total - value]))
        elif name in WINDOWS and value > 0:
            setattr(config, name, min(value, WINDOW))
        elif name in POSITIONS and can_shorten:
            setattr(config, name, min(value, POSITION))
        elif name.endswith("token_id"):
            setattr(config, name, min(value, VOCABULARY - 1))
        elif SMALL.get(name) == VOCABULARY:
            setattr(config, name, min(value, VOCABULARY))
        elif not sizes:
            continue
        elif name in KV_HEADS:
            as_many = value == given.get("num_attention_heads")
            setattr(config, name, value if value == 1 else heads if as_many else heads // 2)
        elif name in STATE_HEADS and value > 0:
            setattr(config, name, STATE_HEADS[name])
        elif name == "num_heads" and "expand" in given:
            setattr(config, name, given["expand"] * sizes["hidden_size"] // HEAD)
        elif name == "attention_hidden_size" or (name == "attention_head_dim" and "attention_hidden_size" in given):
            ratio = given["attention_hidden_size"] // given["hidden_size"]  # Zamba's attention reads two states side by side
            setattr(config, name, ratio * sizes["hidden_size"] // (1 if name == "attention_hidden_size" else heads))
        elif name in sizes and value > 0:
            setattr(config, name, min(value, sizes[name]))
    if overrides:
        config.per_layer_config = {n: _scaled(overrides.get(i, {}), given, config) for n, i in enumerate(chosen)}


def _overrides(config: Any) -> dict[int, dict[str, Any]]:
    """Return layer number -> the settings in which that layer differs, in a heterogeneous config."""
    if not getattr(config, "is_heterogeneous", False):
        return {}
    return {int(layer): values for layer, values in (config.to_dict().get("per_layer_config") or {}).items()}


def _scaled(override: dict[str, Any], given: dict[str, Any], small: Any) -> dict[str, Any]:
    """Return a layer's own settings, in the same ratio to the small config as before."""
    scaled = {}
    for name, value in override.items():
        before, after = given.get(name), getattr(small, name, None)
        ints = all(type(number) is int and number > 0 for number in (value, before, after))
        scaled[name] = max(1, value * after // before) if ints else value
    return scaled


def layers_alike(config: Any) -> dict[int, list[int]]:
    """Return, for each layer of the tiny model, the layers of the large one that it stands for."""
    text = config.get_text_config()
    kinds, (chosen, _) = _layer_kinds(text), _chosen_layers(text)
    return {small: [i for i, kind in enumerate(kinds) if kind == kinds[large]] for small, large in enumerate(chosen)}


def _chosen_layers(config: Any) -> tuple[list[int], int]:
    """Return the layers to keep, two of each kind if there is room, and their number before.

    Where only the config's class knows a kind, from the number of the layer, the first layers are
    kept, up to the last kind.
    """
    kinds, settings = _layer_kinds(config), _layer_kinds(config, computed=())
    if len(set(kinds)) > len(set(settings)) and (last := max(map(kinds.index, kinds))) < MAX_LAYERS:
        return list(range(last + 1)), len(kinds)
    return _chosen(kinds), len(kinds)


def _chosen(kinds: list[str]) -> list[int]:
    firsts = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    seconds = [i for i, kind in enumerate(kinds) if kinds[:i].count(kind) == 1]
    return sorted([*firsts, *seconds[: max(0, MAX_LAYERS - len(firsts))]])


def _layer_kinds(config: Any, computed: tuple[str, ...] = COMPUTED) -> list[str]:
    """Return a text for each layer that is equal for layers with equal settings. computed: properties to read too."""
    counts = [getattr(config, name) for name in LAYER_COUNTS if isinstance(getattr(config, name, None), int)]
    total = counts[0] if counts else 0
    given = vars(config)
    by_layer = [value for name, value in given.items() if _is_by_layer(name, value, total)]
    lists = [getattr(config, name, None) for name in computed if name not in given]
    by_layer += [value for value in lists if isinstance(value, list | tuple) and len(value) == total]
    numbers = [value for name, value in given.items() if _are_layer_numbers(name, value, total)]
    shared, own = total - (given.get(SHARED) or 0), _overrides(config)
    return [repr([[v[i] for v in by_layer], [i in v for v in numbers], i >= shared, own.get(i)]) for i in range(total)]


def _is_by_layer(name: str, value: Any, total: int) -> bool:
    """Return True for a list with an entry for each layer, or a text such as `M-M*`."""
    sized = isinstance(value, list | tuple) or (isinstance(value, str) and "pattern" in name)
    return sized and len(value) == total


def _are_layer_numbers(name: str, value: Any, total: int) -> bool:
    if not isinstance(value, list | tuple) or not value or len(value) == total or not INDICES.search(name):
        return False
    return all(type(i) is int and 0 <= i < total for i in value) and len(set(value)) == len(value)


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
def make_loud(model: nn.Module) -> None:
    """Draw weights so large that each part of the model shows in the loss.

    A fresh model predicts nearly the same for every input, whatever its attention does. Buffers that
    a checkpoint holds, such as a router's corrections, are moved too.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and "embed" not in name:
            parameter.normal_(std=1.2 * parameter.shape[-1] ** -0.5)
        elif parameter.dim() >= 2:
            parameter.normal_(std=0.3)
        else:
            parameter.add_(0.2 * torch.randn_like(parameter))
    stored = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point():
            noise = 0.2 * torch.randn_like(buffer)
            buffer.copy_(buffer * noise.exp() if buffer.any() else noise)
