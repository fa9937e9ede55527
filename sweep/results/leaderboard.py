"""Write the leaderboard: every trial with its outcome, and the rule that chose the best."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.export.model_card import table
from engine.system.files import write_text
from sweep.results.verdict import SweepVerdict
from sweep.text import number, short_name
from sweep.trials.objectives import EVAL_LOSS, objective_values
from sweep.trials.paired import LEVEL, Contest
from sweep.trials.record import CONTENDERS, Outcome, TrialRecord
from sweep.trials.selection import Rule, median_speed

DEFAULT_RULE = Rule()
LAST_REPORT = ("tokens_seen", "num_trainable", "num_out_of_memory", "micro_batch_size", "activation_checkpointing")


def write_leaderboard(folder: Path, records: list[TrialRecord], sweep_name: str, verdict: SweepVerdict) -> None:
    """Write leaderboard.json and leaderboard.md, each replaced in one rename.

    Both list every trial with its outcome. Only trials that could be chosen have a rank: pruned
    trials, for example, have none.
    """
    best, rule, reevaluation = verdict.best, verdict.rule, verdict.reevaluation
    rows = board_rows(records, rule)
    front = [_front_row(record, rule) for record in rule.front(records)]
    board = {
        "sweep": sweep_name,
        "rule": rule.text,
        "objectives": list(rule.objectives),
        "pareto_front": front,
        "best_trial": best.number if best else None,
        "outcomes": _outcomes([record for record in records if record.source is None]),
        "reevaluation": reevaluation and reevaluation.to_dict(),
        "contest": rule.contest and _contest(rule.contest),
        "final_seeds": [found.to_dict() for found in verdict.final_seeds],
        "best_folder": verdict.held_dict(),
        "better_earlier_trial": verdict.earlier and verdict.earlier.source,
        "trials": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "leaderboard.json", json.dumps(finite(board), indent=2, allow_nan=False) + "\n")
    write_text(folder / "leaderboard.md", _markdown(sweep_name, verdict, board))


def board_rows(records: list[TrialRecord], rule: Rule = DEFAULT_RULE) -> list[dict[str, Any]]:
    """Return one row for each trial, in the order of the leaderboard."""
    return [_row(record, place, rule.contest) for place, record in enumerate(rule.rank(records), start=1)]


def _contest(contest: Contest) -> dict[str, Any]:
    """Return who was compared with the lowest loss, and who cannot be told apart from it."""
    return {
        "lowest": contest.lowest,
        "level": LEVEL,
        "num_samples": contest.num_samples,
        "num_compared": len(contest.differences),
        "tied": list(contest.tied),
        "left_out": [{"number": number, "reason": reason} for number, reason in sorted(contest.left_out.items())],
    }


def _above(contest: Contest | None, number: int) -> dict[str, float] | None:
    """Return how far a trial is above the lowest loss: nats, standard error, and at least so much."""
    if contest is None or number not in contest.differences:
        return None
    found = contest.differences[number]
    return {"nats": found.nats, "standard_error": found.standard_error, "at_least": contest.at_least(number)}


def _row(record: TrialRecord, place: int, contest: Contest | None) -> dict[str, Any]:
    last = record.reports[-1] if record.reports else None
    return {
        "rank": place if record.outcome in CONTENDERS and record.source is None and record.keeps_limits else None,
        "number": record.number,
        "outcome": record.outcome.value,
        "eval_loss": record.eval_loss,
        **({"eval_losses": record.eval_losses} if record.eval_losses else {}),
        **({"above_limits": record.excess} if record.excess is not None else {}),
        **({"metrics": record.metrics} if record.metrics else {}),
        "above_lowest": _above(contest, record.number),
        **{name: last and getattr(last, name) for name in LAST_REPORT},
        "tokens_per_second": median_speed(record),
        "peak_allocated_gib": record.peak_allocated_gib,
        "predicted_peak_gib": record.predicted_peak_gib,
        "slot": record.slot,
        "dead_time_s": record.dead_time_s,
        "params": record.params,
        "error": record.error,
        "folder": record.folder,
        "source": record.source,
        **({"warm": record.warm.to_dict()} if record.warm else {}),
        "note": _note(record),
    }


def _note(record: TrialRecord) -> str:
    """Say what went wrong, and where the trial comes from."""
    origin = record.source and f"from {record.source}"
    return ", ".join(filter(None, [record.error, origin, record.warm and record.warm.text]))


def _outcomes(records: list[TrialRecord]) -> dict[str, int]:
    """Count the trials by outcome, in the order of Outcome."""
    counts = Counter(record.outcome for record in records)
    return {outcome.value: counts[outcome] for outcome in Outcome if counts[outcome]}


def _front_row(record: TrialRecord, rule: Rule) -> dict[str, Any]:
    values = dict(zip(rule.objectives, objective_values(record, rule.objectives), strict=True))
    values |= {name: record.metrics[name] for name in rule.objectives if name in record.metrics}
    adapter = str(Path(record.folder) / "adapter")
    return {"number": record.number, **values, "params": record.params, "adapter": adapter}


def _markdown(name: str, verdict: SweepVerdict, board: dict[str, Any]) -> str:
    rows, outcomes = board["trials"], board["outcomes"]
    lines = [f"# Leaderboard of `{name}`", ""]
    lines += [part for line in [*verdict.lines, f"Rule: {board['rule']}."] for part in (line, "")]
    lines += [f"Outcomes: {', '.join(f'{count} {outcome}' for outcome, count in outcomes.items()) or 'none'}.", ""]
    if any(row["source"] for row in rows):
        lines += ["Trials of earlier sweeps are listed for comparison: they were not trained again and cannot win.", ""]
    if any("warm" in row for row in rows):
        lines += ["Warm: began with another trial's adapter, so its loss counts tokens that it did not see itself.", ""]
    if Outcome.STOPPED in outcomes:
        lines += ["STOPPED: ended at a report because the budget was spent; a resume with a larger budget continues it.", ""]
    if Outcome.PAUSED in outcomes:
        lines += ["PAUSED: waits at a rung, as others were worth more; a resume with a larger budget may continue it.", ""]
    if Outcome.INFEASIBLE in outcomes:
        lines += ["INFEASIBLE: predicted not to fit the card, so never started; not counted as a trial, no GPU time spent.", ""]
    lines += [part for line in filter(None, [equal_line(rows)]) for part in (line, "")]
    lines += _front_table(board)
    return "\n".join([*lines, *table(*board_table(rows, verdict.rule)), ""])


def _front_table(board: dict[str, Any]) -> list[str]:
    """Show the trials that no other trial beats in every objective.

    Empty if there is only one objective.
    """
    if len(board["objectives"]) < 2:
        return []
    names = board["objectives"]
    header = ("trial", *names, "sampled", "adapter")
    cells = [
        (str(row["number"]), *(f"{row[name]:,.5g}" for name in names), _sampled(row), f"`{row['adapter']}`")
        for row in board["pareto_front"]
    ]
    title = f"## Pareto front of {', '.join(names)}"
    return [
        title,
        "",
        "COMPLETE trials that no other trial beats in all of these.",
        "",
        *table(header, cells),
        "",
        "## All trials",
        "",
    ]


def board_table(rows: list[dict[str, Any]], rule: Rule = DEFAULT_RULE) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the header and the rows as text: outcome, what decides, the sampled values that differ, and all else."""
    columns = _columns(rows, rule)
    return tuple(name for name, _ in columns), [tuple(text(row) for _, text in columns) for row in rows]


def _columns(rows: list[dict[str, Any]], rule: Rule) -> list[tuple[str, Callable[[dict[str, Any]], str]]]:
    """Return the name of each column, and what makes its cell of a row."""
    scores = list(dict.fromkeys(name for row in rows for name in _scores(row)))
    measured = [("eval loss", lambda row: number(row["eval_loss"], ".4f"))]
    measured += [(name, lambda row, name=name: number(_scores(row).get(name), ".4f")) for name in scores]
    measured.sort(key=lambda column: column[0] != ("eval loss" if rule.chosen_by == EVAL_LOSS else rule.chosen_by))
    before = [
        ("rank", lambda row: number(row["rank"], "d")),
        ("trial", lambda row: str(row["number"])),
        ("outcome", lambda row: row["outcome"]),
    ]
    after = [
        ("above lowest" if rule.sign > 0 else "below highest", lambda row: _above_text(row["above_lowest"])),
        ("tokens seen", lambda row: number(row["tokens_seen"], ",d")),
        ("parameters", lambda row: number(row["num_trainable"], ",d")),
        ("tokens/s", lambda row: number(row["tokens_per_second"], ",.0f")),
        ("peak GiB", lambda row: _gib(row["peak_allocated_gib"])),
        ("predicted", lambda row: _gib(row["predicted_peak_gib"])),
        ("note", lambda row: row["note"]),
    ]
    taken = {name for name, _ in (*before, *measured, *after)}
    return [*before, measured[0], *_sampled_columns(rows, taken), *measured[1:], *after]


def _sampled_columns(rows: list[dict[str, Any]], taken: set[str]) -> list[tuple[str, Callable[[dict[str, Any]], str]]]:
    """Return a column for each parameter that differs, or for all if none does. taken: names of other columns."""
    paths, same = list(dict.fromkeys(path for row in rows for path in row["params"])), equal_params(rows)
    shown = [path for path in paths if path not in same] or paths
    ends = Counter(map(short_name, shown))
    names = [end if ends[end := short_name(path)] == 1 and end not in taken else path for path in shown]
    texts = [lambda row, path=path: _short(row["params"][path]) if path in row["params"] else "" for path in shown]
    return list(zip(names, texts, strict=True))


def equal_params(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the sampled values that all trials share, for which the table has no column. Empty if there is one trial."""
    first = rows[0]["params"] if len(rows) > 1 else {}
    same = {path: value for path, value in first.items() if all(row["params"].get(path) == value for row in rows)}
    return same if any(row["params"] != same for row in rows) else {}


def equal_line(rows: list[dict[str, Any]]) -> str | None:
    """Return what all trials have in common among their sampled values, in a line; None if nothing."""
    same = equal_params(rows)
    return f"The same in all trials: {_sampled({'params': same})}." if same else None


def _scores(row: dict[str, Any]) -> dict[str, float]:
    """Return losses on several evaluation sets, nats above their limits and task metrics, as far as a row has them."""
    above = {"above limits": row["above_limits"]} if "above_limits" in row else {}
    return {**row.get("eval_losses", {}), **above, **row.get("metrics", {})}


def _above_text(above: dict[str, float] | None) -> str:
    """Format a difference; blank for the lowest itself and for trials that were not compared."""
    if above is None:
        return ""
    return f"{above['nats']:.4f}, {'tied' if above['at_least'] <= 0.0 else 'at least ' + format(above['at_least'], '.4f')}"


def _sampled(row: dict[str, Any]) -> str:
    return ", ".join(f"{short_name(key)}={_short(value)}" for key, value in row["params"].items())


def _gib(value: float | None) -> str:
    """Format a size; unknown is blank."""
    return "" if value is None else f"{value:.2f}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def finite(value: Any) -> Any:
    """Return the same data with None for NaN and infinities, which JSON lacks."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
