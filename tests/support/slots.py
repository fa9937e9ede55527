"""A worker of Ray that a test drives, and the trials that it trains."""

from __future__ import annotations

from pathlib import Path

from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.trial_report import read_reports
from sweep.execution.worker import TrialWorker

VARIANTS = [
    {"lora": {"rank": 8, "target_modules": "all-linear", "lora_dropout": 0.1}},
    {"lora": {"rank": 2, "target_modules": ["q_proj"]}, "optim": {"learning_rate": 3e-2}},
    {"lora": {"rank": 4}, "data": {"max_seq_length": 64}, "train": {"seed": 3}},
    {"lora": {"rank": 16, "use_rslora": True}, "train": {"activation_checkpointing": True}},
]


def variant(base: dict, changes: dict) -> TrainConfig:
    merged = {section: {**values, **changes.get(section, {})} for section, values in base.items()}
    return parse(TrainConfig, {**merged, "train": {**merged["train"], "device": "cpu"}})


def spec(config: TrainConfig, trial_folder: Path, number: int = 0) -> dict:
    engine_modules = {"train": "engine.training.loop", "model": "engine.model.load", "command": "engine"}
    return {
        "number": number, "trial_folder": str(trial_folder), "device": "cpu", "num_threads": 1, "engine": engine_modules,
        "report_timeout_s": None, "num_heard": len(read_reports(trial_folder)), "stop_file": str(trial_folder.parent / ".stop"),
        "train_config": config.model_dump_json(),
    }  # fmt: skip


class Slot:
    """Replaces a worker of Ray. Tune calls these three methods and no others."""

    def __init__(self) -> None:
        self.worker: TrialWorker | None = None

    def run(self, config: TrainConfig, trial_folder: Path, num_rungs: int = 99) -> list[dict]:
        """Train to the end, or to `num_rungs` as if pruned; return what Tune hears."""
        if self.worker is None:
            self.worker = object.__new__(TrialWorker)
            self.worker.setup(spec(config, trial_folder))
        else:
            self.worker.reset_config(spec(config, trial_folder))
        heard = []
        while len(heard) < num_rungs and not (heard and heard[-1]["done"]):
            heard.append(self.worker.step())
        return heard
