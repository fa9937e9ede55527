"""Record the learning curves that the fake engine replays, by training the tests' tiny Llama.

`pytest tests/faults/record_curves.py --timeout=0` runs it (as a test, for the fixtures). It trains
two layers of 64 with random weights on 60 conversations, for 4 ranks x 6 learning rates and 4
rungs. That takes about a minute on two CPU cores.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.errors import DivergedError
from engine.model.load import load_base
from engine.training.loop import train

CURVES = Path(__file__).with_name("curves.json")
RANKS = (2, 4, 8, 16)
LEARNING_RATES = tuple(round(1e-4 * 10 ** (i * 3 / 5), 8) for i in range(6))
NUM_RUNGS = 4
DIVERGED_LOSS = 20.0  # nats; the fake engine does not diverge by itself


def main(model: Path, data: Path) -> None:
    torch.set_num_threads(1)
    curves: dict[str, list[list[float]]] = {}
    base = None
    for rank in RANKS:
        for rate in LEARNING_RATES:
            config = parse(TrainConfig, {
                "model": {"path": str(model)},
                "data": {"train": str(data), "max_seq_length": 128, "eval_max_seq_length": 128, "eval_fraction": 0.2},
                "lora": {"rank": rank}, "optim": {"learning_rate": rate},
                "train": {"max_tokens": 4_096, "num_reports": NUM_RUNGS, "tokens_per_step": 256},
            })  # fmt: skip
            base = base or load_base(config.model, torch.device("cpu"))
            curves.setdefault(str(rank), []).append(_curve(config, base))
            print(rank, rate, curves[str(rank)][-1], flush=True)
    CURVES.write_text(json.dumps({"learning_rates": LEARNING_RATES, "curves": curves}, indent=1) + "\n")


def _curve(config: TrainConfig, base) -> list[float]:
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            losses.extend(round(report.eval_loss, 6) for report in train(config, Path(folder), base=base))
        except DivergedError:
            losses += [DIVERGED_LOSS] * (NUM_RUNGS - len(losses))
    return losses


def test_curves_are_recorded(tiny_model_dir, tiny_data):
    """Run by hand, as a test for its fixtures: pytest tests/faults/record_curves.py."""
    main(tiny_model_dir, tiny_data)
