"""Define the `lora` section: the adapter's shape, scaling and start. No torch."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from engine.config.parsing import Fraction, ListAsTuple, StrictModel
from engine.errors import InputError

ALL_LINEAR = "all-linear"
DIGEST = re.compile("[0-9a-f]{16}")


class LoraConfig(StrictModel):
    """The adapter on each target module (Hu et al., arXiv:2106.09685).

    y = W x + scaling * B A dropout(x).
    """

    rank: Annotated[int, Field(ge=1, le=65_536)] = 16
    lora_alpha: Annotated[float, Field(ge=1e-6, le=1e6)] | None = Field(None, description="none: 2 * rank")
    lora_dropout: Fraction = 0.0
    target_modules: Annotated[str | tuple[str, ...], ListAsTuple] = ALL_LINEAR
    use_rslora: bool = False
    use_dora: bool = Field(False, description="DoRA: trains the length of each output feature's weights on its own")
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=65_536)]] = Field(
        {}, description="ranks of some layers, by a name's end or a regular expression: {up_proj: 8}; the scaling stays"
    )
    alpha_pattern: dict[str, Annotated[float, Field(ge=1e-6, le=1e6)]] = Field(
        {}, description="lora_alpha of some layers, as rank_pattern names them: {up_proj: 8}; each over its layer's own rank"
    )
    start: Literal["default", "pissa", "loftq"] = Field(
        "default",
        description="A and B before the first step: default: A random, B zero; pissa: the weight's principal components, which a "
        "frozen second half takes off again; loftq: what NF4 lost of the weight",
    )
    start_from: str | None = Field(
        None, min_length=1, description="PEFT folder of an adapter to train on from, of the same targets and at most this rank"
    )
    start_digest: str | None = Field(
        None, description="16 hex digits of that adapter's files, as data.json has them; other files are refused"
    )

    @field_validator("start_digest")
    @classmethod
    def _is_a_digest(cls, value: str | None) -> str | None:
        if value is not None and not DIGEST.fullmatch(value):
            raise ValueError("must be 16 hexadecimal digits in small letters, as data.json has them")
        return value

    @model_validator(mode="after")
    def _targets_not_empty(self) -> LoraConfig:
        if not self.target_modules or (not isinstance(self.target_modules, str) and not all(self.target_modules)):
            raise ValueError("target_modules must name at least one module, or be 'all-linear'")
        return self

    @model_validator(mode="after")
    def _patterns_are_valid(self) -> LoraConfig:
        for field, key in [(f, key) for f in ("rank_pattern", "alpha_pattern") for key in getattr(self, f)]:
            try:
                re.compile(key)
            except re.error as error:
                raise InputError(f"lora.{field}", key, f"must be a valid regular expression ({error})") from None
        return self

    @model_validator(mode="after")
    def _one_start(self) -> LoraConfig:
        if self.start != "default" and self.start_from is not None:
            raise InputError("lora.start", self.start, "must be default with lora.start_from, which is a start of its own")
        if self.start_digest is not None and self.start_from is None:
            raise InputError("lora.start_digest", self.start_digest, "needs lora.start_from, whose files have that digest")
        return self

    @property
    def halves(self) -> int:
        """Return how many adapters of `rank` a layer holds: 2 under PiSSA, whose second is frozen; else 1."""
        return 2 if self.start == "pissa" else 1

    @property
    def alpha(self) -> float:
        """Return lora_alpha, or 2 * rank if it is not given."""
        return 2.0 * self.rank if self.lora_alpha is None else self.lora_alpha

    @property
    def scaling(self) -> float:
        """Return alpha / rank; with rsLoRA alpha / sqrt(rank) (Kalajdzievski, arXiv:2312.03732)."""
        return self.alpha / self.divisor(self.rank)

    def divisor(self, rank: int) -> float:
        """Return what an alpha is divided by at a rank: the rank itself, or with rsLoRA its root."""
        return math.sqrt(rank) if self.use_rslora else rank
