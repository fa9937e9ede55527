"""An engine that trains nothing: its loss is a formula of the config. For faults and timing that a real one cannot show.

`optim.weight_decay` chooses the fault (FAULTS); `optim.eps` is the seconds a rung takes. A trial needs 1/16 GiB per rank.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from engine.config import TrainConfig, load_json, load_train_config, parse
from engine.errors import DivergedError, InputError, OutOfMemory
from engine.files import write_text
from engine.metrics import Report

SHAPE = {"num_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
         "vocab_size": 256}  # fmt: skip
SEEN = {"card": {"name": "NVIDIA GeForce RTX 4090", "memory_gib": 24.0}, "shape": SHAPE}
FAULTS = {
    1.0: "out of memory",
    2.0: "diverged",
    3.0: "process dies always",
    4.0: "bug",
    5.0: "bad input",
    6.0: "process dies once",
    7.0: "leanest plan does not fit",
}


def load_base(config, device):
    return {"path": config.path, "device": str(device)}


def eval_loss(config: TrainConfig, rung: int) -> float:
    """Lower with larger rank, and the lower the closer the learning rate is to 1e-3; falls with the rungs."""
    distance = abs(config.optim.learning_rate - 1e-3) * 1e3
    return 2.0 + distance / config.lora.rank + 1.0 / config.lora.rank + 0.5 / rung


def train(config: TrainConfig, run_dir: Path, *, base=None):
    assert base["path"] == config.model.path
    file = run_dir / "reports.jsonl"
    reports = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    with open(run_dir / "starts.txt", "a") as starts:
        starts.write(f"{os.getpid()} {len(reports)}\n")
    for rung in range(len(reports) + 1, len(config.train.report_grid()) + 1):
        time.sleep(config.optim.eps)
        _fail(FAULTS.get(config.optim.weight_decay), rung, run_dir)
        loss = eval_loss(config, rung)
        report = Report(
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
            elapsed_s=1.0,
            num_trainable=config.lora.rank,
        )
        reports.append(report.to_dict())
        _export(run_dir / "adapter", config.model.path)
        write_text(file, "".join(json.dumps(line) + "\n" for line in reports))
        yield report


def _fail(fault: str | None, rung: int, run_dir: Path) -> None:
    if fault == "bad input":
        raise InputError("lora.target_modules", "x", "matches no layer")
    if rung < 2 or fault is None:
        return
    if fault == "out of memory":
        raise MemoryError("no memory left")
    if fault == "leanest plan does not fit":
        raise OutOfMemory("out of memory at micro-batch 1: predicted peak 5.00 GiB, measured 6.00 GiB", 5.0, 6.0)
    if fault == "diverged":
        raise DivergedError("loss is nan")
    if fault == "bug":
        raise ZeroDivisionError("one\nover zero")
    if fault == "process dies always" or not (run_dir / "died").exists():
        (run_dir / "died").touch()
        os._exit(9)


def _export(folder: Path, base: str) -> None:
    folder.mkdir(exist_ok=True)
    write_text(folder / "adapter_config.json", json.dumps({"base_model_name_or_path": base}))
    write_text(folder / "adapter_model.safetensors", "")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("command")
    parser.add_argument("config")
    parser.add_argument("--adapter")
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    if options.command == "prepare":
        configs = [parse(TrainConfig, values) for values in load_json(options.config)]
        if configs[0].data.train == "missing.jsonl":
            print("error: data.train = 'missing.jsonl': no such file", file=sys.stderr)
            return 2
        answer = {
            "num_train_samples": 10,
            "num_eval_samples": 2,
            "model_path": "m",
            "layers": "-",
            "num_trainable": [1] * len(configs),
            **SEEN,
        }
    else:
        config = load_train_config(options.config)
        loss = eval_loss(config, len(config.train.report_grid()))
        answer = {"base_eval_loss": 5.0, "eval_loss": loss, "num_eval_target_tokens": 7}
    options.report.write_text(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
