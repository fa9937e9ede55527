"""The end of a sweep: choose the winner, measure it again from its files, write best/ and the leaderboard, report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from engine.errors import EngineError
from sweep.best_folder import write_best
from sweep.commands import evaluate
from sweep.leaderboard import write_leaderboard
from sweep.outcome import TrialRecord
from sweep.runs import SweepFolder
from sweep.selection import select_best

RELATIVE_TOLERANCE = {"cpu": 1e-3, "cuda": 1e-2}  # float32 repeats itself; bfloat16 kernels add up in another order


def finish(
    folder: SweepFolder,
    records: list[TrialRecord],
    sweep_name: str,
    device: str,
    engine_command: str,
    note: Callable[[str], None],
) -> tuple[TrialRecord | None, dict[str, Any]]:
    """Returns the winner (None where no adapter can be chosen) and the summary. The leaderboard is written in any case."""
    best = select_best(records)
    summary: dict[str, Any] = {f"num_{outcome.lower()}": count for outcome, count in Counter(r.outcome for r in records).items()}
    if best is None:
        write_leaderboard(folder.path, records, sweep_name, None)
        note("no trial got far enough, so there is no adapter to choose; see the leaderboard for how each ended")
        return None, summary
    note(f"evaluating the adapter of trial {best.number} again, from its files")
    try:
        reevaluation = _reevaluate(folder, best, device, engine_command)
    except EngineError as error:
        write_leaderboard(folder.path, records, sweep_name, None)
        note(f"WARNING: the adapter of trial {best.number} could not be evaluated again, so best/ was not written: {error}")
        return None, summary
    write_best(folder.best, best, reevaluation, sweep_name)
    write_leaderboard(folder.path, records, sweep_name, reevaluation)
    note(_result_text(folder, best, reevaluation))
    summary |= {
        "best_eval_loss": reevaluation["eval_loss"],
        "base_eval_loss": reevaluation["base_eval_loss"],
        "reevaluation_agrees": str(reevaluation["agrees"]),
    }
    return best, summary


def _reevaluate(folder: SweepFolder, best: TrialRecord, device: str, engine_command: str) -> dict[str, Any]:
    answer = evaluate(folder.trial(best.number), engine_command)
    agrees = math.isclose(answer["eval_loss"], best.score, rel_tol=RELATIVE_TOLERANCE[device])
    return {**answer, "trial_eval_loss": best.score, "agrees": agrees, "relative_tolerance": RELATIVE_TOLERANCE[device]}


def _result_text(folder: SweepFolder, best: TrialRecord, reevaluation: dict[str, Any]) -> str:
    base, tuned = reevaluation["base_eval_loss"], reevaluation["eval_loss"]
    lines = [
        "",
        f"{'':24}eval loss  perplexity",
        _loss_line("base model", base),
        _loss_line(f"best adapter (trial {best.number})", tuned),
        "",
    ]
    if not reevaluation["agrees"]:
        lines.insert(
            0,
            f"WARNING: the adapter on disk scores {tuned:.4f}, but trial {best.number} reported {best.score:.4f}: "
            "do not trust this adapter before you know why",
        )
    return "\n".join([*lines, f"adapter      {folder.best}", f"leaderboard  {folder.path / 'leaderboard.md'}"])


def _loss_line(name: str, loss: float) -> str:
    return f"{name:24}{loss:9.4f}  {math.exp(min(loss, 700.0)):10.3f}"
