"""Make curves like those of LoRA trials, to develop searches on and to test them on other curves.

The final loss of a config is quadratic in the logarithm of its effective rate around an optimum
that depends on rank, targets and the alpha convention. Above the optimum it rises faster, and far above
it trials diverge. Loss falls as a power of the tokens. While the rate is high, its noise hides what
the end will show: under cosine decay good high rates look bad early. FAMILIES differ in all of this.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .design import ALPHAS, DROPOUTS, LENGTHS, RANKS, alpha_of

MAX_TOKENS, NUM_RUNGS = 393_216, 16
WORSE = {"q_v": 0.030, "attention": 0.018, "mlp": 0.006, "all-linear": 0.0}  # nats above the best


@dataclass(frozen=True)
class Family:
    """Set how losses depend on configs and tokens.

    best_rate: log10 of the best rate at rank 16. curvature: nats a squared decade below the
    optimum. steep: how many times steeper above it. rank_gain: nats for each doubling of the rank
    up to 64. length_gain: nats lost for each halving of the length. decay: exponent of the power law
    in tokens. drop: nats that training gains. heat: nats that a tenfold rate costs while its decay
    has not begun. noise: standard deviation of a report in nats, and of a seed. late: nats that the
    longest samples cost at the first rung, less and less until the end, so that early ranks mislead.
    wander: standard deviation of a curve of its own in nats, which is gone at the end: curves cross.
    """

    best_rate: float = -3.1
    curvature: float = 0.06
    steep: float = 2.0
    rank_gain: float = 0.006
    length_gain: float = 0.01
    decay: float = 0.35
    drop: float = 0.5
    heat: float = 0.08
    noise: float = 0.003
    targets_scale: float = 1.0
    late: float = 0.0
    wander: float = 0.0


FAMILIES = {
    "usual": Family(),
    "flat": Family(curvature=0.02, rank_gain=0.002, length_gain=0.003, targets_scale=0.4, noise=0.002),
    "sharp": Family(curvature=0.15, steep=4.0, best_rate=-3.5, heat=0.2),
    "hot": Family(best_rate=-2.4, steep=6.0, heat=0.25, decay=0.25),
    "small": Family(rank_gain=-0.006, length_gain=-0.008, best_rate=-3.8, targets_scale=-0.7),
    "early": Family(decay=0.9, heat=0.02, drop=0.3),
    "noisy": Family(noise=0.01),
    "loud": Family(noise=0.025, heat=0.12),
    "late": Family(late=0.08, length_gain=0.02, drop=0.3),
    "crossing": Family(wander=0.03, heat=0.12),
}


def make_content(family: str = "usual", num_configs: int = 112, seed: int = 0, num_twins: int = 24) -> dict[str, Any]:
    """Return the content of a curve file: cosine trials, and second seeds of the first configs."""
    rng = random.Random(f"{family} {seed}")
    configs = [_config(rng) for _ in range(num_configs)]
    trials = []
    for index, params in enumerate(configs):
        for twin in range(2 if index < num_twins else 1):
            losses = curve(FAMILIES[family], params, random.Random(f"{family} {seed} {index} {twin}"))
            trials.append({
                "config": index, "lr_schedule": "cosine", "seed": twin, "params": params, "loss": losses, "average": None,
                "outcome": "COMPLETE" if len(losses) == NUM_RUNGS else "DIVERGED",
                "num_trainable": params["lora.rank"] * 30_000, "lora_alpha": alpha_of(params["alpha"], params["lora.rank"])[0],
                "use_rslora": params["alpha"] == "rslora8",
            })  # fmt: skip
    return {"format": 1, "task": {"name": family, "max_tokens": MAX_TOKENS, "num_rungs": NUM_RUNGS}, "trials": trials}


def curve(family: Family, params: Mapping[str, Any], rng: random.Random) -> list[float]:
    """Return the losses of one trial by rung in nats, cut where it diverges."""
    rank, rate = params["lora.rank"], math.log10(params["optim.learning_rate"])
    scaling = alpha_of(params["alpha"], rank)[0] / (math.sqrt(rank) if params["alpha"] == "rslora8" else rank)
    # a larger scaling acts like a larger rate, but less than in proportion
    away = rate + 0.5 * math.log10(scaling / 2.0) - family.best_rate + 0.15 * (params["lora.target_modules"] == "all-linear")
    if away > 1.3 + rng.gauss(0.0, 0.1):
        return [2.5 + rng.random() for _ in range(rng.randrange(4))]
    floor = 1.5 + family.curvature * away**2 * (family.steep if away > 0 else 1.0)
    floor += family.targets_scale * WORSE[params["lora.target_modules"]]
    floor += family.rank_gain * abs(math.log2(64 / rank)) + 0.02 * params["lora.lora_dropout"]
    floor += family.length_gain * math.log2(1024 / params["data.max_seq_length"]) + rng.gauss(0.0, family.noise / 2)
    early = family.late * math.log2(params["data.max_seq_length"] / LENGTHS[0]) / math.log2(LENGTHS[-1] / LENGTHS[0])
    early += rng.gauss(0.0, family.wander) if family.wander else 0.0
    losses = []
    for rung in range(1, NUM_RUNGS + 1):
        share = rung / NUM_RUNGS
        heat = family.heat * 10 ** min(away, 1.0) * 0.5 * (1.0 + math.cos(math.pi * share))
        slow = 1.0 + max(0.0, -away)  # low rates learn later
        power = family.drop * ((1.0 + 15.0 * share / slow) ** -family.decay - 16.0**-family.decay)
        losses.append(round(floor + max(power, 0.0) + heat + early * (1.0 - share) + rng.gauss(0.0, family.noise / 2), 6))
    return losses


def _config(rng: random.Random) -> dict[str, Any]:
    return {
        "lora.rank": rng.choice(RANKS), "lora.target_modules": rng.choice(list(WORSE)),
        "optim.learning_rate": float(f"{10 ** rng.uniform(-5.0, -2.0):.3g}"), "alpha": rng.choice(ALPHAS),
        "lora.lora_dropout": rng.choice(DROPOUTS), "data.max_seq_length": rng.choice(LENGTHS),
    }  # fmt: skip
