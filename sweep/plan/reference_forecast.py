"""Predict what the reference model costs trials that learn from pairs: one forward pass, once on each machine."""

from __future__ import annotations

from engine.command_answers import EVALUATION, TRAINING, PreparedFacts
from engine.config.preference_section import PREFERENCE
from engine.config.trial import TrainConfig
from sweep.text import duration_text


def reference_line(config: TrainConfig, facts: PreparedFacts, tokens_per_second: float | None) -> str | None:
    """Return the line of the forecast on the reference; None if trials have none.

    tokens_per_second: of an evaluation, whose rows are the same; None if it is not predicted.
    """
    if config.data.format != PREFERENCE or not config.preference.needs_reference:
        return None
    own = [account for account in facts.accounts if account.part == TRAINING]
    whole = max((account.num_tokens for account in own), default=0)
    evaluated = sum(account.num_tokens for account in facts.accounts if account.part.split("/")[0] == EVALUATION)
    tokens = min(whole, config.train.max_tokens) + evaluated
    model = "the base model" if config.lora.start_from is None else "the model with the adapter of lora.start_from"
    about = "" if tokens_per_second is None else f", about {duration_text(tokens / tokens_per_second)}"
    return f"reference  {model} reads up to {tokens:,} tokens{about}, once on each machine; all trials share what it says"
