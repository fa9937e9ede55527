"""Build random models of real shapes.

Speed and memory do not depend on the weights, so none has to be downloaded. A shape is what a
published config.json says, as far as it decides speed and memory. `model_type` is llama if it is
left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine.config.trial import ModelConfig
from engine.layers import attention
from engine.layers.library.library_kernels import replace_failing_kernels, use_torch_functions
from engine.layers.swap import SwapReport, fuse_layers
from engine.model.base import Base
from engine.model.route import Route
from engine.quant.bnb import library_linear
from engine.quant.expert_quantizer import place_experts
from engine.quant.frozen_experts import freeze_experts, frozen_experts
from engine.quant.frozen_linear import freeze_linears
from engine.shape.families import FAMILIES, OTHER_TYPES
from engine.vocabulary.host_embedding import place_embeddings

LONGEST = 131072
GRANITE: dict[str, Any] = {
    "model_type": "granite", "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 49159,
    "rope_theta": 10000000.0, "tie_word_embeddings": True, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
}  # fmt: skip
MINISTRAL3: dict[str, Any] = {
    "model_type": "ministral3", "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072,
    "max_position_embeddings": 262144,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0,
                        "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
                        "original_max_position_embeddings": 16384},
}  # fmt: skip
QWEN3: dict[str, Any] = {
    "model_type": "qwen3", "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151936, "rope_theta": 1000000.0,
}  # fmt: skip
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA4: dict[str, Any] = {
    "model_type": "gemma4_text", "head_dim": 256, "global_head_dim": 512, "vocab_size": 262144, "sliding_window": 512,
    "final_logit_softcapping": 30.0, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3_5: dict[str, Any] = {
    "model_type": "qwen3_5_text", "head_dim": 256, "vocab_size": 248320, "max_position_embeddings": 262144,
    "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
    "tie_word_embeddings": True,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True},
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                     "num_key_value_heads": 3, "vocab_size": 49152, "rope_theta": 100000.0, "tie_word_embeddings": True},
    "llama-3.1-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                     "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "tie_word_embeddings": False},
    "llama-3.2-3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
                     "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "tie_word_embeddings": True},
    "llama-3.2-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                     "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "tie_word_embeddings": True},
    "qwen3-4b": {**QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    "qwen3-8b": {**QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
    "smollm3-3b": {"model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
                   "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 128256, "rope_theta": 5000000.0,
                   "no_rope_layer_interval": 4, "tie_word_embeddings": True},
    "granite-3.3-2b": {**GRANITE, "hidden_size": 2048, "intermediate_size": 8192, "attention_multiplier": 0.015625,
                       "logits_scaling": 8.0},
    "granite-3.3-8b": {**GRANITE, "hidden_size": 4096, "intermediate_size": 12800, "attention_multiplier": 0.0078125,
                       "logits_scaling": 16.0},
    "olmo-2-7b": {"model_type": "olmo2", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                  "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 100352, "rope_theta": 500000.0,
                  "max_position_embeddings": 4096},
    "olmo-3-7b": {"model_type": "olmo3", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                  "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 100278, "rope_theta": 500000.0,
                  "max_position_embeddings": 65536, "sliding_window": 4096,
                  "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.2079441541679836,
                                   "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 8192}},
    "phi-3-mini": {"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "rope_theta": 10000.0,
                   "max_position_embeddings": 4096, "sliding_window": 2047},
    "phi-4-mini": {"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
                   "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 200064, "tie_word_embeddings": True,
                   "sliding_window": 262144, "original_max_position_embeddings": 4096,
                   "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
                                       "short_factor": [1.0] * 48, "long_factor": [1.0 + 0.5 * i for i in range(48)],
                                       "original_max_position_embeddings": 4096}},
    "phi-4": {"model_type": "phi3", "hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40,
              "num_attention_heads": 40, "num_key_value_heads": 10, "vocab_size": 100352, "rope_theta": 250000.0,
              "max_position_embeddings": 16384},
    "ministral-8b": {"model_type": "ministral", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072,
                     "rope_theta": 100000000.0, "max_position_embeddings": 32768, "sliding_window": 32768,
                     "layer_types": ["full_attention", *["sliding_attention"] * 3] * 9},
    "ministral-3-3b": {**MINISTRAL3, "hidden_size": 3072, "intermediate_size": 9216, "num_hidden_layers": 26,
                       "tie_word_embeddings": True},
    "ministral-3-8b": {**MINISTRAL3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 34},
    "glm-4-9b": {"model_type": "glm4", "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40,
                 "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 151552,
                 "max_position_embeddings": 32768, "attention_bias": True,
                 "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "exaone-4-1.2b": {"model_type": "exaone4", "hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 30,
                      "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 102400,
                      "tie_word_embeddings": True, "sliding_window": None, "max_position_embeddings": 65536,
                      "layer_types": ["full_attention"] * 30,
                      "rope_parameters": {"rope_type": "llama3", "rope_theta": 1000000.0, "factor": 16.0,
                                          "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                                          "original_max_position_embeddings": 8192}},
    "qwen3.5-0.8b": {**QWEN3_5, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24, "num_attention_heads": 8,
                     "num_key_value_heads": 2, "linear_num_value_heads": 16},
    "qwen3.5-2b": {**QWEN3_5, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_attention_heads": 8,
                   "num_key_value_heads": 2, "linear_num_value_heads": 16},
    "qwen3.5-4b": {**QWEN3_5, "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32, "num_attention_heads": 16,
                   "num_key_value_heads": 4, "linear_num_value_heads": 32},
    "qwen3.5-9b": {**QWEN3_5, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32, "num_attention_heads": 16,
                   "num_key_value_heads": 4, "linear_num_value_heads": 32, "tie_word_embeddings": False},
    "gemma-2-2b": {"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
                   "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000,
                   "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
                   "final_logit_softcapping": 30.0, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192},
    # widths as known without the released files; the rest is transformers' defaults
    "gemma-4-e2b": {**GEMMA4, "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 35, "num_attention_heads": 8,
                    "num_key_value_heads": 1, "num_kv_shared_layers": 20, "use_double_wide_mlp": True,
                    "layer_types": [*[SLIDING] * 4, FULL] * 7},
    "gemma-4-e4b": {**GEMMA4, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 42,
                    "num_attention_heads": 8, "num_key_value_heads": 2, "num_kv_shared_layers": 18,
                    "layer_types": [*[SLIDING] * 5, FULL] * 7},
    "gemma-4-31b": {**GEMMA4, "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 60,
                    "num_attention_heads": 32, "num_key_value_heads": 16, "num_global_key_value_heads": 4,
                    "attention_k_eq_v": True, "sliding_window": 1024, "hidden_size_per_layer_input": 0,
                    "layer_types": [*[SLIDING] * 5, FULL] * 10},
    "gemma-2b": {"model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18,
                 "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 256000},
    "gemma-3-1b": {"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
                   "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144,
                   "sliding_window": 512},
    "qwen2.5-0.5b": {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                     "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "qwen2.5-7b": {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                   "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "rope_theta": 1000000.0,
                   "tie_word_embeddings": False},
    "qwen3-0.6b": {**QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
                   "tie_word_embeddings": True},
    "mistral-7b": {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768, "sliding_window": None},
    "olmo-2-1b": {"model_type": "olmo2", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                  "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 100352},
    "glm-edge-1.5b": {"model_type": "glm", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
                      "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 59264},
    "ernie-4.5-0.3b": {"model_type": "ernie4_5", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 18,
                       "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 103424},
    "helium-2b": {"model_type": "helium", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 28,
                  "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 64000},
    "hunyuan-1.8b": {"model_type": "hunyuan_v1_dense", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 32,
                     "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 120832,
                     "tie_word_embeddings": True},
    # mixtures of experts
    "qwen3-30b-a3b": {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
                      "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
                      "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": 151936,
                      "rope_theta": 1000000.0, "tie_word_embeddings": False},
    "gpt-oss-20b": {"model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
                    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
                    "num_experts_per_tok": 4, "vocab_size": 201088, "sliding_window": 128, "tie_word_embeddings": False},
    # their layers run unfused
    "olmo-1b": {"model_type": "olmo", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 50304, "tie_word_embeddings": True},
    "starcoder2-3b": {"model_type": "starcoder2", "hidden_size": 3072, "intermediate_size": 12288, "num_hidden_layers": 30,
                      "num_attention_heads": 24, "num_key_value_heads": 2, "vocab_size": 49152, "sliding_window": None},
    "aya-expanse-8b": {"model_type": "cohere", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                       "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 256000, "logit_scale": 0.125},
}  # fmt: skip


def random_config(name: str, num_layers: int | None = None) -> Any:
    """Return the shape as a transformers config. num_layers: instead of the shape's own number."""
    from transformers import CONFIG_MAPPING

    special = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    values = {"model_type": "llama", "max_position_embeddings": LONGEST, **special, **SHAPES[name]}
    values["num_hidden_layers"] = num_layers or values["num_hidden_layers"]
    return CONFIG_MAPPING[values.pop("model_type")](**values)


def family_kind(name: str) -> str:
    """Return the shape's key in FAMILIES; its layers run unfused if that has no such key."""
    kind = SHAPES[name].get("model_type", "llama")
    return OTHER_TYPES.get(kind, kind)


def linear_names(name: str) -> list[str]:
    """Return the last parts of the names of all linear layers but the head."""
    family, shape = FAMILIES.get(family_kind(name)), random_config(name).to_dict()
    if family is None or family.experts is not None:  # no description has the names of what runs unfused
        return _names_in_library(name)
    has_tail = family.tail_width is not None and shape[family.tail_width] > 0
    groups = [*family.groups.values(), *(family.tail.values() if has_tail else ()), family.outside if has_tail else ()]
    return [member for members in [*groups, family.mixing] for member in members]


def _names_in_library(name: str) -> list[str]:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(random_config(name))
    head = model.get_output_embeddings()
    linears = (path for path, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head)
    return list(dict.fromkeys(path.rpartition(".")[2] for path in linears))


def random_model(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    attention_name: str,
    num_layers: int | None = None,
    packs_experts: bool = True,
) -> tuple[nn.Module, list[str]]:
    """Return an NF4 model (double quantisation) on bitsandbytes' layers, and the layers' names.

    It is built layer by layer on the device, so no unquantised copy of the whole model exists.
    packs_experts: by our code; otherwise they stay in `dtype`, because bitsandbytes has no form for them.
    """
    from transformers import AutoModelForCausalLM

    config = random_config(name, num_layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention_name).to(dtype)
    head = model.get_output_embeddings()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    if packs_experts:
        place_experts(model, double_quantization=True)
    generator = torch.Generator(device).manual_seed(0)

    def values(shape: torch.Size) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)

    for layer_name in names:
        old = model.get_submodule(layer_name)
        new = library_linear(values(old.weight.shape), dtype)
        if old.bias is not None:
            new.bias = nn.Parameter(torch.zeros(old.bias.shape, dtype=dtype, device=device), requires_grad=False)
        model.set_submodule(layer_name, new)
    for _, experts in frozen_experts(model):
        for key, (number, height, width) in experts.shapes.items():
            stored = (number, width, height) if experts.is_transposed else (number, height, width)
            setattr(experts, key, nn.Parameter(experts.packed(key, values(torch.Size(stored))), requires_grad=False))
    for module in list(model.modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                new = torch.ones(parameter.shape, dtype=dtype, device=device) if parameter.dim() == 1 else values(parameter.shape)
                setattr(module, key, nn.Parameter(new, requires_grad=False))
        for key, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:  # factors: of an embedding its own, of a layer 1
                number = getattr(module, f"scalar_{key}", 1.0)
                setattr(module, key, torch.full(buffer.shape, number, dtype=buffer.dtype, device=device))
    if config.tie_word_embeddings:
        head.weight = model.get_input_embeddings().weight
    with torch.device(device):  # the rotary buffers are computed, not loaded
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    if device.type == "cpu":
        use_torch_functions(model)
    return model.requires_grad_(False), names


def random_base(name: str, device: torch.device, dtype: torch.dtype, fused: bool, num_layers: int | None = None) -> Base:
    """Return the same model as a Base, as `load_base` would, but without a tokenizer.

    num_layers: instead of the shape's own number.
    """
    attention.register()
    model, names = random_model(name, device, dtype, attention.NAME, num_layers)
    freeze_linears(model, skip=[model.get_output_embeddings()])
    names += freeze_experts(model)
    swaps = fuse_layers(model) if fused else SwapReport((), {"all": "asked for unfused"})
    config = ModelConfig(path=name, embeddings="auto" if fused else "device")
    place_embeddings(model, config)
    if device.type == "cuda":
        replace_failing_kernels(model, dtype, device)
    return Base(model, None, config, device, dtype, names, swaps, Route(fused, shares_rows=fused or not _has_state(name)))


def _has_state(name: str) -> bool:
    """Return True if layers of the library carry a state, which runs on across the samples of a row."""
    family = FAMILIES.get(family_kind(name))
    return family is not None and family.mixer is not None
