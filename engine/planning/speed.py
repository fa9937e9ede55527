"""Predict the speed of training one adapter on a CUDA card. No torch, no GPU.

The time is arithmetic over the card's tensor throughput plus bytes over its bandwidth. Each is
divided by a share of the data sheet's number that kernels reached. The shares come from kernel
times of whole steps on ONE card, an H100 SXM (torch 2.11, triton 3.6; Llama 8B and 1B). On it, the
sum is within 5 % of the measured time in thirteen settings (engine/bench/calibration/).

Every other card is EXTRAPOLATED from its data sheet and not measured. Power limits (an L4's 72 W),
clocks, and kernels chosen for Hopper will change the result. Trust the order of two plans on one
card more than the number.

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

from engine.config.trial import TrainConfig
from engine.memory.layer_memory import Pass
from engine.memory.live_bytes import HostStack, LiveBytes
from engine.memory.tensor_sizes import Sizes
from engine.planning.cards import Card
from engine.planning.copy_waits import LayerTimes, waiting_ms
from engine.planning.layer_work import ATTENTION_BACKWARD, LayerWork, StepShape, backward_work, forward_work
from engine.shape.layer_plan import LayerPlan, adapted_outside, group_parameters, is_fused, num_trained, plan_layers
from engine.shape.model_shape import ModelShape

# Shares of the data sheet's 989 TFLOP/s (H100): 785 in a layer's matmuls and 730 in the head's. An
# adapter's thin matmuls are bound by bytes up to a rank of about 100; beyond it, their share (an
# estimate) counts.
MATMUL, HEAD_MATMUL, THIN_MATMUL = 0.79, 0.74, 0.4
# Shares of 3,350 GB/s (H100): 2,850 in norms and the adapters' matmuls, 1,940 in the activation
# with low-rank terms, 2,400 in NF4.
BANDWIDTH, ACTIVATION_BANDWIDTH, NF4_BANDWIDTH = 0.85, 0.58, 0.72
# Time of a step relative to its kernels: 1.10, 1.10 and 1.11 in three steps (H100).
GAPS = 1.10
# Share of flash attention, if the card's own figure is not known. Samples of L tokens reach
# L / (L + 1000) of it. cuDNN's attention (plain batches on Hopper and later) is 1.8 times as fast.
ATTENTION, HALF_LENGTH, CUDNN_GAIN = 0.6, 1000, 1.8
# Python and launches of one layer, forward and backward, on an H100's host. 30 layers took 160 to
# 183 ms fused, 364 ms unfused and 1.4 ms as a CUDA graph. Other hosts are up to three times as
# fast.
HOST_MS, UNFUSED_HOST_MS, RECORDED_HOST_MS = 5.5, 12.0, 0.05
# The same for a layer with a library's mixer, and for one chunk in the forward pass of its torch
# operations. From two steps of Qwen3.5-4B, 2 x 2048, on a host 1.55 times as slow: 455 ms with
# flash-linear-attention, and 3.26 s of PEFT on torch operations, in 32 chunks of 24 layers. Samples of
# different lengths go one by one, which is assumed.
MIXER_HOST_MS, CHUNK_HOST_MS = 10.5, 0.5
# Passes over memory of transformers' own layers for one pass of a fused layer. An estimate.
UNFUSED_PASSES = 5
# Bytes moved a trained value: norm, clipping, 8-bit AdamW, cast and zeroing; adding a gradient.
OPTIMIZER_BYTES, ACCUMULATE_BYTES = 38, 12


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
    """Predict the time of one micro-batch of micro_batch_size x max_seq_length tokens.

    Nothing in the config may be `auto`, or it raises ValueError.
    """
    plans, fused, packed = plan_layers(config, shape), is_fused(config, shape), config.model.quantization == "nf4"
    length = config.data.max_seq_length
    tokens = config.train.micro_batch_size * length
    steps = {}
    for one in set(shape.each):
        sizes = Sizes.of(one, tokens, length, 2, packed)
        steps[one] = StepShape(one, card, sizes, tokens, length, fused, packed, attention, group_parameters(one))
    parts: Counter[str] = Counter()
    layers, known, chunks = [], {}, 0.0
    for plan, one in zip(plans, shape.each):
        step = steps[one]
        key = (one, plan.policy, plan.cached, plan.trained, plan.needs_dx, *plan.ranks.values())
        if key not in known:
            works = forward_work(plan, step), backward_work(plan, step)
            forward, backward = (_times(work, step, i == 1) for i, work in enumerate(works))
            copy_ms = _put_away(plan, step) / (card.pcie_gb_s * 1e6) if fused else 0.0
            times = LayerTimes(sum(forward.values()), sum(backward.values()), copy_ms)
            known[key] = Counter(forward) + Counter(backward), times, sum(work.mixer_chunks for work in works)
        parts.update(known[key][0])
        chunks += known[key][2]
        layers.append(known[key][1])
    parts["waiting for copies"] = waiting_ms(layers, card.pcie_gb_s)
    parts.update(_head_and_embedding(config, replace(step, shape=shape)))
    number = num_trained(config, shape, plans)
    steps_share = config.train.micro_batch_size / config.bins_per_step
    adapter_bytes = number * (ACCUMULATE_BYTES + OPTIMIZER_BYTES * steps_share)
    parts["optimizer"] = GAPS * adapter_bytes / (card.bandwidth_gb_s * 1e6 * BANDWIDTH)
    layer_ms = (RECORDED_HOST_MS if config.train.cuda_graphs is True else HOST_MS) if fused else UNFUSED_HOST_MS
    mixers = sum(one.mixer is not None for one in shape.each) if fused else 0
    host_ms = layer_ms * (shape.num_layers - mixers) + MIXER_HOST_MS * mixers + CHUNK_HOST_MS * chunks
    parts["waiting for the host"] = max(0.0, host_ms - parts.total())
    total = parts.total()
    return SpeedPrediction(total, 1e3 * tokens / total, dict(parts))


def _put_away(plan: LayerPlan, step: StepShape) -> int:
    """Return the bytes of one layer that the host stores."""
    if not plan.policy.is_on_host or not plan.trained:
        return 0
    live = LiveBytes()
    host_stack = HostStack(live)
    live.hold("0.x", step.sizes.x)
    kernel = "eager" if step.shape.attention_softcap else "flash"
    Pass(0, plan, step.shape, step.sizes, kernel, False, live, host_stack).forward(trains=True)
    return host_stack.num_bytes


def _times(work: LayerWork, step: StepShape, is_backward: bool) -> dict[str, float]:
    """Return the ms of a pass, by what takes them."""
    card, passes = step.card, 1 if step.is_fused else UNFUSED_PASSES
    flops_a_ms, bytes_a_ms = card.bf16_tflops * 1e9, card.bandwidth_gb_s * 1e6
    attention = (card.attention_tflops or ATTENTION * card.bf16_tflops) * 1e9 * step.length / (step.length + HALF_LENGTH)
    attention *= (ATTENTION_BACKWARD if is_backward else 1.0) * (CUDNN_GAIN if _has_cudnn(step) else 1.0)
    adapters = max(work.adapter_bytes / (bytes_a_ms * BANDWIDTH), work.thin / (flops_a_ms * THIN_MATMUL))
    plain = work.plain_bytes / BANDWIDTH + work.activation_bytes / ACTIVATION_BANDWIDTH
    times = {
        "matmuls": work.matmul / (flops_a_ms * MATMUL),
        "attention": work.attention / attention + work.eager_bytes / (bytes_a_ms * BANDWIDTH),
        "dequantisation": work.nf4_bytes / (bytes_a_ms * NF4_BANDWIDTH),
        "adapters": adapters,
        "linear attention": work.mixer_bytes / (bytes_a_ms * BANDWIDTH),
        "norms, rotation, activation": passes * plain / bytes_a_ms,
    }
    return {name: GAPS * ms for name, ms in times.items()}


def _has_cudnn(step: StepShape) -> bool:
    return step.attention == "cudnn" and step.shape.head_dim <= 128


def _head_and_embedding(config: TrainConfig, step: StepShape) -> dict[str, float]:
    """Return the ms of head, loss and embedding.

    The head runs forward and backward over every token. Logits are written, read and overwritten.
    The embedding takes time only if its rows come from the host.
    """
    shape, card, tokens = step.shape, step.card, step.tokens
    flops, logits = 4 * tokens * shape.vocab_size * shape.hidden_size, 2 * tokens * shape.vocab_size
    head = flops / (card.bf16_tflops * 1e9 * HEAD_MATMUL)
    loss = (4 * logits + 8 * step.sizes.x) / (card.bandwidth_gb_s * 1e6 * BANDWIDTH)
    inputs = 2 * tokens * shape.num_layers * shape.input_width
    table_ms = inputs / (card.pcie_gb_s * 1e6) if config.model.embeddings != "device" else 0.0
    on_host = config.model.embeddings != "device" and not shape.tied_embeddings
    return {
        "head": GAPS * head,
        "loss": GAPS * loss,
        "embedding": table_ms + (step.sizes.x / (card.pcie_gb_s * 1e6) if on_host else 0.0),
        "per-layer inputs": GAPS * _inputs_ms(config, shape, card, tokens),
    }


def _inputs_ms(config: TrainConfig, shape: ModelShape, card: Card, tokens: int) -> float:
    """Return the ms of making the layers' own embeddings, and of adding each layer's gradient to that of all."""
    flops = 2 * tokens * sum(math.prod(features) for features in shape.outside.values())
    passes = 8 + (3 * shape.num_layers if adapted_outside(config, shape) else 0)
    moved = 2 * tokens * shape.num_layers * shape.input_width * passes
    return flops / (card.bf16_tflops * 1e9 * MATMUL) + moved / (card.bandwidth_gb_s * 1e6 * BANDWIDTH)
