"""Define the `optim` section: the optimizer and the learning-rate schedule. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from engine.config.parsing import Fraction, StrictModel
from engine.errors import InputError

# fp32 holds no value nearer to 1, and the 8-bit optimizer computes 1 - beta in fp32
Beta = Annotated[float, Field(ge=0.0, le=0.9999999)]
LIONS = ("lion", "lion_8bit")
EIGHT_BIT = ("auto", "adamw_8bit", "lion_8bit")
"""Names whose states take 8 bits on CUDA."""


class OptimConfig(StrictModel):
    """The optimizer and the learning-rate schedule, which runs over tokens seen, not over steps."""

    name: Literal["auto", "adamw", "adamw_8bit", "lion", "lion_8bit", "muon"] = Field(
        "auto",
        description="auto: adamw_8bit on CUDA, adamw on CPU; lion needs a rate that is 3 to 10 times smaller; "
        "muon: orthogonal steps of AdamW's size, with beta1 as its momentum",
    )
    learning_rate: Annotated[float, Field(ge=1e-12, le=1e30)] = 2e-4
    loraplus_lr_ratio: Annotated[float, Field(ge=1e-3, le=1e4)] = Field(
        1.0, description="LoRA+: the rate of B over learning_rate, which is then the rate of A; 1: one rate"
    )
    lr_schedule: Literal["constant", "linear", "cosine", "wsd"] = Field(
        "cosine", description="wsd: warm-up, stable at the peak, then decay by 1 - sqrt over the last decay_ratio"
    )
    warmup_ratio: Fraction = 0.03
    decay_ratio: Annotated[float, Field(ge=1e-3, le=1.0)] = Field(0.2, description="share of max_tokens in which wsd decays")
    min_lr_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    weight_decay: Annotated[float, Field(ge=0.0, le=1e6)] = 0.0
    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: Annotated[float, Field(ge=1e-30, le=1e6)] = 1e-8
    max_grad_norm: Annotated[float, Field(ge=1e-12, le=1e12)] | None = 1.0
    ema_horizon: Annotated[float, Field(ge=1e-6, le=1.0)] | None = Field(
        None,
        description="average the adapter over about the last tokens, this share of all seen; evaluate both and keep the better; "
        "none: no average",
    )

    @model_validator(mode="after")
    def _schedule_fits(self) -> OptimConfig:
        if self.lr_schedule == "wsd" and self.warmup_ratio + self.decay_ratio > 1.0:
            left = f"at most {1.0 - self.warmup_ratio:g} with optim.warmup_ratio = {self.warmup_ratio:g}"
            raise InputError("optim.decay_ratio", self.decay_ratio, f"must be {left}: warm-up and decay must not overlap")
        return self

    @property
    def num_states(self) -> int:
        """Return how many values of state the optimizer keeps for each trained value."""
        return 1 if self.is_lion or self.name == "muon" else 2

    @property
    def has_8bit_states(self) -> bool:
        """Return True if the states take 8 bits on CUDA."""
        return self.name in EIGHT_BIT

    @property
    def is_lion(self) -> bool:
        return self.name in LIONS
