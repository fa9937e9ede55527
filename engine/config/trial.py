"""Define `TrainConfig`, which describes one trial completely. No torch.

It is frozen, validated plain data, and all that `python -m engine` needs to reproduce the trial.
The error for an unknown key lists the known ones. Every error is one `InputError` line.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from engine.config.data_section import DataConfig
from engine.config.lora_section import LoraConfig
from engine.config.matmul import Matmul, MatmulSetting
from engine.config.metrics_section import EVAL_LOSS, FINALISTS, MetricsConfig
from engine.config.optim_section import OptimConfig
from engine.config.parsing import ListAsTuple, PositiveInt, StrictModel, load_json, parse
from engine.config.possible import PROFILE_AFTER as PROFILE_AFTER
from engine.config.possible import (
    check_matmul,
    check_metrics_section,
    check_offload,
    check_profile,
    check_start,
    check_step,
    check_train_tokens,
)
from engine.config.preference_section import IN_A_PAIR, PREFERENCE, PreferenceConfig, check_preference
from engine.errors import InputError

TRAIN_CONFIG = "train_config.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
MAX_REPORTS = 10_000
MAX_BINS = 1_000_000  # in one optimizer step
Auto = Literal["auto"]
NumLayers = Annotated[int, Field(ge=0, le=10_000)]
Gib = Annotated[float, Field(le=1e6)]
BOOL_POLICIES = {"keep": False, "recompute": True}
"""Policies that config files write as true or false, in train.activation_checkpointing."""
PolicyAsBool = BeforeValidator(lambda value: BOOL_POLICIES.get(value, value) if isinstance(value, str) else value)


class ModelConfig(StrictModel):
    """The base model, and the form in which its frozen weights are held."""

    path: str = Field(min_length=1, description="Hugging Face folder, hub id, or builtin:<name>")
    revision: str | None = None
    quantization: Literal["nf4", "none"] = "nf4"
    double_quantization: bool = True
    dtype: Literal["auto", "bfloat16", "float32"] = Field("auto", description="auto: bfloat16 on CUDA, float32 on CPU")
    layers: Literal["auto", "strict", "original"] = Field(
        "auto", description="auto: fused in known model families; strict: fused, or an error; original: never fused"
    )
    embeddings: Literal["auto", "device", "host"] = Field(
        "auto", description="host: the input embedding stays in pinned host memory; auto: host on CUDA, if large and not tied"
    )
    train_tokens: Annotated[tuple[str, ...], ListAsTuple] = Field(
        (), max_length=256, description="tokens whose rows of embedding and head are trained too; new ones join the tokenizer"
    )
    trust_remote_code: bool = False


class LoopConfig(StrictModel):
    """The length of training, its portions and its reports.

    Tokens seen are the tokens that the model reads in forward passes, prompts included.
    """

    max_tokens: PositiveInt
    max_epochs: Annotated[float, Field(gt=0.0, le=1e6)] | None = Field(
        None, description="passes over the training samples; a trial ends after them or after max_tokens, whichever comes first"
    )
    neftune_noise_alpha: Annotated[float, Field(ge=0.0, le=1e4)] = Field(
        0.0, description="NEFTune: noise on the embeddings in training, within alpha / sqrt(sample's tokens * width); 0: none"
    )
    report_at_tokens: Annotated[Annotated[tuple[PositiveInt, ...], Field(max_length=MAX_REPORTS)] | None, ListAsTuple] = Field(
        None, description="tokens seen at each report, ascending, up to max_tokens"
    )
    num_reports: Annotated[int, Field(ge=1, le=MAX_REPORTS)] = Field(
        8, description="evenly spaced reports, if report_at_tokens is not given"
    )
    micro_batch_size: Annotated[int, Field(ge=1, le=MAX_BINS)] | Auto = Field(
        "auto", description="bins computed at once; changes speed and memory only"
    )
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=MAX_BINS)] = Field(
        1, description="micro-batches in a step, if tokens_per_step is not given"
    )
    tokens_per_step: PositiveInt | None = Field(None, description="tokens in one optimizer step, at every sequence length")
    activation_checkpointing: Annotated[bool | Literal["auto", "selective", "offload"], PolicyAsBool] = Field(
        "auto",
        description="true: compute each layer again in the backward pass; offload: the same, from inputs in host memory; "
        "selective: compute only its MLP again; false: keep activations; auto: the fastest that fits",
    )
    keep_layers: NumLayers | Auto = Field(
        "auto", description="number of last layers that keep activations, whatever activation_checkpointing says"
    )
    host_layers: NumLayers | Auto = Field(
        "auto",
        description="number of other layers, spread evenly, that keep activations in pinned host memory; "
        "of rows above 8,192 tokens their inputs and attention's outputs",
    )
    weight_cache_gib: Annotated[Gib, Field(ge=0.0)] | Auto = Field(
        "auto", description="device memory for dequantised weights or INT8 codes"
    )
    offload_optimizer: bool | Auto = Field(
        "auto", description="8-bit states of the optimizer in pinned host memory; auto: if nothing else fits; no effect on a CPU"
    )
    matmul: MatmulSetting = Field(
        "bf16",
        description="products with the frozen base: bf16: in model.dtype; int8_backward: in INT8 in the input gradient; "
        "int8: in INT8 in training's forward pass too; auto: int8_backward in a sweep on cards measured to be faster, else bf16",
    )
    cuda_graphs: bool | Auto = Field(
        "auto", description="replay recorded launches; not with host memory. auto: if the host would be too slow"
    )
    memory_budget_gib: Annotated[Gib, Field(gt=0.0)] | None = Field(None, description="device memory to use; none: all of it")
    profile_steps: Annotated[int, Field(ge=0, le=10_000)] = Field(
        0, description="number of optimizer steps, after the first two, to trace into profile/ of the trial's folder"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0  # torch and numpy take no more
    device: Literal["auto", "cuda", "cpu"] = "auto"

    @model_validator(mode="after")
    def _grid_ascends(self) -> LoopConfig:
        grid = self.report_at_tokens or ()
        if any(a >= b for a, b in itertools.pairwise(grid)) or (grid and grid[-1] > self.max_tokens):
            raise ValueError(f"report_at_tokens must ascend and end at or below max_tokens = {self.max_tokens}")
        if self.num_reports > self.max_tokens:
            raise ValueError(f"num_reports must not exceed max_tokens = {self.max_tokens}")
        return self

    def within_epochs(self, tokens_per_epoch: int) -> LoopConfig:
        """Return this section with max_tokens of at most max_epochs passes, and no report after them."""
        most = self.max_tokens if self.max_epochs is None else max(1, math.floor(self.max_epochs * tokens_per_epoch))
        if most >= self.max_tokens:
            return self
        grid = self.report_at_tokens and (*(tokens for tokens in self.report_at_tokens if tokens < most), most)
        return self.model_copy(update={"max_tokens": most, "report_at_tokens": grid, "num_reports": min(self.num_reports, most)})

    def report_grid(self) -> tuple[int, ...]:
        """Return the tokens seen at each report, up to max_tokens. Rung i is entry i - 1."""
        if self.report_at_tokens is None:
            return tuple(self.max_tokens * (i + 1) // self.num_reports for i in range(self.num_reports))
        grid = self.report_at_tokens
        return grid if grid[-1:] == (self.max_tokens,) else (*grid, self.max_tokens)


NUMERICALLY_NEUTRAL = {
    "model": ("embeddings",),
    "train": (
        "micro_batch_size", "gradient_accumulation_steps", "tokens_per_step", "activation_checkpointing", "keep_layers",
        "host_layers", "weight_cache_gib", "offload_optimizer", "cuda_graphs", "memory_budget_gib", "profile_steps",
    ),
}  # fmt: skip
"""Fields that change speed and memory, and results only by rounding.

The fingerprint leaves them out; `bins_per_step` stands for the size of a step.
"""
LATER: dict[str, dict[str, Any]] = {
    "data": {
        "train_max_samples": None, "train_name": None, "train_revision": None, "train_files": None, "eval_name": None,
        "eval_revision": None, "eval_files": None, "columns": {}, "bad_rows": "error", "overlong": "cut",
        "template_kwargs": None, "date": None, "turns": "all", "eval_weights": None, "eval_limits": {},
    },
    "model": {"train_tokens": []},
    "lora": {
        "start_from": None, "start_digest": None, "rank_pattern": {}, "alpha_pattern": {}, "start": "default", "use_dora": False,
    },
    "optim": {"ema_horizon": None, "loraplus_lr_ratio": 1.0, "decay_ratio": 0.2},
    "train": {"matmul": Matmul.BF16.value, "max_epochs": None, "neftune_noise_alpha": 0.0},
}  # fmt: skip
"""Fields that older sweeps do not have. At these values the fingerprint leaves them out."""


class TrainConfig(StrictModel):
    """All settings of one trial."""

    model: ModelConfig
    data: DataConfig
    lora: LoraConfig = LoraConfig()
    optim: OptimConfig = OptimConfig()
    train: LoopConfig
    metrics: MetricsConfig = MetricsConfig()
    preference: PreferenceConfig = PreferenceConfig()

    @model_validator(mode="after")
    def _metrics_have_rungs(self) -> TrainConfig:
        check_metrics_section(self.metrics, len(self.train.report_grid()), tuple(self.data.eval_sets))
        return self

    @model_validator(mode="after")
    def _graphs_are_possible(self) -> TrainConfig:
        loop = self.train
        if loop.cuda_graphs is True and (loop.activation_checkpointing == "offload" or loop.host_layers not in (0, "auto")):
            allowed = "needs train.host_layers = 0 and no offloaded activations (train.activation_checkpointing)"
            raise InputError("train.cuda_graphs", True, allowed)
        return self

    @model_validator(mode="after")
    def _settings_go_together(self) -> TrainConfig:
        check_matmul(self)
        check_start(self)
        check_offload(self)
        check_train_tokens(self)
        check_preference(self.preference, self.data, self.metrics.choose_by, self.matmul, self.model.train_tokens)
        check_step(self.bins_per_step, MAX_BINS, self.train)
        check_profile(self.train.profile_steps, self.train.max_tokens, self.longest_step)
        return self

    def within_epochs(self, tokens_per_epoch: int) -> TrainConfig:
        """Return the config of a trial whose data have so many tokens a pass: `train.max_epochs` may end it before max_tokens."""
        return self.model_copy(update={"train": self.train.within_epochs(tokens_per_epoch)})

    @property
    def matmul(self) -> Matmul:
        """Return how the frozen base multiplies; `auto` is decided here, alike on every card."""
        return Matmul.of(self.train.matmul)

    @property
    def draws_noise(self) -> bool:
        """Return True if a training pass depends on random numbers: dropout's masks, or noise on the embeddings."""
        return self.lora.lora_dropout > 0.0 or self.train.neftune_noise_alpha > 0.0

    @property
    def longest_evaluated(self) -> int:
        """Return the most tokens of a sample that is read without gradients: for evaluation, or by the reference model."""
        asked = self.learns_pairs and self.preference.needs_reference
        return max(self.data.eval_max_seq_length, self.data.max_seq_length if asked else 0)

    @property
    def bins_per_step(self) -> int:
        """Return the bins in one optimizer step, however they are computed.

        A bin is a row of bin_tokens tokens, or one sample or pair without packing.
        """
        loop = self.train
        return bins_in_step(self.bin_tokens, loop.tokens_per_step, loop.gradient_accumulation_steps, loop.micro_batch_size)

    @property
    def learns_pairs(self) -> bool:
        """Return whether samples are pairs of a chosen and a rejected answer."""
        return self.data.format == PREFERENCE

    @property
    def bin_tokens(self) -> int:
        """Return the most tokens in a bin: max_seq_length, or twice that for a pair, which is never divided."""
        return self.data.max_seq_length * (IN_A_PAIR if self.learns_pairs else 1)

    @property
    def longest_step(self) -> int:
        """Return the most tokens that one optimizer step can take."""
        return self.bins_per_step * self.bin_tokens

    def fingerprint(self) -> str:
        """Return 16 hex digits, equal for configs that train the same adapter up to rounding."""
        values = self.model_dump(mode="json")
        values["train"]["matmul"] = self.matmul.value
        if self.lora.start_digest is not None:  # the same files in another place give the same adapter
            values["lora"]["start_from"] = None
        for section, fields in NUMERICALLY_NEUTRAL.items():
            for field in fields:
                del values[section][field]
        for section, defaults in LATER.items():
            for field, default in defaults.items():
                if values[section][field] == default:
                    del values[section][field]
        if self.metrics.choose_by == EVAL_LOSS and (not self.metrics.names or self.metrics.at == FINALISTS):
            del values["metrics"]  # trials are as without metrics
        if not self.learns_pairs:
            del values["preference"]
        values["bins_per_step"] = self.bins_per_step
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def bins_in_step(
    bin_tokens: int, tokens_per_step: int | None, gradient_accumulation_steps: int, micro_batch_size: int | str
) -> int:
    """Return the bins in one optimizer step, from a bin's tokens and the three fields that decide it."""
    if tokens_per_step is not None:
        return max(1, round(tokens_per_step / bin_tokens))
    return gradient_accumulation_steps * (1 if micro_batch_size == "auto" else int(micro_batch_size))


def load_train_config(path: str | Path) -> TrainConfig:
    """Read a train_config.json; raise InputError if it is missing or not valid."""
    return parse(TrainConfig, load_json(path))
