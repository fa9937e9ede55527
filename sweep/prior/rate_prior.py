"""Say which learning rate an adapter is likely to need, before any trial.

The rule is that of Schulman et al., "LoRA without regret" (Thinking Machines, 2025), as Tinker's
`get_lr` had it, for a LoRA of any rank with alpha 32 and scaling alpha / rank:

    rate = 5e-5 * 10 * (2000 / hidden size) ** P,    P = 0.781 for Llama and 0.0775 for Qwen

Other scalings need other rates. B starts at 0, and each of the adapter's `rank` rows moves by about
the rate in a step of Adam. Their sum is `scaling * B A`, so it moves by scaling * rank * rate while A
is near its start, and by scaling * rank * rate ** 2 once A has moved as well. For an equal change of
the weights, the best rate goes with (scaling * rank) ** -k, k between 1 and 1/2. With a fixed alpha
and scaling alpha / rank it does not depend on the rank; with alpha = 2 * rank it falls with it
(arXiv:2602.06204 derives and measures both).

LoRA+ moves B by a multiple of the rate, so `scaling * B A` moves by that multiple more, in both
cases. The multiple stands beside scaling * rank. Lion's steps have the size of the rate in every
element, and its authors advise a rate that is 3 to 10 times smaller (arXiv:2302.06675).

Not in the rule: dropout, targets, lengths, batch size and number of steps. Their effect is part of
the width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from engine.config.optim_section import OptimConfig
from engine.config.parsing import parse_dataclass
from engine.config.trial import LoraConfig
from engine.shape.model_shape import ModelShape

FULL_RATE, LORA_OVER_FULL, RULE_WIDTH = 5e-5, 10.0, 2000.0
RULE_ALPHA = 32.0
EXPONENTS = {"llama": 0.781, "qwen": 0.0775}
"""EXPONENTS maps the beginning of a family's name to the rule's exponent."""
OTHER_EXPONENT = sum(EXPONENTS.values()) / len(EXPONENTS)
FITTED_SIZES = (2048, 8192)  # hidden sizes of the models that the rule was fitted to
KAPPA, KAPPA_WIDTH = 0.75, 0.25  # the k above: the middle of its bounds, which lie one width away
# The best rates that Tinker measured later (20 models, one data set, a grid of factors of three)
# differ from the rule by 0.58 (Qwen), 0.69 (Llama) and 0.75 (others, by the mean exponent) in root
# mean square of ln(rate). Another data set, batch and number of steps add to that.
FAMILY_WIDTH, OTHER_WIDTH = 0.8, 1.0
EXPONENT_WIDTH = 0.35  # half the distance of the two exponents, for sizes beyond those fitted
LION_FACTOR, LION_WIDTH = math.sqrt(3.0 * 10.0), 0.6  # AdamW's rate over Lion's: the middle of what is advised, and half its span
# Published recipes of DPO and ORPO with LoRA take rates from 5e-6 to 5e-5, where those of the same authors
# take about 2e-4 for answers. The width spans that range.
PAIR_FACTOR, PAIR_WIDTH = 12.0, 1.0
ADAMW = OptimConfig()


@dataclass(frozen=True)
class RatePrior:
    """Describe ln(best optim.learning_rate) by a normal distribution.

    log_rate, width: mean and standard deviation for scaling * rank = 32. source: where they come
    from, one clause.
    """

    log_rate: float
    width: float
    source: str

    def of(self, lora: LoraConfig, optim: OptimConfig = ADAMW) -> tuple[float, float]:
        """Return mean and standard deviation of ln(best rate) for an adapter of this rank and scaling, and its optimizer."""
        log_ratio, lion = log_force(lora, optim) - math.log(RULE_ALPHA), LION_WIDTH if optim.is_lion else 0.0
        mean = self.log_rate - KAPPA * log_ratio - log_lion(optim)
        return mean, math.hypot(self.width, KAPPA_WIDTH * log_ratio, lion)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RatePrior:
        """Read plain data from JSON. Raises InputError if a key or a type is wrong."""
        return parse_dataclass(cls, dict(values), "rate_prior")


def log_force(lora: LoraConfig, optim: OptimConfig) -> float:
    """Return ln(scaling * rank * ratio of LoRA+): how far the weights move at a given rate."""
    return math.log(lora.scaling * lora.rank * optim.loraplus_lr_ratio)


def log_lion(optim: OptimConfig) -> float:
    """Return ln(AdamW's rate / this optimizer's), for equal learning."""
    return math.log(LION_FACTOR) if optim.is_lion else 0.0


def rate_prior(shape: ModelShape | None, for_pairs: bool = False) -> RatePrior | None:
    """Return what is known of a model's learning rate, None if its hidden size is not known.

    for_pairs: pairs of answers are learnt, and the rate is divided.
    A family of which no exponent is known gets the mean of the known ones, and a larger width.
    """
    if shape is None:
        return None
    size = shape.hidden_size
    named = next((family for family in EXPONENTS if shape.family.startswith(family)), None)
    exponent, width = (OTHER_EXPONENT, OTHER_WIDTH) if named is None else (EXPONENTS[named], FAMILY_WIDTH)
    rate = FULL_RATE * LORA_OVER_FULL * (RULE_WIDTH / size) ** exponent
    beyond = max(0.0, math.log(FITTED_SIZES[0] / size), math.log(size / FITTED_SIZES[1]))
    whose = f"{named.capitalize()}'s exponent" if named else f"the mean exponent, none is known for {shape.family}"
    formula = f"{FULL_RATE:g} * {LORA_OVER_FULL:g} * ({RULE_WIDTH:g} / {size}) ** {exponent:.4g}"
    width = math.hypot(width, EXPONENT_WIDTH * beyond)
    if for_pairs:
        source = f"{formula} / {PAIR_FACTOR:g} for pairs, {whose}"
        return RatePrior(math.log(rate / PAIR_FACTOR), math.hypot(width, PAIR_WIDTH), source)
    return RatePrior(math.log(rate), width, f"{formula}, {whose}")
