"""Build tiny models of each family with and without fused layers, and compare what they compute."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from engine.adapter.lora import attach, trainable_parameters
from engine.config.trial import LoraConfig
from engine.data.packing import Batch, Sample, collate
from engine.layers import attention
from engine.layers.library.library_kernels import use_torch_functions
from engine.layers.swap import SwapReport, cache_weights, fuse_layers, set_policy
from engine.quant.frozen_experts import FrozenExperts, freeze_experts, packable_experts
from engine.quant.frozen_linear import freeze_linears
from engine.shape.policies import Policy

SMALL = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 5},
    "Qwen2": {},
    "Qwen3": {},
    "Qwen2VLText": {"hidden_size": 64, "rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}},
    "Qwen2_5_VLText": {"hidden_size": 64, "rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}, "use_sliding_window": True,
                       "sliding_window": 5, "max_window_layers": 1},
    "Qwen3VLText": {"rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}},
    "VaultGemma": {"sliding_window": 5, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 3.0},
    "Gemma2": {"sliding_window": 5, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 3.0},
    "Gemma3Text": {"sliding_window": 5, "query_pre_attn_scalar": 16},
    "Gemma4Text": {"sliding_window": 5, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "use_double_wide_mlp": True,
                   "layer_types": MIXED[:2] * 2, "global_head_dim": 32, "num_key_value_heads": 1,
                   "hidden_size_per_layer_input": 24, "vocab_size_per_layer_input": 97},
    "Gemma4Text with k = v": {"sliding_window": 5, "layer_types": MIXED[:2] + MIXED[1:2], "global_head_dim": 32,
                              "attention_k_eq_v": True, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0},
    "Gemma4UnifiedText": {"sliding_window": 5, "layer_types": MIXED[:2] + MIXED[1:2], "global_head_dim": 32,
                          "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "SmolLM3": {"no_rope_layers": [1, 0, 1]},
    "Granite": {"residual_multiplier": 0.22, "attention_multiplier": 0.1, "embedding_multiplier": 12.0, "logits_scaling": 8.0,
                "attention_bias": True, "mlp_bias": True},
    "Olmo2": {},
    "Olmo3": {"sliding_window": 5, "layer_types": MIXED},
    "Phi3": {"sliding_window": 5, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.75}},
    "Ministral": {"sliding_window": 5, "layer_types": MIXED},
    "Ministral3": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0,
                                       "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3,
                                       "original_max_position_embeddings": 4}},
    "Glm": {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
    "Glm4": {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
    "SeedOss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "Ernie4_5": {"use_bias": True},
    "Exaone4": {"sliding_window": 5, "layer_types": MIXED},
    "Helium": {"hidden_size": 64},
    "Gemma": {},
    "HunYuanDenseV1": {},
    "HyperCLOVAX": {"residual_multiplier": 0.3, "attention_multiplier": 0.1},
    "Cwm": {"sliding_window": 5, "layer_types": MIXED, "rope_parameters": ROPE},
    "Qwen3_5Text": {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_key_heads": 2,
                    "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 8,
                    "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}},
}  # fmt: skip
MIXTURE = {"hidden_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FEW = {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
MIXTURES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {**MIXTURE, "sliding_window": None, "norm_topk_prob": True, "decoder_sparse_step": 2},
    "Mixtral": {**FEW, "sliding_window": 5},
    "Olmoe": {**MIXTURE, "intermediate_size": 64},
    "GptOss": {**FEW, "sliding_window": 5, "layer_types": MIXED, "rope_parameters": {
        **ROPE, "rope_type": "yarn", "factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 64}},
    "Qwen3_5MoeText": {**MIXTURE, **FAMILIES["Qwen3_5Text"], "shared_expert_intermediate_size": 64},
}  # fmt: skip
"""Families with a mixture of experts in the MLP's place."""
HYBRIDS = ("Qwen3_5Text",)
"""Families with layers whose token mixer is the library's own."""


class TextPart(nn.Module):
    """Hold the text decoder of a model that exists for images only, with a head."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.model = getattr(transformers, type(config).__name__.replace("Config", "Model"))(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def get_decoder(self) -> nn.Module:
        return self.model

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def build(
    family: str, layers: str = "original", dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, list[str], SwapReport | None]:
    """Build a tiny random model of the family, with norm weights and biases not neutral."""
    attention.register()
    kind = family.partition(" ")[0]
    name = kind.removesuffix("Text")
    values = {**SMALL, **(FAMILIES | MIXTURES)[family]}
    config = getattr(transformers, f"{kind}Config")(**values, attn_implementation=attention.NAME)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM", TextPart)(config).float()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or parameter_name.endswith("bias"):
            parameter.data += 0.3 * torch.randn_like(parameter)
        if name.startswith("Gemma4") and parameter_name.endswith("q_norm.weight"):
            parameter.data *= 0.15  # the scores are not scaled, so sharp attention would amplify fp32 rounding
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("layer_scalar"):
            buffer += 0.3 * torch.randn_like(buffer)
    model.to(dtype).requires_grad_(False)
    use_torch_functions(model)
    for path, experts in packable_experts(model).items():
        model.set_submodule(path, FrozenExperts.of(experts, double_quantization=False))
    names = freeze_linears(model, skip=[model.get_output_embeddings()]) + freeze_experts(model)
    report = fuse_layers(model) if layers == "fused" else None
    return model, names, report


def batch(lengths: tuple[int, ...] = (11, 1, 18)) -> Batch:
    random = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 97, (n,), generator=random).numpy() for n in lengths]
    return collate([Sample(i, i > 0) for i in ids])


def hidden_states(model: nn.Module, row: Batch, alone: bool = False) -> Tensor:
    """Return the decoder's hidden states [1, T, D]; `alone` computes each sample by itself."""
    if alone:
        parts = (collate([Sample(ids.numpy(), ids.numpy() > 0)]) for ids in row.input_ids_T.split(row.document_lengths))
        return torch.cat([hidden_states(model, part) for part in parts], dim=1)
    return model.get_decoder()(
        input_ids=row.input_ids_T[None], position_ids=row.position_ids_T[None], use_cache=False,
        document_lengths=row.document_lengths, document_offsets=row.document_offsets,
    ).last_hidden_state  # fmt: skip


def run(
    model: nn.Module, names: list[str], lora: LoraConfig, policy: Policy = Policy.KEEP, seed: int = 0, cached: int = 0,
    alone: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Return (hidden states, gradients) of one pass with a random cotangent, each sample `alone` or in one row."""
    layers = attach(model, names, lora, 3)
    random = torch.Generator().manual_seed(2)
    for layer in layers.values():
        layer.lora_b.data.normal_(0, 0.2, generator=random)
    set_policy(model, policy)
    cache_weights(model, torch.float32, cached)
    model.train()
    torch.manual_seed(seed)
    hidden = hidden_states(model, batch(), alone)
    cotangent = torch.randn(hidden.shape, generator=random).to(hidden.dtype)
    gradients = torch.autograd.grad((hidden * cotangent).sum(), trainable_parameters(layers))
    return [hidden.detach(), *gradients]


def worst(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Return the largest difference of two tensors relative to the second one."""
    assert len(ours) == len(theirs)
    return max(float((a - b).norm() / b.norm().clamp_min(1e-6)) for a, b in zip(ours, theirs))
