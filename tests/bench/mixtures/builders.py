"""Build a mixture of experts, and the step that trains it, by each library's own documented interface.

A builder loads the model once; `prepare` returns the step (host batch -> loss), the trained
parameters and what follows the optimizer's step, as in `engine.bench.systems`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.bench.rows import Setting
from engine.bench.shapes import SHAPES, family_kind, random_model
from engine.bench.systems import SYSTEMS, Prepared, library_step
from engine.model.device import pick_dtype
from tests.bench.mixtures.job import ATTENTION, FUSED_NAME, MLP, OURS, PEFT, UNSLOTH

GPT_OSS, QWEN3_MOE = "gpt_oss", "qwen3_moe"
PARAMETERS = tuple(f"mlp.experts.{name}" for name in (FUSED_NAME, "down_proj"))


def mixtures() -> list[str]:
    """Return the shapes that this benchmark knows: of gpt-oss and of Qwen3-MoE."""
    return [name for name in SHAPES if family_kind(name) in (GPT_OSS, QWEN3_MOE)]


def shape_with(model: str, layers: int) -> str:
    """Return the name of the model's shape with this number of layers, which SHAPES knows from now on."""
    name = f"{model}, {layers} layers"
    SHAPES[name] = {**SHAPES[model], "num_hidden_layers": layers}
    return name


class _PeftMixture:
    """Train PEFT's adapters on attention and, by `target_parameters`, on all experts.

    bitsandbytes has no form for experts that are one weight, so they stay in 16 bits.
    """

    def __init__(self, setting: Setting, device: torch.device) -> None:
        self._device = device
        attention = "eager" if family_kind(setting.model) == GPT_OSS else "sdpa"  # attention with sinks
        dtype = pick_dtype("auto", device)
        self._model, _ = random_model(setting.model, device, dtype, attention, packs_experts=False)
        self._model.is_loaded_in_4bit, self._model.config.use_cache = True, False

    def prepare(self, setting: Setting) -> Prepared:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(self._model, gradient_checkpointing_kwargs={"use_reentrant": False})
        lora = LoraConfig(
            r=setting.rank, lora_alpha=2 * setting.rank, lora_dropout=0.0, target_modules=list(ATTENTION),
            target_parameters=list(PARAMETERS), task_type="CAUSAL_LM",
        )  # fmt: skip
        return library_step(get_peft_model(model, lora).train(), setting, self._device)


class _UnslothMixture:
    """Train with Unsloth as its notebooks for mixtures do. It must be imported before transformers and peft."""

    def __init__(self, setting: Setting, device: torch.device, folder: Path | None) -> None:
        from unsloth import FastLanguageModel

        self._device = device
        self._model, _ = FastLanguageModel.from_pretrained(
            model_name=str(folder), dtype=torch.bfloat16, max_seq_length=setting.length, load_in_4bit=True,
            full_finetuning=False,
        )  # fmt: skip

    def prepare(self, setting: Setting) -> Prepared:
        from unsloth import FastLanguageModel

        fused = [FUSED_NAME] if family_kind(setting.model) == QWEN3_MOE else []
        model = FastLanguageModel.get_peft_model(
            self._model, r=setting.rank, target_modules=[*ATTENTION, *MLP, *fused], lora_alpha=2 * setting.rank,
            lora_dropout=0, bias="none", use_gradient_checkpointing="unsloth", random_state=3407,
        )  # fmt: skip
        FastLanguageModel.for_training(model)
        return library_step(model, setting, self._device)


NEEDED: dict[str, tuple[str, ...]] = {OURS: (), UNSLOTH: ("unsloth",), PEFT: ("peft",)}
"""System -> the packages that its builder imports."""
Build = Callable[[Setting, torch.device, Path | None], Any]
BUILDERS: dict[str, Build] = {
    OURS: SYSTEMS["ours"].build,
    UNSLOTH: _UnslothMixture,
    PEFT: lambda setting, device, _: _PeftMixture(setting, device),
}
"""System -> (a setting of the model, device, the folder that Unsloth reads) -> builder."""
