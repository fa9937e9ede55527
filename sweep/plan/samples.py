"""Warn of data too small for what a sweep makes of it, from the numbers that `prepare` found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from engine.command_answers import EVALUATION, TRAINING, PreparedFacts
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
    for name, share, times in mixture_passes(config, facts):
        if times > MAX_PASSES:
            yield (
                f"each trial reads {name} {times:,.0f} times, as its weight gives it {share:.0%} of the tokens: more than "
                f"{MAX_PASSES} passes mostly learn it by heart; lower its weight or train.max_tokens"
            )
    if passes > MAX_PASSES:
        samples, tokens = counted(facts.num_train_samples, "training sample"), counted(facts.num_train_tokens, "token")
        yield (
            f"each trial reads the {samples} ({tokens}) {passes:,.0f} times: more than {MAX_PASSES} passes mostly learn them "
            "by heart; lower train.max_tokens"
        )
    sets = {a.part: a.num_used for a in facts.accounts if a.part.startswith(f"{EVALUATION}/")} or {"": facts.num_eval_samples}
    for part, number in sets.items():
        is_chosen = number >= config.data.eval_max_samples and "data.eval_max_samples" not in given
        if number >= MIN_EVAL_SAMPLES or is_chosen:
            continue
        name = part.partition("/")[2]
        samples, decide = counted(number, "evaluation sample") + f" of {name}" * bool(name), "decide" + "s" * (number == 1)
        yield (
            f"{samples} {decide} which trial is best; with fewer than {MIN_EVAL_SAMPLES}, chance decides much of it: "
            "raise data.eval_fraction or data.eval_max_samples, or give data.eval"
        )


def mixture_passes(config: SweepConfig, facts: PreparedFacts) -> list[tuple[str, float, float]]:
    """Return field, share of a trial's tokens and passes of each source of a mixture, at the config's own weights."""
    found, total = [], sum(source.weight for source in config.data.mixture)
    for i, source in enumerate(config.data.mixture):
        tokens = min((account.num_tokens for account in facts.accounts if account.part == f"{TRAINING}/{i}"), default=0)
        share = source.weight / total
        found.append((f"data.train.{i}", share, share * config.train.max_tokens / tokens if tokens else 0.0))
    return found


def mixture_line(config: SweepConfig, facts: PreparedFacts) -> str | None:
    """Return the line on what a trial reads of each source; None without a mixture."""
    parts = [f"{name} {share:.1%} of the tokens, {times:.2g} passes" for name, share, times in mixture_passes(config, facts)]
    tokens = f"{config.train.max_tokens:,} tokens a trial"
    return f"mixture of {tokens}, at data.train's own weights: {'; '.join(parts)}" if parts else None


def unchecked_line(config: SweepConfig, fault: str) -> str | None:
    """Return the line for what the hub did not deliver; None if the fault is of another kind.

    fault: the engine's line, `field = value: what is allowed`.
    """
    field = fault.partition(" = ")[0]
    source = {"model.path": config.model.path, **config.data.sources()}.get(field)
    if source is None or not is_only_on_hub(source):
        return None
    rest = "model, template and samples" if field == "model.path" else "template and samples"
    return f"unchecked  {rest}: the hub did not deliver {field} = {source} now ({fault.partition(': ')[2]})"
