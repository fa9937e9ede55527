"""Define the `preference` section: what is learnt from pairs of a chosen and a rejected answer. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from engine.config.data_section import DataConfig
from engine.config.matmul import Matmul
from engine.config.metrics_section import PREFERENCE_ACCURACY
from engine.config.parsing import StrictModel
from engine.errors import InputError

PREFERENCE = "preference"
"""Value of data.format."""
IN_A_PAIR = 2  # sequences: the chosen answer and the rejected one, each behind the prompt
PairBeta = Annotated[float, Field(ge=1e-6, le=1e3)]


class PreferenceConfig(StrictModel):
    """The loss of a pair. It applies with data.format = preference, and to nothing else.

    With p(y) the model's probability of an answer, and q(y) that of the reference model, the DPO loss
    is -log sigmoid(beta * (log p(chosen) / q(chosen) - log p(rejected) / q(rejected))) (Rafailov,
    arXiv:2305.18290). ORPO needs no reference: it adds beta times -log sigmoid of the log odds
    ratio to the chosen answer's loss (Hong, arXiv:2403.07691, where beta is called lambda).
    """

    loss: Literal["dpo", "orpo"] = Field("dpo", description="dpo: against base or lora.start_from; orpo: no reference")
    beta: PairBeta = Field(
        0.1, description="dpo: how much a reward costs in distance from the reference; orpo: weight of the odds ratio"
    )
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = Field(
        0.0, description="dpo: the share of pairs whose labels may be wrong (conservative DPO); eval_loss has none"
    )
    eval_beta: PairBeta | None = Field(
        None, description="beta of eval_loss, so that trials with different betas compare; none: beta"
    )

    @property
    def needs_reference(self) -> bool:
        """Return whether the loss compares with a reference model."""
        return self.loss == "dpo"

    def describe(self) -> str:
        """Return the loss, and what eval_loss is, in a few words."""
        smoothing = f", label smoothing {self.label_smoothing:g}" if self.label_smoothing else ""
        text = f"{self.loss} with beta {self.beta:g}{smoothing}; eval_loss is the mean preference loss of a pair"
        return text if self.eval_beta is None else f"{text} with beta {self.eval_beta:g}"

    @property
    def judged(self) -> PreferenceConfig:
        """Return the section by which evaluation pairs are judged: with eval_beta, and without smoothing."""
        return self.model_copy(update={"beta": self.eval_beta or self.beta, "label_smoothing": 0.0})


def check_preference(
    section: PreferenceConfig, data: DataConfig, choose_by: str, matmul: Matmul, train_tokens: tuple[str, ...]
) -> None:
    """Raise InputError if the section does not fit the others. choose_by: that of the metrics."""
    if data.format != PREFERENCE:
        if choose_by == PREFERENCE_ACCURACY:
            raise InputError("metrics.choose_by", choose_by, f"needs data.format = {PREFERENCE}")
        for field, value in section:
            if value != type(section).model_fields[field].default:
                allowed = f"needs data.format = {PREFERENCE}: pairs of chosen and rejected answers"
                raise InputError(f"preference.{field}", value, allowed)
        return
    if data.overlong == "split":
        allowed = f"must be cut, drop or error with data.format = {PREFERENCE}: pieces are no pairs"
        raise InputError("data.overlong", "split", allowed)
    if train_tokens:  # the head's trained rows get no gradient from weighed losses
        raise InputError("model.train_tokens", list(train_tokens), f"must be empty with data.format = {PREFERENCE}")
    if section.needs_reference and matmul is Matmul.INT8:
        allowed = "must be bf16 or int8_backward with preference.loss = dpo: INT8 answers would differ from the reference's"
        raise InputError("train.matmul", str(matmul), allowed)
    if section.loss == "orpo" and section.label_smoothing:
        raise InputError("preference.label_smoothing", section.label_smoothing, "must be 0 with preference.loss = orpo")
