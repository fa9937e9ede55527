"""Run the makespan's trials as one sweep: `python -m sweep` with a generated config."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from engine.bench.process import ENVIRONMENT, ROOT
from engine.trial_report import read_reports
from sweep.folder.timeline import Timeline
from tests.bench.makespan.job import Job

PATIENCE_S = 60.0


def options(job: Job, model: Path, samples: tuple[Path, Path], output: Path, budget_s: float | None, on_card: bool) -> list[str]:
    """Return the overrides of the sweep's config."""
    slots = ["cluster.num_gpus=1"] if on_card else ["cluster.num_gpus=0", "cluster.num_cpu_slots=1"]
    loop = {
        "max_tokens": job.report_at[-1], "report_at_tokens": list(job.report_at),
        "tokens_per_step": job.rows_per_step * job.length,
    }  # fmt: skip
    return [
        "model=local", f"model.path={model}", "data=local", f"data.train={samples[0]}", f"data.eval={samples[1]}",
        "data.format=text", f"data.max_seq_length={job.length}", f"data.eval_max_seq_length={job.length}",
        f"data.eval_max_samples={job.eval_samples}", "space=none", *_space(job.space()), "sampler=grid",
        "pruner=successive_halving", "tracking=none", *(f"train.{name}={_text(value)}" for name, value in loop.items()),
        "optim.lr_schedule=linear", "optim.weight_decay=0.001", f"sweep.seed={job.seed}", f"sweep.num_trials={job.trials}",
        f"sweep.output_dir={output}", "sweep.name=makespan", "sweep.num_examples=0", "cluster.calibrate=false", *slots,
        *([f"train.memory_budget_gib={job.cap_gib}"] if job.cap_gib and on_card else []),
        *([f"sweep.budget.wall_clock_hours={budget_s / 3600:.6f}"] if budget_s is not None else []),
    ]  # fmt: skip


def run_ours(
    job: Job, model: Path, samples: tuple[Path, Path], where: Path, timeout_s: float, budget_s: float | None, on_card: bool
) -> dict[str, Any]:
    """Return what the sweep took, from the start of its process to its end, or `error`.

    where: a new folder. It holds the caches too, so kernels are compiled on the clock, as those of the others are.
    """
    caches = {name: str(where / name.lower()) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "QLORA_SWEEP_CACHE")}
    given = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    environment = {**os.environ, **ENVIRONMENT, **caches, "PYTHONPATH": os.pathsep.join([str(ROOT), *given])}
    command = [sys.executable, "-m", "sweep", *options(job, model, samples, where / "sweeps", budget_s, on_card)]
    log, began_s = where / "sweep.log", time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, cwd=where, stdout=out, stderr=subprocess.STDOUT)
        code = wait_or_end(process, timeout_s)
    wall_s = time.monotonic() - began_s
    found = _read(job, where / "sweeps")
    if code == 0:
        return {"wall_s": wall_s, **found}
    lines = [line for line in log.read_text().splitlines() if line.strip()] or [f"exit code {code}"]
    return {"wall_s": wall_s, **found, "error": "timed out" if code is None else lines[-1]}


def wait_or_end(process: subprocess.Popen, timeout_s: float) -> int | None:
    """Return the exit code; None if the time was over. The driver then ends its workers itself."""
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)
        raise
    try:
        process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return None


def _read(job: Job, output: Path) -> dict[str, Any]:
    """Read trials, tokens and the seconds for which trials held the card. Raises RuntimeError if the trials are others."""
    folders = sorted(output.glob("makespan-*/trials/*"))
    results = [json.loads(file.read_text()) for folder in folders if (file := folder / "result.json").is_file()]
    for result in results:
        wanted = dict(enumerate(job.points())).get(result["number"], "none")  # there are more if one did not fit the card
        if result["params"] != wanted:
            raise RuntimeError(f"trial {result['number']} of the sweep is {result['params']}, but the job's is {wanted}")
    reports = [found for folder in folders if (found := list(read_reports(folder)))]
    outcomes = [result["outcome"] for result in results]
    timelines = [Timeline(file, mend=False) for file in output.glob("makespan-*/timeline.jsonl")]
    done = [outcome for outcome in outcomes if outcome in ("COMPLETE", "PRUNED", "DIVERGED")]
    return {
        "trials_done": len(done),
        "outcomes": {name: outcomes.count(name) for name in sorted(set(outcomes))},
        "tokens": sum(found[-1].tokens_seen for found in reports),
        "gpu_s": sum(timeline.occupied_s(time.time()) for timeline in timelines),
        "best_eval_loss": min((report.eval_loss for found in reports for report in found), default=None),
    }


def _space(section: dict[str, Any]) -> list[str]:
    """Return the leaves of the section as overrides."""
    return [
        f"+space.{part}.{name}.choices={_text(leaf['choices'])}"
        for part, leaves in section.items()
        for name, leaf in leaves.items()
    ]


def _text(value: Any) -> str:
    """Write a value as Hydra's command line reads it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{_text(part)}" for name, part in value.items()) + "}"
    return "[" + ",".join(map(_text, value)) + "]" if isinstance(value, list | tuple) else str(value)
