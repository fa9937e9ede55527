"""Replace the engine with one that trains nothing, for faults and timings a real one cannot show.

The loss is a formula of the config. If `data.train` names a file of recorded learning curves
(tests/faults/curves.json), the loss comes from there. `optim.weight_decay` chooses the fault
(FAULTS); `optim.eps` is the seconds a rung takes. A trial needs 1/16 GiB per rank. Like the real
engine, this one writes its checkpoint before its reports.
"""

from __future__ import annotations

import argparse
import bisect
import functools
import json
import math
import os
import signal
import sys
import time
import types
from pathlib import Path

from engine.command_answers import AdapterEvaluation, PreparedFacts, VisibleCard
from engine.config.parsing import load_json, parse
from engine.config.trial import TrainConfig, load_train_config
from engine.errors import DivergedError, InputError, Interrupted, OutOfMemory
from engine.sample_losses import SampleLosses, write_sample_losses
from engine.shape.model_shape import ModelShape
from engine.system.files import write_text
from engine.trial_report import TRAIN, PartClock, TrialReport, read_reports

# A stub of torch for a process that computes nothing: the real one takes seconds to load, after
# each kill.
STAND_IN = types.SimpleNamespace(
    __spec__=None,
    device=str,
    set_num_threads=lambda number: None,
    cuda=types.SimpleNamespace(is_available=lambda: False),
    OutOfMemoryError=type("OutOfMemoryError", (RuntimeError,), {}),
)
if "FAKE_TORCH" in os.environ:  # set by the tests whose processes run the fake engine only
    sys.modules.setdefault("torch", STAND_IN)

SHAPE = ModelShape(num_layers=2, hidden_size=64, intermediate_size=128, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=256)
CARD = VisibleCard("NVIDIA GeForce RTX 4090", 24.0)
FAULTS = {
    1.0: "out of memory",
    2.0: "diverged",
    3.0: "process dies always",
    4.0: "bug",
    5.0: "bad input",
    6.0: "process dies once",
    7.0: "leanest plan does not fit",
    8.0: "hangs once",
    9.0: "process is stopped once",
    10.0: "dies once with a report saved and not passed on",
    11.0: "dies once with a checkpoint and without its report",
    12.0: "eval_loss is nan",
    13.0: "hangs always",
}
CALIBRATED = "[####] 1/1 a fake card"
EXAMPLE = ("prompt", "expected", "base", "adapter")
# in the winner's folder: where it was evaluated again (FAULTS_PLACE of that process)
EVALUATED_IN = "evaluated_in.txt"
FAULT_TIMES = "fault_times.txt"  # in a trial's folder: time of its fault, in Unix seconds


def load_base(config, device):
    return {"path": config.path, "device": str(device)}


def eval_loss(config: TrainConfig, rung: int) -> float:
    """Return a loss that falls with rank and rungs, and towards a learning rate of 1e-3."""
    if config.data.train.endswith("curves.json"):
        return _replayed(config, rung)
    distance = abs(config.optim.learning_rate - 1e-3) * 1e3
    return 2.0 + distance / config.lora.rank + 1.0 / config.lora.rank + 0.5 / rung


def _replayed(config: TrainConfig, rung: int) -> float:
    """Return the recorded curve of this rank, between those of the two nearest learning rates."""
    recorded = _curves(config.data.train)
    rates, curves = recorded["learning_rates"], recorded["curves"][str(config.lora.rank)]
    right = min(max(bisect.bisect_left(rates, config.optim.learning_rate), 1), len(rates) - 1)
    low, high = math.log(rates[right - 1]), math.log(rates[right])
    share = min(max((math.log(config.optim.learning_rate) - low) / (high - low), 0.0), 1.0)
    return (1.0 - share) * curves[right - 1][rung - 1] + share * curves[right][rung - 1]


@functools.cache
def _curves(path: str) -> dict:
    return json.loads(Path(path).read_text())


def train(config: TrainConfig, trial_folder: Path, *, base=None, interrupted=lambda: False, parts=None):
    parts = parts or PartClock()
    assert base["path"] == config.model.path
    checkpoint, fault = trial_folder / "checkpoint.json", FAULTS.get(config.optim.weight_decay)
    reports = json.loads(checkpoint.read_text()) if checkpoint.exists() else []
    with open(trial_folder / "starts.txt", "a") as starts:
        starts.write(f"{os.getpid()} {len(reports)} {time.time()}\n")
    if len(reports) > len(read_reports(trial_folder)):
        _write_reports(trial_folder, reports)
        yield TrialReport.from_dict(reports[-1])
    for rung in range(len(reports) + 1, len(config.train.report_grid()) + 1):
        with parts.part(TRAIN):
            _compute(config.optim.eps, rung, trial_folder, interrupted)
        _fail(fault, rung, trial_folder)
        if fault == "eval_loss is nan" and rung == 2:
            yield _report(config, rung, math.nan)
        report = _report(config, rung, eval_loss(config, rung))
        reports.append(report.to_dict())
        _export(trial_folder / "adapter", config.model.path)
        if report.eval_loss == min(line["eval_loss"] for line in reports):
            write_sample_losses(trial_folder, rung, _by_sample(report.eval_loss))
        write_text(checkpoint, json.dumps(reports))
        if fault == "dies once with a checkpoint and without its report":
            _die_once(rung, trial_folder)
        _write_reports(trial_folder, reports)
        if fault == "dies once with a report saved and not passed on":
            _die_once(rung, trial_folder)
        yield report


def _by_sample(loss: float) -> SampleLosses:
    """Return losses on samples that are all alike, so that any difference is told apart."""
    return SampleLosses("fake", (loss,) * 8, (1,) * 8)


def _compute(rung_s: float, rung: int, trial_folder: Path, interrupted) -> None:
    """Spend a rung's seconds in steps of 50 ms, less those saved by an interrupted process."""
    saved = trial_folder / "within_rung.json"
    known = json.loads(saved.read_text()) if saved.exists() else {"rung": 0}
    left_s = rung_s - (known["seconds"] if known["rung"] == rung else 0.0)
    while left_s > 0.0:
        if interrupted():
            write_text(saved, json.dumps({"rung": rung, "seconds": rung_s - left_s}))
            raise Interrupted("asked to end")
        time.sleep(min(left_s, 0.05))
        left_s -= 0.05


def _report(config: TrainConfig, rung: int, loss: float) -> TrialReport:
    return TrialReport(
        rung=rung,
        tokens_seen=config.train.report_grid()[rung - 1],
        target_tokens_seen=1,
        step=rung,
        epoch=0.0,
        train_loss=loss,
        eval_loss=loss,
        best_eval_loss=loss,
        learning_rate=config.optim.learning_rate,
        grad_norm=1.0,
        tokens_per_second=100.0,
        step_time_ms=1.0,
        peak_allocated_gib=config.lora.rank / 16,
        elapsed_s=float(rung),
        num_trainable=config.lora.rank,
    )


def _write_reports(trial_folder: Path, reports: list[dict]) -> None:
    write_text(trial_folder / "reports.jsonl", "".join(json.dumps(line) + "\n" for line in reports))


def _fail(fault: str | None, rung: int, trial_folder: Path) -> None:
    if fault == "bad input":
        raise InputError("lora.target_modules", "x", "matches no layer")
    if rung < 2 or fault is None:
        return
    with open(trial_folder / FAULT_TIMES, "a") as times:
        times.write(f"{time.time()}\n")
    if fault == "out of memory":
        raise MemoryError("no memory left")
    if fault == "leanest plan does not fit":
        raise OutOfMemory("out of memory at micro-batch 1: predicted peak 5.00 GiB, measured 6.00 GiB", 5.0, 6.0)
    if fault == "diverged":
        raise DivergedError("loss is nan")
    if fault == "bug":
        raise ZeroDivisionError("one\nover zero")
    if fault == "process dies always":
        os._exit(9)
    if fault == "process dies once":
        _die_once(rung, trial_folder)
    if fault == "hangs always" or (fault == "hangs once" and _first_time(trial_folder)):
        time.sleep(3600)
    if fault == "process is stopped once" and _first_time(trial_folder):
        os.kill(os.getpid(), signal.SIGSTOP)


def _die_once(rung: int, trial_folder: Path) -> None:
    if rung >= 2 and _first_time(trial_folder):
        os._exit(9)


def _first_time(trial_folder: Path) -> bool:
    first = not (trial_folder / "faulted").exists()
    (trial_folder / "faulted").touch()
    return first


def _export(folder: Path, base: str) -> None:
    folder.mkdir(exist_ok=True)
    write_text(folder / "adapter_config.json", json.dumps({"base_model_name_or_path": base}))
    write_text(folder / "adapter_model.safetensors", "")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("command")
    parser.add_argument("config")
    parser.add_argument("--adapter")
    parser.add_argument("--examples", type=int)
    parser.add_argument("--inputs", type=Path)
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--answer", type=Path)
    parser.add_argument("--progress", action="store_true")
    if sys.argv[1:2] == ["standby"]:
        line = sys.stdin.readline()
        if not line:
            return 0
        sys.argv[1:] = json.loads(line)
    if sys.argv[1:2] == ["calibrate"]:
        print(CALIBRATED)
        return 0
    options = parser.parse_args()
    if options.command == "prepare":
        time.sleep(float(os.environ.get("FAKE_PREPARE_S", "0")))
        configs = [parse(TrainConfig, values) for values in load_json(options.config)]
        if configs[0].data.train == "missing.jsonl":
            print("error: data.train = 'missing.jsonl': no such file", file=sys.stderr)
            return 2
        answer = PreparedFacts(
            shape=SHAPE,
            card=CARD,
            model_path="m",
            layers="-",
            num_train_samples=100,
            num_eval_samples=40,
            num_dropped_samples=0,
            num_trainable=[1] * len(configs),
            data={},
        )
    else:
        config = load_train_config(options.config)
        loss = eval_loss(config, len(config.train.report_grid()))
        (Path(options.adapter).parent / EVALUATED_IN).write_text(os.environ.get("FAULTS_PLACE", "driver"))
        examples = [{name: f"{name} {i}" for name in EXAMPLE} for i in range(options.examples)]
        answer = AdapterEvaluation(
            5.0, loss, 7, examples or None, base_sample_losses=_by_sample(5.0), sample_losses=_by_sample(loss)
        )
    options.answer.write_text(json.dumps(answer.to_dict()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
