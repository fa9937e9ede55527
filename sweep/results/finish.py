"""End a sweep: choose the winner, evaluate it again from its files, write best/ and leaderboard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.command_answers import AdapterEvaluation
from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.errors import EngineError
from engine.units import perplexity
from sweep.execution.engine_commands import evaluate as evaluate_here
from sweep.folder.slot_times import PARTS, both_shares, shares_text, slot_times, steady_share, steady_share_with_eval, totals
from sweep.folder.sweep_folder import SweepFolder
from sweep.folder.timeline import Timeline, spent_on_finals
from sweep.results.best_folder import write_best
from sweep.results.contest import with_contest
from sweep.results.final_seeds import read_final_seeds
from sweep.results.leaderboard import write_leaderboard
from sweep.results.reevaluation import Reevaluation, compare
from sweep.results.verdict import SweepVerdict, judge, last_held
from sweep.text import duration_text, number
from sweep.trials.record import TrialRecord
from sweep.trials.selection import Rule

DEFAULT_RULE = Rule()
NO_ADAPTER = "no trial got far enough, so there is no adapter to choose; the leaderboard shows how each trial ended"
Evaluate = Callable[[TrainConfig, Path, str, int], AdapterEvaluation]


def finish(
    folder: SweepFolder,
    records: list[TrialRecord],
    *,
    sweep_name: str,
    device: str,
    engine_command: str,
    note: Callable[[str], None],
    rule: Rule = DEFAULT_RULE,
    num_examples: int = 0,
    evaluate: Evaluate = evaluate_here,
) -> tuple[SweepVerdict, dict[str, Any]]:
    """Return the verdict on the sweep, and the summary for the tracker.

    Only a verdict with a reevaluation has an adapter in `best/`. Writes the leaderboard in any
    case. num_examples: see SweepSection; evaluate: measures the winner again, by default
    `sweep.execution.engine_commands.evaluate`.
    """
    rule = with_contest(rule, records)
    seeds = read_final_seeds(folder, records)
    verdict = judge(records, rule, held=last_held(folder), final_seeds=seeds)
    measured = _measure(folder, verdict, engine_command, num_examples, evaluate, note)
    if measured is not None:
        reevaluation = compare(measured, verdict.best.eval_loss, device, len(rule.contenders(records)))
        verdict = judge(records, rule, reevaluation, final_seeds=seeds)
        if measured.metrics_error is not None:
            note(f"WARNING: {measured.metrics_error}")
        _keep_examples(folder, verdict.best, measured, note)
        write_best(folder.best, verdict, sweep_name, measured.examples or [])
    write_leaderboard(folder.path, records, sweep_name, verdict)
    if measured is not None:
        note(_result_text(folder, verdict.best, verdict.reevaluation))
    times = _times(folder)
    for line in [*_remarks(records, verdict), *_time_line(times)]:
        note(line)
    ours = Counter(record.outcome for record in records if record.source is None)
    counts = {f"num_{outcome.lower()}": count for outcome, count in ours.items()}
    return verdict, {**counts, **times, **verdict.summary()}


def _measure(
    folder: SweepFolder,
    verdict: SweepVerdict,
    engine_command: str,
    num_examples: int,
    evaluate: Evaluate,
    note: Callable[[str], None],
) -> AdapterEvaluation | None:
    """Measure the winner again from its files; None if there is none, or it fails."""
    best = verdict.best
    if best is None:
        note(NO_ADAPTER if verdict.nearest is None else verdict.best_line)
        return None
    note(f"evaluating the adapter of trial {best.number} again, from its files")
    try:
        config = parse(TrainConfig, best.config)
        return evaluate(config, folder.trial(best.number) / "adapter", engine_command, num_examples)
    except EngineError as error:
        note(f"WARNING: the adapter of trial {best.number} could not be evaluated again, so best/ was not written: {error}")
        return None


def _times(folder: SweepFolder) -> dict[str, Any]:
    """Return what the sweep has spent over all sessions.

    slot_hours: hours for which slots were held, final seeds included; dead_time_s: seconds lost between trials. train_s
    and so on: the seconds of all slots by part (see PARTS); steady_share: train_s as their share, and
    steady_share_with_eval with eval_s. slots: the same of each slot.
    """
    timeline = Timeline(folder.timeline, mend=False)
    held_s = sum(span.ended_s - span.assigned_s for span in timeline.spans if span.ended_s is not None)
    times = slot_times(timeline)
    parts = totals(times)
    held_s += spent_on_finals(folder)[0]
    known = {"slot_hours": held_s / 3600.0, "dead_time_s": sum(span.dead_time_s or 0.0 for span in timeline.spans)}
    if steady_share(parts) is None:
        return known
    slots = [{"slot": ", ".join(time.names), **_named(time.parts)} for time in times]
    return {**known, **_named(parts), "slots": slots}


def _named(parts: Mapping[str, float]) -> dict[str, float | None]:
    shares = {"steady_share": steady_share(parts), "steady_share_with_eval": steady_share_with_eval(parts)}
    return {f"{part}_s": seconds for part, seconds in parts.items()} | shares


def _time_line(times: dict[str, Any]) -> list[str]:
    """Say in a line what the slots' hours went to. Empty where no one told."""
    if "steady_share" not in times:
        return []
    parts = {part: times[f"{part}_s"] for part in PARTS}
    return [f"time         {duration_text(sum(parts.values()))} of all slots: {shares_text(parts)}; so {both_shares(parts)}"]


def _remarks(records: list[TrialRecord], verdict: SweepVerdict) -> list[str]:
    """Add what the table of losses does not say: Pareto front, ties, best/, an earlier sweep."""
    rule = verdict.rule
    front = [str(record.number) for record in rule.front(records)]
    lines = [f"pareto front of {', '.join(rule.objectives)}: trials {', '.join(front)}"] if front else []
    return [*lines, *filter(None, [verdict.contest_line, verdict.seeds_line, verdict.held_line, verdict.earlier_line])]


def _keep_examples(folder: SweepFolder, best: TrialRecord, measured: AdapterEvaluation, note: Callable[[str], None]) -> None:
    """Write the examples, or the reason why there are none.

    If none were asked for, remove those of an earlier winner.
    """
    if measured.examples_error is not None:
        note(f"WARNING: no examples were generated ({measured.examples_error}); the losses are unaffected")
    named = {"examples": measured.examples, "error": measured.examples_error, "seconds": measured.examples_s}
    examples = {name: value for name, value in named.items() if value is not None}
    if examples:
        folder.write_examples({"trial": best.number, **examples})
    else:
        folder.examples_file.unlink(missing_ok=True)


def _result_text(folder: SweepFolder, best: TrialRecord, reevaluation: Reevaluation) -> str:
    base, tuned = reevaluation.base_eval_loss, reevaluation.eval_loss
    lines = [
        "",
        f"{'':24}eval loss{'' if reevaluation.is_of_pairs else '  perplexity'}",
        _loss_line("base model", base, reevaluation.is_of_pairs),
        _loss_line(f"best adapter (trial {best.number})", tuned, reevaluation.is_of_pairs),
        *([f"gain         {reevaluation.gain.text}"] if reevaluation.gain else []),
        *_set_lines(reevaluation),
        *(_metric_lines(reevaluation)),
        "",
    ]
    if not reevaluation.agrees:
        lines.insert(
            0,
            f"WARNING: the adapter on disk scores {tuned:.4f}, but trial {best.number} reported {best.eval_loss:.4f}: "
            "do not trust this adapter until you know why",
        )
    return "\n".join([*lines, f"adapter      {folder.best}", f"leaderboard  {folder.path / 'leaderboard.md'}"])


def _set_lines(reevaluation: Reevaluation) -> list[str]:
    """Return a table of the losses on several evaluation sets; nothing with one."""
    if not reevaluation.eval_losses:
        return []
    before = reevaluation.base_eval_losses
    rows = [f"{name:24}{number(before[name], '.4f'):>10}  {number(x, '.4f'):>12}" for name, x in reevaluation.eval_losses.items()]
    return ["", f"{'nats a pair' if reevaluation.is_of_pairs else 'nats per target token':24}base model  best adapter", *rows]


def _metric_lines(reevaluation: Reevaluation) -> list[str]:
    """Return a table of the task metrics; nothing without any."""
    if not reevaluation.metrics:
        return []
    rows = [(name, reevaluation.base_metrics.get(name), value) for name, value in reevaluation.metrics.items()]
    cells = [f"{name:24}{'-' if before is None else format(before, '.4f'):>10}  {after:12.4f}" for name, before, after in rows]
    return ["", f"{'':24}base model  best adapter", *cells]


def _loss_line(name: str, loss: float, of_pairs: bool) -> str:
    return f"{name:24}{loss:9.4f}" + ("" if of_pairs else f"  {perplexity(loss):10.3f}")
