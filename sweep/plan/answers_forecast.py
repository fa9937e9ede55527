"""Predict how long a trial's answers take, from the bytes that each step of generation reads.

The slowest case is assumed: every prompt as long as the longest, every answer as long as allowed.
Steps of fused layers are recorded: the card starts each layer's small kernels itself, one after the
other. Elsewhere transformers' own layers compute them, and a small model waits for the host. The
estimate follows a card's rates and one measurement: 8B in NF4, 16 answers, 10.1 ms a step (H100).
"""

from __future__ import annotations

import math

from engine.command_answers import PreparedFacts
from engine.config.trial import TrainConfig
from engine.planning.cards import Card
from engine.planning.sheet_rates import rates_of
from engine.shape.layer_plan import is_fused
from engine.shape.model_shape import ModelShape
from engine.units import GIB
from sweep.text import duration_text

RECORDED_LAYER_MS = 0.11  # about 24 small kernels of a layer, beside its weights; from the same measurement
FORWARD_SHARE = 1 / 3  # of the host's time for a layer, forward and backward
PLAIN_SHARE = 0.5  # of the free memory holds dequantised weights, as engine/evaluation/decoding.py has it
NF4_BYTES = 0.53  # a value, with its scales
MAX_PROMPT_TOKENS = 2**14  # in one forward pass


def answers_seconds(config: TrainConfig, shape: ModelShape, card: Card, num_samples: int, longest_prompt: int) -> float:
    """Return the seconds of one measurement. num_samples: that are answered; longest_prompt: its tokens."""
    metrics, rates, width = config.metrics, rates_of(card), shape.hidden_size
    if not metrics.generates or not num_samples:
        return 0.0
    at_once = max(1, min(metrics.batch_size, MAX_PROMPT_TOKENS // max(1, longest_prompt), num_samples))
    values = shape.all_linear_parameters
    packed = config.model.quantization == "nf4"
    free = max(0.0, card.memory_gib * GIB - (NF4_BYTES if packed else 2.0) * values)
    plain = min(1.0, PLAIN_SHARE * free / (2.0 * values)) if packed else 1.0
    read = 2.0 * plain + (1.0 - plain) * (NF4_BYTES + 2.0 + 2.0)  # bytes a value: packed, written, and read again
    head = 2.0 * shape.vocab_size * width
    cached = 4.0 * shape.num_layers * shape.num_kv_heads * shape.head_dim * (longest_prompt + metrics.max_new_tokens)
    moved_ms = (read * values + head + at_once * cached) / (rates.norm_gb_s.at(width) * 1e6)
    if is_fused(config, shape) and not shape.has_mixers:
        step_ms = moved_ms + shape.num_layers * RECORDED_LAYER_MS
    else:
        step_ms = max(moved_ms, shape.num_layers * rates.unfused_host_ms * FORWARD_SHARE)
    prompt_ms = 2.0 * values * at_once * longest_prompt / (rates.matmul_tflops.at(width) * 1e9)
    return math.ceil(num_samples / at_once) * (metrics.max_new_tokens * step_ms + prompt_ms) / 1e3


def answers_line(config: TrainConfig, shape: ModelShape | None, card: Card | None, facts: PreparedFacts) -> str | None:
    """Return the line of the forecast on a trial's answers; None if it makes none, or nothing is predicted."""
    metrics, times = config.metrics, config.metrics.num_due(len(config.train.report_grid()))
    if not metrics.generates or not facts.num_task_samples:
        return None
    what = f"{facts.num_task_samples} samples, answers of up to {metrics.max_new_tokens} tokens"
    when = f"{times} of {len(config.train.report_grid())} rungs" if times else "at the end, for the best adapter"
    if shape is None or card is None:
        return f"answers    {what}, {when}; no time is predicted here"
    seconds = answers_seconds(config, shape, card, facts.num_task_samples, facts.longest_task_prompt)
    each = f"at most about {duration_text(seconds)}"
    total = f", {duration_text(seconds * times)} a trial" if times > 1 else ""
    return f"answers    {each} each time{total}: {what}, {when}"
