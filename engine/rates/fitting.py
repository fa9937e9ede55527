"""Make the rates of predictions from measured numbers, and fit what is left over to whole steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from statistics import mean
from typing import Any

from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.planning.cards import UNKNOWN
from engine.planning.rates import Curve, Int8Rates, Rates, curve_of
from engine.planning.speed import predict_speed
from engine.rates.whole_steps import RANK, SAMPLE, WholeStep
from engine.rates.widths import Widths
from engine.shape.model_shape import ModelShape

LEAST_GAPS = 1e-3  # a step cannot take no time
CURVES = ("matmul_tflops", "head_tflops", "norm_gb_s", "adapter_gb_s", "activation_gb_s", "nf4_gb_s")
INT8_CURVES = ("int8_matmul_tops", "int8_forward_gb_s", "int8_backward_gb_s", "int8_rows_gb_s")
# What a step has besides its kernels: copies from the host, the optimizer, which the steps leave out,
# and the wait for a host whose launches were recorded.
NOT_KERNELS = ("embedding", "optimizer", "waiting for the host", "waiting for copies")


def rates_of_numbers(
    by_widths: Mapping[Widths, Mapping[str, float]],
    attention: Mapping[Widths, tuple[float, float, float]],
    *,
    link_gb_s: float,
    host_ms: float,
    unfused_host_ms: float,
) -> Rates:
    """Return the rates, with `gaps` still 1.

    by_widths: the numbers that CURVES and INT8_CURVES name, thin_tflops and loss_gb_s. attention: what
    `attention_rates` returns. A card is as good as its largest model's adapters and loss.
    """
    largest = by_widths[max(by_widths, key=lambda widths: widths.hidden)]

    def of_heads(place: int) -> Curve:
        return curve_of((widths.head_dim, found[place]) for widths, found in attention.items())

    def of_widths(name: str) -> Curve:
        return curve_of((widths.hidden, numbers[name]) for widths, numbers in by_widths.items())

    return Rates(
        **{name: of_widths(name) for name in CURVES},
        gaps=Curve.flat(1.0),
        attention_tflops=of_heads(0),
        half_length=of_heads(1),
        attention_backward=of_heads(2),
        thin_tflops=largest["thin_tflops"],
        loss_gb_s=largest["loss_gb_s"],
        link_gb_s=link_gb_s,
        host_ms=host_ms,
        unfused_host_ms=unfused_host_ms,
        int8=Int8Rates(*(of_widths(name) for name in INT8_CURVES)),
    )


def with_gaps(rates: Rates, steps: Mapping[WholeStep, float], shapes: Mapping[Widths, ModelShape]) -> Rates:
    """Return the rates with the `gaps` that make the prediction of these steps right on average.

    steps: measured seconds. shapes: of the shallow models.
    """
    plain = replace(rates, gaps=Curve.flat(1.0))
    factors: dict[Widths, list[float]] = {}
    for step, seconds in steps.items():
        parts = _parts(plain, step, shapes[step.widths])
        kernels = sum(ms for name, ms in parts.items() if name not in NOT_KERNELS)
        factors.setdefault(step.widths, []).append((1e3 * seconds - parts["embedding"]) / kernels)
    points = ((widths.hidden, max(LEAST_GAPS, mean(found))) for widths, found in factors.items())
    return replace(rates, gaps=curve_of(points))


def predicted_ms(rates: Rates, step: WholeStep, shape: ModelShape) -> float:
    """Return the predicted device time of a measured step."""
    parts = _parts(rates, step, shape)
    return sum(ms for name, ms in parts.items() if name not in NOT_KERNELS) + parts["embedding"]


def step_records(rates: Rates, steps: Mapping[WholeStep, float], shapes: Mapping[Widths, ModelShape]) -> dict[str, Any]:
    """Return name -> measured and predicted milliseconds."""
    return {
        step.name: {"measured_ms": 1e3 * seconds, "predicted_ms": predicted_ms(rates, step, shapes[step.widths])}
        for step, seconds in steps.items()
    }


def worst_error(records: Iterable[Mapping[str, float]]) -> float:
    """Return the largest relative error of the predicted steps."""
    return max(abs(step["predicted_ms"] / step["measured_ms"] - 1) for step in records)


def _parts(rates: Rates, step: WholeStep, shape: ModelShape) -> Mapping[str, float]:
    config = parse(TrainConfig, {
        "model": {"path": step.widths.model},
        "data": {"train": "random", "max_seq_length": SAMPLE},
        "lora": {"rank": RANK},
        "train": {
            "max_tokens": 10**9, "micro_batch_size": step.num_samples, "gradient_accumulation_steps": 1,
            "activation_checkpointing": step.policy.setting, "keep_layers": 0, "host_layers": 0, "weight_cache_gib": 0.0,
            "cuda_graphs": True,
        },
    })  # fmt: skip
    return predict_speed(config, shape, replace(UNKNOWN, rates=rates)).parts
