"""Run stock Ray Tune with OptunaSearch and ASHA under the same faults, as a driver to be killed.

`python -m tests.faults.stock start|resume FOLDER FAULT` uses the same fake engine. Everything
follows Tune's documentation: a class Trainable that saves a checkpoint after every report,
max_failures 2, Tuner.restore. OptunaSearch has its study in memory and in Tune's snapshots.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from tests.support import fake_engine as engine

from .sweeps import CURVES, NUM_RUNGS

NUM_TRIALS = 10


class StockTrial(tune.Trainable):
    """Trains one rung a step; appends trial, rung, process and time to `events`."""

    def setup(self, config: dict) -> None:
        self._diverged, self._rung, self._events = False, 0, Path(config["events"])
        self._config = parse(TrainConfig, {
            "model": {"path": "m"}, "data": {"train": CURVES}, "lora": {"rank": config["rank"]},
            "optim": {"learning_rate": config["learning_rate"]}, "train": {"max_tokens": 400, "num_reports": NUM_RUNGS},
        })  # fmt: skip

    def step(self) -> dict:
        time.sleep(self.config["rung_s"])
        self._rung += 1
        fault, first = self.config["fault"], not (self._events.parent / "faulted").exists()
        if fault != "none" and self._rung == 2 and first:
            (self._events.parent / "faulted").write_text(str(time.time()))
            if fault == "dies":
                os._exit(9)
            if fault == "hangs":
                time.sleep(3600)
        self._diverged = self._diverged or (fault in ("nan", "explodes", "zero") and self._rung == 2 and first)
        with open(self._events, "a") as events:
            events.write(json.dumps([self.trial_id, self._rung, os.getpid(), time.time()]) + "\n")
        if self._diverged:
            return {"eval_loss": {"nan": math.nan, "explodes": 1e9, "zero": engine.eval_loss(self._config, 1)}[fault]}
        return {"eval_loss": engine.eval_loss(self._config, self._rung)}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        Path(checkpoint_dir, "rung").write_text(str(self._rung))

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        self._rung = int(Path(checkpoint_dir, "rung").read_text())


def main(command: str, folder: str, fault: str, rung_s: str = "0.01", num_trials: str = str(NUM_TRIALS)) -> None:
    callbacks, storage = [], os.environ.get("STOCK_STORAGE", folder)
    if "STOCK_MLFLOW" in os.environ:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        callbacks.append(MLflowLoggerCallback(tracking_uri=os.environ["STOCK_MLFLOW"], experiment_name="stock"))
    if "STOCK_ADDRESS" in os.environ:  # nodes, one of which is lost
        ray.init(address=os.environ["STOCK_ADDRESS"], log_to_driver=False)
    else:
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    trainable = tune.with_resources(StockTrial, {"cpu": 1})
    if command == "resume":
        tuner = tune.Tuner.restore(f"{storage}/stock", trainable, resume_errored=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space={
                "rank": tune.choice([2, 4, 8, 16]),
                "learning_rate": tune.loguniform(1e-4, 1e-1),
                "fault": fault,
                "rung_s": float(rung_s),
                "events": f"{folder}/events.jsonl",
            },
            tune_config=tune.TuneConfig(
                search_alg=OptunaSearch(metric="eval_loss", mode="min", seed=0),
                scheduler=ASHAScheduler(metric="eval_loss", mode="min", max_t=NUM_RUNGS, grace_period=1, reduction_factor=2),
                num_samples=int(num_trials),
                max_concurrent_trials=1,
            ),
            run_config=tune.RunConfig(
                name="stock",
                storage_path=storage,
                verbose=0,
                callbacks=callbacks,
                stop={"training_iteration": NUM_RUNGS},
                failure_config=tune.FailureConfig(max_failures=2),
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1),
            ),
        )
    grid = tuner.fit()
    rows = [{"trial": r.metrics.get("trial_id"), "rungs": r.metrics.get("training_iteration"), "loss": r.metrics.get("eval_loss"),
             "params": {key: r.config[key] for key in ("rank", "learning_rate")}, "error": str(r.error or "")}
            for r in grid]  # fmt: skip
    Path(folder, f"found-{command}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
