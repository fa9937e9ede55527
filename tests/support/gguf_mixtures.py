"""Make tiny mixtures of the families that llama.cpp knows, and run llama.cpp on GGUF files of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.support.export_models import SIZES, tokenizer

YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 16,
        "rope_theta": 150000.0, "truncate": True}  # fmt: skip
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3moe": ("Qwen3Moe", {"head_dim": 32, "moe_intermediate_size": 48, "num_experts": 6, "norm_topk_prob": True}),
    "olmoe": ("Olmoe", {"num_key_value_heads": 4, "num_experts": 6}),
    "llama": ("Mixtral", {"num_local_experts": 6, "tie_word_embeddings": True}),
    "gpt-oss": ("GptOss", {"head_dim": 32, "num_local_experts": 6, "sliding_window": 8, "rope_parameters": YARN}),
}
"""llama.cpp's name of the architecture -> class and config of the model."""
TOKEN = 32  # its bytes are a whole character, so the answer has its text


def save_mixture(name: str, folder: Path, **saved: Any) -> Any:
    """Save a random mixture in 32 bits with a tokenizer, and return it. saved: options of save_pretrained."""
    import transformers

    kind, more = MIXTURES[name]
    torch.manual_seed(0)
    values = {**SIZES, "intermediate_size": 96, "num_experts_per_tok": 2, "initializer_range": 0.15, **more}
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**values)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1 or key.endswith("bias"):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.save_pretrained(folder, **saved)
    tokenizer().save_pretrained(folder)
    return model


def llama_cpp_logprobs(model: Path, ids: list[int], lora: Path | None = None) -> torch.Tensor:
    """Return llama.cpp's log-probabilities of the token after `ids`, with keys and values cached in fp32."""
    import xllamacpp

    given = xllamacpp.CommonParams()
    given.model.path, given.n_ctx, given.n_gpu_layers, given.warmup = str(model), 256, 0, False
    given.cpuparams.n_threads = 1
    given.cache_type_k = given.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    given.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if lora is not None:
        given.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    asked = {"prompt": ids, "max_tokens": 1, "logprobs": SIZES["vocab_size"], "logit_bias": [[TOKEN, 1000.0]]}
    answer = xllamacpp.Server(given).handle_completions(asked)
    answer = json.loads(answer) if isinstance(answer, str) else answer
    found = torch.full((SIZES["vocab_size"],), -torch.inf)
    for one in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[one["id"]] = one["logprob"]
    return found
