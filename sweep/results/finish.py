"""End a sweep: choose the winner, evaluate it again from its files, write best/ and leaderboard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.command_answers import AdapterEvaluation
from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.errors import EngineError
from engine.units import perplexity
from sweep.execution.engine_commands import evaluate as evaluate_here
from sweep.folder.sweep_folder import SweepFolder
from sweep.folder.timeline import Timeline
from sweep.results.best_folder import write_best
from sweep.results.leaderboard import write_leaderboard
from sweep.results.reevaluation import Reevaluation, compare
from sweep.trials.record import Outcome, TrialRecord
from sweep.trials.selection import Rule

DEFAULT_RULE = Rule()
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
) -> tuple[TrialRecord | None, dict[str, Any]]:
    """Return the winner, or None if no adapter can be chosen, and the summary.

    Writes the leaderboard in any case. num_examples: see SweepSection; evaluate: measures the
    winner again, by default `sweep.execution.engine_commands.evaluate`.
    """
    best = rule.best(records)
    ours = Counter(record.outcome for record in records if record.source is None)
    summary: dict[str, Any] = {f"num_{outcome.lower()}": count for outcome, count in ours.items()} | _times(folder)
    if best is None:
        write_leaderboard(folder.path, records, sweep_name, None, rule)
        note("no trial got far enough, so there is no adapter to choose; the leaderboard shows how each trial ended")
        return None, summary
    note(f"evaluating the adapter of trial {best.number} again, from its files")
    try:
        config = parse(TrainConfig, best.config)
        measured = evaluate(config, folder.trial(best.number) / "adapter", engine_command, num_examples)
    except EngineError as error:
        write_leaderboard(folder.path, records, sweep_name, None, rule)
        note(f"WARNING: the adapter of trial {best.number} could not be evaluated again, so best/ was not written: {error}")
        return None, summary
    reevaluation = compare(measured, best.score, device)
    _keep_examples(folder, best, measured, note)
    write_best(folder.best, best, reevaluation, sweep_name, rule, measured.examples or [])
    write_leaderboard(folder.path, records, sweep_name, reevaluation, rule)
    note(_result_text(folder, best, reevaluation))
    for line in _remarks(records, best, rule):
        note(line)
    summary |= {
        "best_eval_loss": reevaluation.eval_loss,
        "base_eval_loss": reevaluation.base_eval_loss,
        "reevaluation_agrees": str(reevaluation.agrees),
    }
    return best, summary


def _times(folder: SweepFolder) -> dict[str, float]:
    """Return what the sweep has spent over all sessions.

    slot_hours: hours for which slots were held; dead_time_s: seconds lost between trials.
    """
    spans = Timeline(folder.timeline, mend=False).spans
    held_s = sum(span.ended_s - span.assigned_s for span in spans if span.ended_s is not None)
    return {"slot_hours": held_s / 3600.0, "dead_time_s": sum(span.dead_time_s or 0.0 for span in spans)}


def _remarks(records: list[TrialRecord], best: TrialRecord, rule: Rule) -> list[str]:
    """Add what the table of losses does not say: the Pareto front, and a better earlier sweep."""
    front = [str(record.number) for record in rule.front(records)]
    lines = [f"pareto front of {', '.join(rule.objectives)}: trials {', '.join(front)}"] if front else []
    earlier = [r for r in records if r.source is not None and r.outcome is Outcome.COMPLETE and r.score is not None]
    leader = min(earlier, key=lambda record: record.score, default=None)
    if leader is not None and leader.score < best.score:
        lines.append(f"an earlier trial did better: eval loss {leader.score:.4f}, {leader.source}; its adapter is there")
    return lines


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
        f"{'':24}eval loss  perplexity",
        _loss_line("base model", base),
        _loss_line(f"best adapter (trial {best.number})", tuned),
        "",
    ]
    if not reevaluation.agrees:
        lines.insert(
            0,
            f"WARNING: the adapter on disk scores {tuned:.4f}, but trial {best.number} reported {best.score:.4f}: "
            "do not trust this adapter until you know why",
        )
    return "\n".join([*lines, f"adapter      {folder.best}", f"leaderboard  {folder.path / 'leaderboard.md'}"])


def _loss_line(name: str, loss: float) -> str:
    return f"{name:24}{loss:9.4f}  {perplexity(loss):10.3f}"
