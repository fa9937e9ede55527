"""Refuse settings of a trial that rule each other out. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.config.matmul import Matmul
from engine.errors import InputError

if TYPE_CHECKING:
    from engine.config.trial import TrainConfig

TRAIN_TOKENS = "model.train_tokens"


def check_matmul(config: TrainConfig) -> None:
    """Raise InputError if products are to be in INT8 and the base is not in NF4."""
    if config.matmul is not Matmul.BF16 and config.model.quantization != "nf4":
        quantization = config.model.quantization
        allowed = f"must be bf16 with model.quantization = {quantization}: INT8 codes are made of NF4 weights"
        raise InputError("train.matmul", config.train.matmul, allowed)


def check_train_tokens(config: TrainConfig) -> None:
    """Raise InputError if the trained tokens are not distinct, or other settings rule them out."""
    tokens = list(config.model.train_tokens)
    if not all(tokens) or len(set(tokens)) < len(tokens):
        raise InputError(TRAIN_TOKENS, tokens, "must be different tokens, none of them empty")
    if tokens and config.lora.start_from is not None:
        raise InputError(TRAIN_TOKENS, tokens, "must be empty with lora.start_from, whose adapter has no such rows")
    if tokens and config.matmul is not Matmul.BF16:
        raise InputError(TRAIN_TOKENS, tokens, f"needs train.matmul=bf16, not {config.train.matmul}, which was not tried with it")
