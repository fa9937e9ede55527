"""Decide what `train.matmul=auto` means for a sweep: once, for all its trials and cards.

It takes the fastest of AUTO_MODES by the speeds that the forecast predicts. Products in INT8 must have
been measured on every card: a data sheet does not tell how fast our kernels are. The choice goes into
the sweep's config, so a resume, another card and a later measurement change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.config.matmul import AUTO_MATMUL, AUTO_MODES, Matmul
from sweep.plan.feasibility import Feasibility
from sweep.plan.forecast import corners
from sweep.plan.sweep_plan import SweepPlan
from sweep.space.space import Space

PATH = "train.matmul"
LEAST_GAIN = 1.03  # predictions are off by a few percent
MOST_POINTS = 6  # of the space, because planning takes up to a second each


@dataclass(frozen=True)
class MatmulChoice:
    """Hold the mode that `auto` means, and why, in a few words."""

    mode: Matmul
    reason: str

    def line(self) -> str:
        return f"matmul     auto is {self.mode}: {self.reason}"


def with_chosen_matmul(plan: SweepPlan, feasibility: Feasibility, is_new: bool) -> tuple[SweepPlan, list[str]]:
    """Return the plan with nothing left `auto` in `train.matmul`, and the line that says what was chosen.

    is_new: a sweep that goes on keeps its setting. `auto` in it is an older version's, which meant bf16.
    """
    if plan.config.train.matmul != "auto" or not is_new:
        return plan, []
    choice = choose_matmul(plan.space, plan.base(), feasibility)
    return plan.with_matmul(choice.mode), [choice.line()]


def choose_matmul(space: Space, base: Mapping[str, Any], feasibility: Feasibility) -> MatmulChoice:
    """Return what `auto` means for this space on these cards."""
    if base["model"].get("train_tokens"):
        return MatmulChoice(AUTO_MATMUL, "rows of trained tokens need it")
    if base.get("lora", {}).get("use_dora") or any(one.path == "lora.use_dora" for one in space.dimensions):
        return MatmulChoice(AUTO_MATMUL, "DoRA needs it")
    if base["model"]["quantization"] != "nf4" or any(one.path == "model.quantization" for one in space.dimensions):
        return MatmulChoice(AUTO_MATMUL, "INT8 codes are made of NF4 weights only")
    if not feasibility.predicts or not feasibility.knows_all_cards:
        return MatmulChoice(AUTO_MATMUL, "no speed is predicted for these cards")
    unmeasured = [card.name for card in feasibility.cards if card.rates is None or card.rates.int8 is None]
    if unmeasured:
        where = f"on {', '.join(unmeasured)}"
        return MatmulChoice(AUTO_MATMUL, f"products in INT8 are not measured {where} (`python -m engine calibrate`)")
    points = corners(space)
    chosen = points[: MOST_POINTS - 1] + points[-1:] if len(points) > MOST_POINTS else points
    times = {mode: _times(space, base, feasibility, chosen, mode) for mode in AUTO_MODES}
    gains = {mode: _least_gain(times[Matmul.BF16], times[mode]) for mode in AUTO_MODES}
    best = max(gains, key=lambda mode: gains[mode])
    if gains[best] < LEAST_GAIN:
        others = ", ".join(f"{mode} {gain:.2f}" for mode, gain in gains.items() if mode is not Matmul.BF16)
        return MatmulChoice(AUTO_MATMUL, f"times its speed on the card that gains least: {others}")
    return MatmulChoice(best, f"{gains[best]:.2f} times the speed of bf16 on the card that gains least")


def _times(
    space: Space, base: Mapping[str, Any], feasibility: Feasibility, points: list[dict[str, Any]], mode: Matmul
) -> dict[str, dict[int, float]]:
    """Return the predicted seconds for a token by card and point; points that do not fit a card are left out."""
    config = {**base, "train": {**base["train"], "matmul": mode.value}}
    found: dict[str, dict[int, float]] = {}
    for number, point in enumerate(points):
        for card, speed in feasibility.speeds(space.apply(config, point)).items():
            found.setdefault(card, {})[number] = 1.0 / speed
    return found


def _least_gain(plain: dict[str, dict[int, float]], ours: dict[str, dict[int, float]]) -> float:
    """Return how much faster a mode is than bf16 over the points that fit in both, on the card that gains least."""
    gains = []
    for card, times in plain.items():
        both = times.keys() & ours.get(card, {}).keys()
        if both:
            gains.append(sum(times[point] for point in both) / sum(ours[card][point] for point in both))
    return min(gains, default=1.0)
