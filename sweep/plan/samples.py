"""Warn of data too small for what a sweep makes of it, from the numbers that `prepare` found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from engine.command_answers import PreparedFacts
from engine.sources.hub_ids import is_only_on_hub
from engine.units import counted
from sweep.config.sweep import SweepConfig

MAX_PASSES = 20  # beyond, an adapter learns the samples by heart
MIN_EVAL_SAMPLES = 32  # below, chance decides between trials


def passes_line(config: SweepConfig, facts: PreparedFacts) -> str | None:
    """Return how often a trial reads each sample; None if the tokens of a pass are not known."""
    tokens, budget = facts.num_train_tokens, config.train.max_tokens
    if not tokens:
        return None
    passes = budget / tokens
    times = f"{passes:,.0f} passes" if passes >= 10 else f"{passes:.3g} {'pass' if passes == 1 else 'passes'}"
    read = facts.num_train_samples * passes
    samples = f"about {counted(max(round(read), 1), 'sample')}"
    return f"{counted(budget, 'token')} a trial = {times} over {counted(tokens, 'token')}: {samples}"


def data_warnings(config: SweepConfig, facts: PreparedFacts, given: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each doubt about the data.

    given: keys of the command line. An experiment of conf/ may choose few evaluation samples to be
    quick; it says so in its own file.
    """
    passes = config.train.max_tokens / facts.num_train_tokens if facts.num_train_tokens else 0.0
    if passes > MAX_PASSES:
        samples, tokens = counted(facts.num_train_samples, "training sample"), counted(facts.num_train_tokens, "token")
        yield (
            f"each trial reads the {samples} ({tokens}) {passes:,.0f} times: more than {MAX_PASSES} passes mostly learn them "
            "by heart; lower train.max_tokens"
        )
    is_chosen = facts.num_eval_samples >= config.data.eval_max_samples and "data.eval_max_samples" not in given
    if facts.num_eval_samples < MIN_EVAL_SAMPLES and not is_chosen:
        samples, decide = counted(facts.num_eval_samples, "evaluation sample"), "decide" + "s" * (facts.num_eval_samples == 1)
        yield (
            f"{samples} {decide} which trial is best; with fewer than {MIN_EVAL_SAMPLES}, chance decides much of it: "
            "raise data.eval_fraction or data.eval_max_samples, or give data.eval"
        )


def unchecked_line(config: SweepConfig, fault: str) -> str | None:
    """Return the line for what the hub did not deliver; None if the fault is of another kind.

    fault: the engine's line, `field = value: what is allowed`.
    """
    field = fault.partition(" = ")[0]
    source = {"model.path": config.model.path, "data.train": config.data.train, "data.eval": config.data.eval}.get(field)
    if source is None or not is_only_on_hub(source):
        return None
    rest = "model, template and samples" if field == "model.path" else "template and samples"
    return f"unchecked  {rest}: the hub did not deliver {field} = {source} now ({fault.partition(': ')[2]})"
