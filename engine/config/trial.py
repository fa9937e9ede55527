"""The frozen, validated description of one trial: everything `python -m engine` needs to reproduce it. No torch.

`TrainConfig` is plain data. Unknown keys are refused with the known ones listed, and every error is one `InputError` line.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from engine.config.parsing import Fraction, ListAsTuple, PositiveInt, StrictModel, load_json, parse
from engine.errors import InputError

ALL_LINEAR = "all-linear"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
ON_TRAINING_SAMPLES = "train"  # as data.eval
PROFILE_AFTER = 2  # optimizer steps: the first ones compile kernels, record graphs and fill caches
Auto = Literal["auto"]
BOOL_POLICIES = {"keep": False, "recompute": True}
"""Policies whose name files write as true or false, in train.activation_checkpointing."""
PolicyAsBool = BeforeValidator(lambda value: BOOL_POLICIES.get(value, value) if isinstance(value, str) else value)


class ModelConfig(StrictModel):
    """Base model and how its frozen weights are held."""

    path: str = Field(min_length=1, description="Hugging Face folder, hub id, or builtin:<name>")
    revision: str | None = None
    quantization: Literal["nf4", "none"] = "nf4"
    double_quantization: bool = True
    dtype: Literal["auto", "bfloat16", "float32"] = Field("auto", description="auto: bfloat16 on CUDA, float32 on CPU")
    layers: Literal["auto", "strict", "original"] = Field(
        "auto", description="fused where known; strict: or an error; original: never"
    )
    embeddings: Literal["auto", "device", "host"] = Field(
        "auto", description="host: the input embedding stays in pinned host memory; auto: so on CUDA, if large and not tied"
    )
    trust_remote_code: bool = False


class DataConfig(StrictModel):
    """Training samples and the one fixed evaluation set that all trials share."""

    train: str = Field(min_length=1, description="JSONL/JSON/Parquet file, hub id, or builtin:<name>")
    train_split: str = "train"
    train_max_samples: PositiveInt | None = Field(None, description="so many of them, chosen by content; none: all")
    eval: str | None = Field(
        None, description="like train; none: hold out eval_fraction of train; train: the training samples themselves"
    )
    eval_split: str = "train"
    eval_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    eval_max_samples: PositiveInt = 256
    eval_max_seq_length: Annotated[int, Field(ge=8)] = 2048
    format: Literal["auto", "messages", "prompt_completion", "text", "alpaca"] = "auto"
    chat_template: str | None = Field(None, description="none: the tokenizer's own; chatml; or a .jinja file")
    max_seq_length: Annotated[int, Field(ge=8)] = 2048
    packing: bool = True


class LoraConfig(StrictModel):
    """The adapter: y = W x + scaling * B A dropout(x) on each target module (Hu et al., arXiv:2106.09685)."""

    rank: PositiveInt = 16
    lora_alpha: Annotated[float, Field(gt=0.0)] | None = Field(None, description="none: 2 * rank")
    lora_dropout: Fraction = 0.0
    target_modules: Annotated[str | tuple[str, ...], ListAsTuple] = ALL_LINEAR
    use_rslora: bool = False

    @model_validator(mode="after")
    def _targets_not_empty(self) -> LoraConfig:
        if not self.target_modules or (not isinstance(self.target_modules, str) and not all(self.target_modules)):
            raise ValueError("target_modules must name at least one module, or be 'all-linear'")
        return self

    @property
    def alpha(self) -> float:
        """lora_alpha, resolved: 2 * rank where none was given."""
        return 2.0 * self.rank if self.lora_alpha is None else self.lora_alpha

    @property
    def scaling(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA (Kalajdzievski, arXiv:2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class OptimConfig(StrictModel):
    """AdamW and the learning-rate schedule; the schedule runs over tokens seen, not steps."""

    name: Literal["auto", "adamw", "adamw_8bit"] = Field("auto", description="auto: adamw_8bit on CUDA, adamw on CPU")
    learning_rate: Annotated[float, Field(gt=0.0)] = 2e-4
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_ratio: Fraction = 0.03
    min_lr_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    max_grad_norm: Annotated[float, Field(gt=0.0)] | None = 1.0


class LoopConfig(StrictModel):
    """How long to train, in which portions, and when to report. Tokens seen = tokens fed forward, prompts included."""

    max_tokens: PositiveInt
    report_at_tokens: Annotated[tuple[PositiveInt, ...] | None, ListAsTuple] = Field(
        None, description="ascending grid below max_tokens"
    )
    num_reports: PositiveInt = Field(8, description="even grid, where report_at_tokens is not given")
    micro_batch_size: PositiveInt | Auto = Field("auto", description="bins computed at once; changes speed and memory only")
    gradient_accumulation_steps: PositiveInt = Field(1, description="micro-batches in a step, where tokens_per_step is not given")
    tokens_per_step: PositiveInt | None = Field(None, description="one optimizer step, the same for all lengths")
    activation_checkpointing: Annotated[bool | Literal["auto", "selective", "offload"], PolicyAsBool] = Field(
        "auto",
        description="true: compute each layer again in the backward pass, offload: from inputs in host memory, "
        "selective: its MLP only; false: keep; auto: what fits and is fastest",
    )
    keep_layers: Annotated[int, Field(ge=0)] | Auto = Field(
        "auto", description="so many last layers keep activations whatever activation_checkpointing says"
    )
    host_layers: Annotated[int, Field(ge=0)] | Auto = Field(
        "auto", description="so many of the other layers keep activations in pinned host memory, spread evenly"
    )
    weight_cache_gib: Annotated[float, Field(ge=0.0)] | Auto = Field("auto", description="device memory for dequantised weights")
    cuda_graphs: bool | Auto = Field(
        "auto", description="replay recorded launches; not with dropout or host memory. auto: where the host would be too slow"
    )
    memory_budget_gib: Annotated[float, Field(gt=0.0)] | None = Field(None, description="device memory to use; none: the card's")
    profile_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="so many optimizer steps, after the first two, are traced into profile/ of the trial's folder"
    )
    seed: Annotated[int, Field(ge=0)] = 0
    device: Literal["auto", "cuda", "cpu"] = "auto"

    @model_validator(mode="after")
    def _grid_ascends(self) -> LoopConfig:
        grid = self.report_at_tokens or ()
        if any(a >= b for a, b in itertools.pairwise(grid)) or (grid and grid[-1] > self.max_tokens):
            raise ValueError(f"report_at_tokens must ascend and end at or below max_tokens = {self.max_tokens}")
        if self.num_reports > self.max_tokens:
            raise ValueError(f"num_reports must not exceed max_tokens = {self.max_tokens}")
        return self

    def report_grid(self) -> tuple[int, ...]:
        """Tokens seen at which a trial reports; the last entry is max_tokens. Rung i is entry i - 1."""
        if self.report_at_tokens is None:
            return tuple(self.max_tokens * (i + 1) // self.num_reports for i in range(self.num_reports))
        grid = self.report_at_tokens
        return grid if grid[-1:] == (self.max_tokens,) else (*grid, self.max_tokens)


NUMERICALLY_NEUTRAL = {
    "model": ("embeddings",),
    "train": (
        "micro_batch_size", "gradient_accumulation_steps", "tokens_per_step", "activation_checkpointing", "keep_layers",
        "host_layers", "weight_cache_gib", "cuda_graphs", "memory_budget_gib", "profile_steps",
    ),
}  # fmt: skip
"""Fields that change speed and memory but not what is computed, beyond rounding; of the step's size, `bins_per_step` remains."""


class TrainConfig(StrictModel):
    """One trial, whole."""

    model: ModelConfig
    data: DataConfig
    lora: LoraConfig = LoraConfig()
    optim: OptimConfig = OptimConfig()
    train: LoopConfig

    @model_validator(mode="after")
    def _graphs_are_possible(self) -> TrainConfig:
        loop = self.train
        if loop.cuda_graphs is True and (
            self.lora.lora_dropout or loop.activation_checkpointing == "offload" or loop.host_layers not in (0, "auto")
        ):
            raise ValueError("train.cuda_graphs = true goes with lora_dropout = 0, no offload and host_layers = 0 only")
        return self

    @model_validator(mode="after")
    def _profile_is_possible(self) -> TrainConfig:
        loop, longest = self.train, self.bins_per_step * self.data.max_seq_length
        certain = max(0, math.ceil(loop.max_tokens / longest) - PROFILE_AFTER)
        if loop.profile_steps > certain:
            steps = f"{loop.max_tokens} tokens in steps of up to {longest}, without the first {PROFILE_AFTER} steps"
            allowed = f"must be at most {certain}: {steps}"
            raise InputError("train.profile_steps", loop.profile_steps, allowed)
        return self

    @property
    def bins_per_step(self) -> int:
        """Rows of max_seq_length tokens (without packing: samples) in one optimizer step, however they are computed."""
        loop = self.train
        if loop.tokens_per_step is not None:
            return max(1, round(loop.tokens_per_step / self.data.max_seq_length))
        return loop.gradient_accumulation_steps * (1 if loop.micro_batch_size == "auto" else loop.micro_batch_size)

    def fingerprint(self) -> str:
        """16 hex digits that are equal exactly when two configs train the same adapter, up to rounding."""
        values = self.model_dump(mode="json")
        for section, fields in NUMERICALLY_NEUTRAL.items():
            for field in fields:
                del values[section][field]
        if self.data.train_max_samples is None:  # a key that older sweeps do not have
            del values["data"]["train_max_samples"]
        values["bins_per_step"] = self.bins_per_step
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def load_train_config(path: str | Path) -> TrainConfig:
    """Read a train_config.json."""
    return parse(TrainConfig, load_json(path))
