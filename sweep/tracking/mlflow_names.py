"""Name and measure sweeps and trials for MLflow: records in, names and points out, no mlflow.

A metric's name is grouped by slashes and carries its unit. The step of a trial's points is the
number of tokens it has seen, so that trials of different sequence length share one axis.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.command_answers import DataAccount
from engine.config.metrics_section import EVAL_LOSS
from engine.trial_report import TrialReport, kept_report
from engine.units import perplexity
from sweep.folder.slot_times import PARTS
from sweep.tracking.system_metrics import read_system
from sweep.trials.record import Outcome, TrialRecord

SET_LOSS, BASE_SET_LOSS = "eval/loss/", "eval/base_loss/"
"""Before the name of one of several evaluation sets, in nats per target token. Short, as a table has a column for each."""
METRICS = {
    "eval_loss": "eval/loss_nats_per_token",
    "best_eval_loss": "eval/best_loss_nats_per_token",
    "raw_eval_loss": "eval/raw_loss_nats_per_token",
    "ema_eval_loss": "eval/ema_loss_nats_per_token",
    "train_loss": "train/loss_nats_per_token",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "epoch": "train/epoch",
    "step": "train/optimizer_steps",
    "target_tokens_seen": "train/target_tokens",
    "elapsed_s": "speed/elapsed_s",
    "tokens_per_second": "speed/tokens_per_second",
    "step_time_ms": "speed/step_time_ms",
    "train_s": "time/train_s",
    "recording_s": "time/recording_s",
    "eval_s": "time/eval_s",
    "save_s": "time/save_s",
    "setup_s": "time/setup_s",
    "model_s": "time/setup_model_s",
    "data_s": "time/setup_data_s",
    "attach_s": "time/setup_attach_s",
    "peak_allocated_gib": "memory/peak_allocated_gib",
    "peak_reserved_gib": "memory/peak_reserved_gib",
    "predicted_peak_gib": "memory/predicted_peak_gib",
    "num_out_of_memory": "memory/num_out_of_memory",
}
SINCE_REPORT = ("train_s", "recording_s", "eval_s", "save_s")
"""Seconds since the previous report. MLflow gets their sums, as it shows a run's last value in its table."""
NUM_TRAINABLE = "adapter/num_trainable_parameters"
SLOT_TIMES = "slot_times.csv"  # an artifact of the sweep's run: what each slot's time went to
SYSTEM = "system/"  # MLflow's page shows these in a separate tab
SUMMARY = {
    # the same name as the trials' metric: MLflow sorts sweeps by it too
    "best_eval_loss": METRICS["best_eval_loss"],
    "base_eval_loss": "eval/base_loss_nats_per_token",
    **{name: f"eval/{name}_nats_per_token" for name in ("gain", "gain_low", "gain_high", "seed_deviation")},
    "slot_hours": "time/slot_hours",
    "dead_time_s": "time/dead_s",
    "steady_share": "time/steady_share",
    "steady_share_with_eval": "time/steady_share_with_eval",
    **{f"{part}_s": f"time/{part}_s" for part in PARTS},
}
# tags, because they may change while a trial runs
PLAN = ("micro_batch_size", "activation_checkpointing")
# MLflow shows FAILED and KILLED as a red cross, and SCHEDULED as a clock
STATUS = {
    Outcome.RUNNING: "RUNNING",
    Outcome.COMPLETE: "FINISHED",
    Outcome.STOPPED: "SCHEDULED",
    Outcome.PAUSED: "SCHEDULED",
    Outcome.PRUNED: "FINISHED",
    Outcome.INFEASIBLE: "KILLED",
}  # the others: FAILED
SWEEP_PARAMS = ("model.path", "model.quantization", "data.train", "train.max_tokens", "sampler.name", "pruner.name", "sweep.seed")
"""Settings that tell sweeps apart and that no resume can change: MLflow's params are final."""
Point = tuple[str, float, int, int]  # name, value, milliseconds, tokens seen


def trial_identity(record: TrialRecord) -> dict[str, str]:
    """Return the tags that find a trial's run again."""
    return {"sweep.kind": "trial", "sweep.trial_number": str(record.number)}


def final_seed_identity(record: TrialRecord, trial: int) -> dict[str, str]:
    """Return the tags that find the run of a finalist with another seed again. trial: its number in the sweep."""
    return {"sweep.kind": "final seed", "sweep.trial_number": str(trial), "sweep.seed": str(record.config["train"]["seed"])}


def trial_name(record: TrialRecord, is_best: bool = False) -> str:
    """Return the run's name, which MLflow shows in its table's first column and in its charts.

    The name includes the outcome, so the table needs no extra column for it.
    """
    warm = f" warm from {record.warm.trial}" if record.warm else ""
    return f"{record.number:04d} {record.outcome}{warm}{' (best)' if is_best else ''}"


def final_seed_name(record: TrialRecord, trial: int) -> str:
    """Return the name of a finalist's run with another seed. trial: its number in the sweep."""
    return f"{trial:04d} with seed {record.config['train']['seed']} {record.outcome}"


def trial_points(record: TrialRecord, written: int) -> list[Point]:
    """Return the points of the reports after rung `written`, and the values outside reports."""
    system = read_system(Path(record.folder))
    points: list[Point] = []
    sums = dict.fromkeys(SINCE_REPORT, 0.0)
    for report in record.reports:
        new = {name: getattr(report, name) for name in SINCE_REPORT if getattr(report, name) is not None}
        sums |= {name: sums[name] + seconds for name, seconds in new.items()}
        if report.rung > written:
            at = (_milliseconds(record, report), report.tokens_seen)
            values = {metric: getattr(report, name) for name, metric in METRICS.items()}
            values |= _best_so_far(record, report)
            values |= {f"eval/{name}": value for name, value in report.metrics.items()}
            values |= {SET_LOSS + name: value for name, value in report.eval_losses.items()}
            values |= {"eval/above_limits_nats": report.eval_excess}
            values |= {} if report.metrics_s is None else {"time/metrics_s": report.metrics_s}
            values |= {METRICS[name]: sums[name] for name in new}
            values |= {SYSTEM + name: value for name, value in system.get(report.rung, {}).items()}
            points += [(name, value, *at) for name, value in values.items() if value is not None]
    return points + _beside(record)


def best_name(measure: str) -> str:
    """Return the name of the best value so far of eval_loss or a metric, which is what a trial's adapter in its folder has.

    MLflow's table and charts show a metric's last value, which need not be the best. An axis of its
    parallel coordinates has room for about 25 letters.
    """
    return f"best/{'loss' if measure == EVAL_LOSS else measure}"


def _best_so_far(record: TrialRecord, report: TrialReport) -> dict[str, float]:
    found = {best_name(EVAL_LOSS): report.best_eval_loss}
    if record.chosen_by != EVAL_LOSS:
        kept = kept_report(record.reports[: record.reports.index(report) + 1], record.chosen_by, record.sign)
        found |= {best_name(record.chosen_by): kept.metrics[record.chosen_by]} if record.chosen_by in kept.metrics else {}
    return found


def _beside(record: TrialRecord) -> list[Point]:
    """Return the values that stand outside the reports.

    The prediction is dated at the start and the memory measured at an out-of-memory error after the
    last report. Values that are the same in every report are written once, at the start.
    """
    start = (int(1000 * (record.started_s or 0.0)), 0)
    last, reports = start, record.reports
    if reports:
        last = (_milliseconds(record, reports[-1]) + 1, reports[-1].tokens_seen)
    known = [
        (METRICS["predicted_peak_gib"], record.predicted_gib, start),
        (METRICS["peak_allocated_gib"], record.measured_gib, last),
        (NUM_TRAINABLE, reports[-1].num_trainable if reports else None, start),
    ]
    return [(name, value, *at) for name, value, at in known if value is not None]


def plan_tags(record: TrialRecord) -> dict[str, str]:
    """Return the plan of the trial's last report as tags."""
    return {f"plan.{name}": str(getattr(report, name)) for report in record.reports[-1:] for name in PLAN}


def _milliseconds(record: TrialRecord, report: TrialReport) -> int:
    """Return the report's time, which follows from the record alone.

    MLflow merges a point written twice only if its time is the same too.
    """
    return int(1000 * ((record.started_s or 0.0) + report.elapsed_s))


def sweep_points(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return a summary's numbers under their names on the sweep's run.

    Counts of outcomes become trials/num_*.
    """
    return {_sweep_name(name): float(value) for name, value in summary.items() if _is_number(value)}


def data_tags(accounts: Iterable[DataAccount]) -> dict[str, str]:
    """Return one tag for each data set and length, such as data.training.2048."""
    lines: dict[str, list[str]] = {}
    for account in accounts:  # variables of a template may give several at one length
        lines.setdefault(f"data.{account.part}.{account.max_seq_length}", []).append(account.line())
    return {name: " | ".join(found) for name, found in lines.items()}


def data_points(accounts: Iterable[DataAccount]) -> dict[str, float]:
    """Return what became of the data as numbers, such as data/training/tokens_lost_share.

    Each part of the data has one set of numbers, so that sweeps can be sorted by them: of the length
    at which most tokens are lost. Where there are several lengths, each has a set of its own too.
    """
    points: dict[str, float] = {}
    by_part: dict[str, list[DataAccount]] = {}
    for account in accounts:
        by_part.setdefault(account.part, []).append(account)
    for part, found in by_part.items():
        found.sort(key=lambda account: (account.num_lost_tokens, -account.max_seq_length))
        named = [(part, found[-1])]
        if len(found) > 1:
            named += [(f"{part}_at_{account.max_seq_length}", account) for account in found]
        points |= {f"data/{name}/{key}": float(value) for name, account in named for key, value in account.numbers().items()}
    return points


def sweep_tags(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a summary that are neither numbers nor tables."""
    return {name: value for name, value in summary.items() if not _is_number(value) and not isinstance(value, list)}


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of one shape as CSV, which MLflow's page shows as a table. None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: round(value, 3) if _is_number(value) else value for name, value in row.items()} for row in rows)
    return text.getvalue()


def sweep_params(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the resolved config that tell sweeps apart.

    Settings that the config lacks are left out.
    """
    found = {path: config.get(path.split(".")[0], {}) for path in SWEEP_PARAMS}
    return {path: section[path.split(".")[1]] for path, section in found.items() if path.split(".")[1] in section}


def description(config: Mapping[str, Any], best: TrialRecord | None, summary: Mapping[str, Any], folder: str) -> str:
    """Describe the best adapter in Markdown: base model, losses, folder of the sweep."""
    if best is None:
        return f"No trial of the sweep in `{folder}` has gone far enough to be chosen."
    model = best.config.get("model", {})
    lines = [f"Trial {best.number} of the sweep in `{folder}`, an adapter for `{model.get('path', 'unknown')}`."]
    losses = [("base model", summary.get("base_eval_loss")), ("with this adapter", summary.get("best_eval_loss"))]
    known = [(name, loss) for name, loss in losses if loss is not None]
    if known and best.is_of_pairs:
        lines += ["", "| | preference loss (nats/pair) |", "|---|---:|", *(f"| {name} | {loss:.4f} |" for name, loss in known)]
    elif known:
        rows = [f"| {name} | {loss:.4f} | {perplexity(loss):,.3f} |" for name, loss in known]
        lines += ["", "| | eval loss (nats/token) | perplexity |", "|---|---:|---:|", *rows]
    scores = {name: value for name, value in summary.items() if name.startswith("metric_")}
    texts = [f"{name.removeprefix('metric_')} {value:.4f}" for name, value in scores.items()]
    lines += ["", f"Task metrics: {', '.join(texts)}."] if texts else []
    data = config.get("data", {}).get("train")
    sampled = ", ".join(f"{path} = {value}" for path, value in best.params.items())
    sampled += best.warm_text
    lines += ["", f"Trained on `{data}`." if data else "", f"Sampled: {sampled}." if sampled else ""]
    return "\n".join(lines).rstrip()


def _sweep_name(name: str) -> str:
    kinds = {"metric_": "eval/{}", "base_metric_": "eval/base_{}", "set_": SET_LOSS + "{}", "base_set_": BASE_SET_LOSS + "{}"}
    for begin, group in kinds.items():
        if name.startswith(begin):
            return group.format(name.removeprefix(begin))
    return SUMMARY.get(name, f"trials/{name}" if name.startswith("num_") else f"sweep/{name}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
