"""Predict the speed of training one adapter on a CUDA card, and of its evaluation. No torch, no GPU.

The time is arithmetic and bytes over the card's rates (engine/planning/rates.py): measured ones, or
what its data sheet lets expect. With those of the data sheet, the sum is within 5 % of the measured
time in thirteen settings on an H100 (engine/bench/calibration/). Other cards without a measurement
are EXTRAPOLATED: trust the order of two plans on one card more than the number.

The slowest case is assumed: samples of max_seq_length, every token a target, no sliding windows.
Copies to and from the host run at the same time (engine/planning/copy_waits.py).

Shape letters: T tokens, L tokens of one sample, D hidden, H query heads, K head dim, V vocabulary,
R rank, N trained values.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

from engine.config.matmul import Matmul
from engine.config.trial import TrainConfig
from engine.memory.layer_memory import Pass
from engine.memory.layer_walk import attention_name
from engine.memory.live_bytes import HostStack, LiveBytes
from engine.memory.tensor_sizes import Sizes
from engine.planning.cards import Card
from engine.planning.copy_waits import LayerTimes, waiting_ms
from engine.planning.layer_work import LayerWork, StepShape, backward_work, forward_work
from engine.planning.rates import Rates
from engine.planning.sheet_rates import UNFUSED_HOST_MS, rates_of
from engine.shape.compute_limits import documents_of, evaluation_row_tokens
from engine.shape.layer_plan import (
    LayerPlan,
    adapted_outside,
    adapted_projections,
    evaluation_width,
    is_fused,
    num_trained,
    plan_layers,
)
from engine.shape.model_shape import ModelShape
from engine.shape.policies import Policy

# cuDNN's attention (plain batches on Hopper and later) is so much faster than flash attention (H100).
CUDNN_GAIN = 1.8
# Launching one layer's CUDA graph. 30 layers took 1.4 ms (H100's host).
RECORDED_HOST_MS = 0.05
# The host's time for a fused layer is that of a small model's (5.5 to 6.1 ms on H100 hosts) with packed
# weights that keeps all. Layers wider than that took 7.1 (4B), 8.5 (7B) and 9.3 ms (8B); with all weights
# dequantised, 7 and 17 % less (4B, 7B); recomputed, 1.38 times as long (135M; the MLP's share of that is
# an estimate). A plan that waits unseen loses more than a recording costs.
WIDER_THAN, WIDE_HOST, DEQUANTISED_HOST = 2048, 1.28, 0.88
# Layers with experts launch 265 kernels, recomputed; a step of 24 and of 48 such layers took 309 and 753 ms.
EXPERTS_HOST = 1.8
# Layers with INT8 products launch more: a step of 8B that waits for the host took 347 ms, in bf16 262.
INT8_HOST = 1.35
HOST_AGAIN = {Policy.KEEP: 1.0, Policy.HOST: 1.0, Policy.SELECTIVE: 1.15, Policy.RECOMPUTE: 1.38, Policy.OFFLOAD: 1.38}
# Python and launches of a layer with a library's mixer, and of one chunk in the forward pass of its torch
# operations. From two steps of Qwen3.5-4B, 2 x 2048, on a host 1.55 times as slow: 455 ms with
# flash-linear-attention, and 3.26 s of PEFT on torch operations, in 32 chunks of 24 layers. Samples of
# different lengths go one by one, which is assumed. Other hosts: in proportion to an unfused layer.
MIXER_HOST_MS, CHUNK_HOST_MS = 10.5, 0.5
# Share of the host's time for a layer that its forward pass takes; a forward pass is recorded if its launches
# take EVALUATION_WAITS of its time. What passes between the kernels of a layer's recorded forward pass, ms: in an
# evaluation they are too short to hide it (SmolLM2-135M on H200: 1.0 to 1.5 ms of 30 layers).
FORWARD_HOST, EVALUATION_WAITS, FORWARD_GAPS_MS = 1 / 3, 0.5, 0.04
# Passes over memory of transformers' own layers for one pass of a fused layer. An estimate.
UNFUSED_PASSES = 5
# Bytes moved a trained value: norm, clipping, 8-bit AdamW, cast and zeroing; adding a gradient.
OPTIMIZER_BYTES, ACCUMULATE_BYTES = 38, 12
# Once a step for each adapted layer, ms a layer of 224 and of 112: the lengths of DoRA's rows (H200: 0.072 and
# 0.055), and Muon's steps of A and B, which the host launches (H100: 0.12 and 0.14).
LENGTH_MS, MUON_MS = 0.07, 0.13


@dataclass(frozen=True)
class SpeedPrediction:
    """The predicted speed of a config.

    `step_time_ms` is the time of one micro-batch, with its share of the optimizer step. `parts`
    splits it by what takes the time.
    """

    step_time_ms: float
    tokens_per_second: float
    parts: dict[str, float]


def predict_speed(
    config: TrainConfig, shape: ModelShape, card: Card, *, attention: Literal["flash", "cudnn"] = "flash"
) -> SpeedPrediction:
    """Predict the time of one micro-batch of micro_batch_size bins, each as long as it can be.

    Nothing in the config may be `auto`, or it raises ValueError.
    """
    plans, rates = plan_layers(config, shape), rates_of(card)
    tokens = config.train.micro_batch_size * config.bin_tokens
    documents = documents_of(tokens) if config.train.cuda_graphs is True and not shape.has_unrecordable_mixers else 0
    steps = _step_shapes(config, shape, card, tokens, config.data.max_seq_length, documents, attention)
    fused = is_fused(config, shape)
    parts: Counter[str] = Counter()
    layers, known, chunks = [], {}, 0.0
    for plan, one in zip(plans, shape.each):
        step = steps[one]
        key = (one, plan.policy, plan.cached, plan.trained, plan.needs_dx, *plan.ranks.values())
        if key not in known:
            works = forward_work(plan, step), backward_work(plan, step)
            forward, backward = (_times(work, step, i == 1) for i, work in enumerate(works))
            copy_ms = _put_away(plan, step) / (rates.link_gb_s * 1e6) if fused else 0.0
            times = LayerTimes(sum(forward.values()), sum(backward.values()), copy_ms)
            known[key] = Counter(forward) + Counter(backward), times, sum(work.mixer_chunks for work in works)
        parts.update(known[key][0])
        chunks += known[key][2]
        layers.append(known[key][1])
    parts["waiting for copies"] = waiting_ms(layers, rates.link_gb_s)
    parts.update(_head_and_embedding(config, replace(step, shape=shape)))
    number = num_trained(config, shape, plans)
    steps_share = config.train.micro_batch_size / config.bins_per_step
    adapter_bytes = number * (ACCUMULATE_BYTES + OPTIMIZER_BYTES * steps_share)
    width = shape.hidden_size
    parts["optimizer"] = rates.gaps.at(width) * adapter_bytes / (rates.norm_gb_s.at(width) * 1e6)
    if config.train.offload_optimizer is True and config.optim.has_8bit_states:  # both ways at once, behind the update or not
        copy_ms = number * config.optim.num_states / (rates.link_gb_s * 1e6)
        parts["optimizer"] = max(parts["optimizer"], steps_share * copy_ms)
    if config.lora.use_dora:
        parts["optimizer"] += steps_share * LENGTH_MS * sum(map(len, adapted_projections(config, shape)))
    if config.optim.name == "muon":
        parts["optimizer"] += steps_share * MUON_MS * sum(map(len, adapted_projections(config, shape)))
    host_ms = sum(_host_ms(plan, one, rates, fused, config.train.cuda_graphs is True) for plan, one in zip(plans, shape.each))
    host_ms += CHUNK_HOST_MS * chunks * rates.unfused_host_ms / UNFUSED_HOST_MS
    parts["waiting for the host"] = max(0.0, host_ms - parts.total())
    total = parts.total()
    return SpeedPrediction(total, 1e3 * tokens / total, dict(parts))


def predict_evaluation(config: TrainConfig, shape: ModelShape, card: Card, *, has_room: bool = True) -> SpeedPrediction:
    """Predict the time of a full row of the evaluation: a forward pass, in the working dtype, without dropout.

    A row holds samples of eval_max_seq_length (engine/evaluation/eval_loss.py). It is recorded if the plan
    records steps; else if the device would wait for the host and has_room: memory for a recording. Nothing in the
    config may be `auto`, or it raises ValueError.
    """
    length = config.data.eval_max_seq_length
    tokens, rates, fused = evaluation_row_tokens(length, evaluation_width(config, shape)), rates_of(card), is_fused(config, shape)
    plans = [replace(one, matmul=Matmul.BF16, drops=False) for one in plan_layers(config, shape)]
    pads = fused and config.model.dtype != "float32" and not shape.rotates_by_row and not shape.has_unrecordable_mixers
    steps = _step_shapes(config, shape, card, tokens, length, documents_of(tokens) if pads else 0)
    parts: Counter[str] = Counter()
    chunks, known = 0.0, {}
    for plan, one in zip(plans, shape.each):
        key = (one, plan.cached, *plan.ranks.values())
        if key not in known:
            work = forward_work(plan, steps[one])
            known[key] = _times(work, steps[one], False), work.mixer_chunks
        parts.update(known[key][0])
        chunks += known[key][1]
    parts.update(_head_and_embedding(config, replace(steps[shape.each[0]], shape=shape), trains=False))
    host_ms = sum(_host_ms(plan, one, rates, fused, False) for plan, one in zip(plans, shape.each))
    host_ms = FORWARD_HOST * (host_ms + CHUNK_HOST_MS * chunks * rates.unfused_host_ms / UNFUSED_HOST_MS)
    waits = host_ms > EVALUATION_WAITS * max(host_ms, parts.total())
    if pads and (config.train.cuda_graphs is True or (has_room and waits)):
        parts["between kernels"] = FORWARD_GAPS_MS * shape.num_layers
    else:
        parts["waiting for the host"] = max(0.0, host_ms - parts.total())
    total = parts.total()
    return SpeedPrediction(total, 1e3 * tokens / total, dict(parts))


def _step_shapes(
    config: TrainConfig,
    shape: ModelShape,
    card: Card,
    tokens: int,
    length: int,
    documents: int,
    attention: Literal["flash", "cudnn"] = "flash",
) -> dict[ModelShape, StepShape]:
    """Return what the passes of each kind of layer share. tokens: of a row; length: of a sample; documents: in a padded row."""
    fused, packed, steps = is_fused(config, shape), config.model.quantization == "nf4", {}
    for one in set(shape.each):
        sizes = Sizes.of(one, tokens, length, 2, packed, documents)
        steps[one] = StepShape(one, card, sizes, tokens, length, fused, packed, attention, one.weights_of_groups)
    return steps


def _host_ms(plan: LayerPlan, shape: ModelShape, rates: Rates, fused: bool, is_recorded: bool) -> float:
    """Return the ms that the host takes to launch one layer, forward and backward."""
    if is_recorded and fused:
        return RECORDED_HOST_MS
    again = HOST_AGAIN[plan.policy]
    if not fused:
        return rates.unfused_host_ms * again
    if shape.mixer is not None:
        ms = MIXER_HOST_MS * again * rates.unfused_host_ms / UNFUSED_HOST_MS
        return ms if shape.experts is None else ms + (EXPERTS_HOST - 1.0) * rates.host_ms * again
    wide = WIDE_HOST if shape.hidden_size > WIDER_THAN else 1.0
    saved = (1.0 - DEQUANTISED_HOST) * len(plan.cached) / (len(shape.groups) * len(plan.matmul.forms))
    launches = (1.0 if plan.matmul is Matmul.BF16 else INT8_HOST) * (1.0 if shape.experts is None else EXPERTS_HOST)
    return rates.host_ms * wide * (1.0 - saved) * launches * again


def _put_away(plan: LayerPlan, step: StepShape) -> int:
    """Return the bytes of one layer that the host stores."""
    if not plan.policy.is_on_host or not plan.trained:
        return 0
    live = LiveBytes()
    host_stack = HostStack(live)
    live.hold("0.x", step.sizes.x)
    kernel = attention_name(step.shape, step.sizes.element, "flash")
    Pass(0, plan, step.shape, step.sizes, kernel, False, live, host_stack).forward(trains=True)
    return host_stack.num_bytes


def _times(work: LayerWork, step: StepShape, is_backward: bool) -> dict[str, float]:
    """Return the ms of a pass, by what takes them."""
    rates, passes = rates_of(step.card), 1 if step.is_fused else UNFUSED_PASSES
    width, head_dim = step.shape.hidden_size, step.shape.head_dim
    attention = rates.attention_tflops.at(head_dim) * 1e9 * step.length / (step.length + rates.half_length.at(head_dim))
    attention *= (rates.attention_backward.at(head_dim) if is_backward else 1.0) * (CUDNN_GAIN if _has_cudnn(step) else 1.0)
    adapters = max(work.adapter_bytes / (rates.adapter_gb_s.at(width) * 1e6), work.thin / (rates.thin_tflops * 1e9))
    norms_gb_s, int8 = rates.norm_gb_s.at(width), rates.of_int8
    codes = work.forward_code_bytes / int8.forward_gb_s.at(width) + work.backward_code_bytes / int8.backward_gb_s.at(width)
    codes += work.row_bytes / int8.rows_gb_s.at(width)
    plain = work.plain_bytes / norms_gb_s + work.activation_bytes / rates.activation_gb_s.at(width)
    times = {
        "matmuls": (work.matmul / rates.matmul_tflops.at(width) + work.int8_matmul / int8.matmul_tops.at(width)) / 1e9,
        "attention": work.attention / attention + work.eager_bytes / (norms_gb_s * 1e6),
        "dequantisation": (work.nf4_bytes / rates.nf4_gb_s.at(width) + codes) / 1e6,
        "adapters": adapters,
        "linear attention": work.mixer_bytes / (norms_gb_s * 1e6),
        "norms, rotation, activation": passes * plain / 1e6,
    }
    return {name: rates.gaps.at(width) * ms for name, ms in times.items()}


def _has_cudnn(step: StepShape) -> bool:
    return step.attention == "cudnn" and step.shape.head_dim <= 128


def _head_and_embedding(config: TrainConfig, step: StepShape, trains: bool = True) -> dict[str, float]:
    """Return the ms of head, loss and embedding.

    The head runs forward and backward over every token. Logits are written, read and overwritten; an
    evaluation writes and reads them. The embedding takes time only if its rows come from the host.
    """
    shape, rates, tokens = step.shape, rates_of(step.card), step.tokens
    passes, logits = 2 if trains else 1, 2 * tokens * shape.vocab_size
    head = passes * 2 * tokens * shape.vocab_size * shape.hidden_size / (rates.head_tflops.at(shape.hidden_size) * 1e9)
    loss = passes * (2 * logits + 4 * step.sizes.x) / (rates.loss_gb_s * 1e6)
    inputs = 2 * tokens * shape.num_layers * shape.input_width
    table_ms = inputs / (rates.link_gb_s * 1e6) if config.model.embeddings != "device" else 0.0
    on_host = config.model.embeddings != "device" and not shape.tied_embeddings
    gaps = rates.gaps.at(shape.hidden_size)
    return {
        "head": gaps * head,
        "loss": gaps * loss,
        "embedding": table_ms + (step.sizes.x / (rates.link_gb_s * 1e6) if on_host else 0.0),
        "per-layer inputs": gaps * _inputs_ms(config, shape, rates, tokens),
    }


def _inputs_ms(config: TrainConfig, shape: ModelShape, rates: Rates, tokens: int) -> float:
    """Return the ms of making the layers' own embeddings, and of adding each layer's gradient to that of all."""
    flops = 2 * tokens * sum(math.prod(features) for features in shape.outside.values())
    passes = 8 + (3 * shape.num_layers if adapted_outside(config, shape) else 0)
    moved = 2 * tokens * shape.num_layers * shape.input_width * passes
    width = shape.hidden_size
    return flops / (rates.matmul_tflops.at(width) * 1e9) + moved / (rates.norm_gb_s.at(width) * 1e6)
