"""Define the work that every system gets: model, samples, trials, rungs, and how trials are judged. No torch."""

from __future__ import annotations

import hashlib
import json
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.bench.process import run_python
from sweep.space.parse import parse_space

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
TARGETS: dict[str, Any] = {"attention": ATTENTION, "mlp": MLP, "all-linear": "all-linear"}
RANKS = (8, 16, 32, 64)
NUM_RATES, LOWEST_RATE, HIGHEST_RATE = 8, 2e-5, 1e-3
WORDS = 4000
# Of a sample in bytes, each of which is one token: a log-normal distribution with a long tail.
MEDIAN_LENGTH, SPREAD = 260.0, 0.9
SPARE = 1.25  # of training tokens, so that no system needs a second pass


@dataclass(frozen=True)
class Job:
    """Describe the work.

    report_at: tokens seen at each rung; the last is a trial's whole budget. length: tokens in a
    packed row. rows_at_once and rows_per_step: of peers; ours chooses the first itself.
    cap_gib: device memory for each system, None for the whole card.
    """

    model: str = "smollm2-135m"
    trials: int = 16
    seed: int = 0
    report_at: tuple[int, ...] = (50_000, 100_000, 200_000, 400_000, 800_000)
    length: int = 2048
    rows_at_once: int = 2
    rows_per_step: int = 8
    eval_samples: int = 128
    cap_gib: float | None = 23.5

    def space(self) -> dict[str, Any]:
        """Return the `space` section: ranks x targets x learning rates, which are drawn from the seed."""
        rng = random.Random(self.seed)
        low, high = math.log(LOWEST_RATE), math.log(HIGHEST_RATE)
        rates = sorted(float(f"{math.exp(rng.uniform(low, high)):.3e}") for _ in range(NUM_RATES))
        return {
            "lora": {"rank": {"choices": list(RANKS)}, "target_modules": {"choices": TARGETS}},
            "optim": {"learning_rate": {"choices": rates}},
        }

    def points(self) -> list[dict[str, Any]]:
        """Return the trials in the order in which our grid sampler tries them, which all systems take."""
        points = parse_space(self.space()).shuffled_points(self.seed)
        if points is None or len(points) < self.trials:
            raise ValueError(f"--trials {self.trials}: the space has {len(points or ())} points")
        return points[: self.trials]

    def key(self) -> dict[str, Any]:
        """Return what decides whether two rows did the same work, as JSON gives it back."""
        return json.loads(json.dumps(asdict(self)))


def modules(target: str) -> list[str]:
    """Return the last parts of the names of the layers that get an adapter."""
    return ATTENTION + MLP if TARGETS[target] == "all-linear" else TARGETS[target]


def write_samples(job: Job, folder: Path) -> tuple[Path, Path]:
    """Write the training and held-out samples as JSON lines, each the text of one dialogue; return the files.

    Every token carries loss in every system, because loss on answers alone needs tags in TRL's templates.
    """
    name = hashlib.sha256(json.dumps(job.key(), sort_keys=True).encode()).hexdigest()[:12]
    train, held_out = folder / f"train-{name}.jsonl", folder / f"held-out-{name}.jsonl"
    rng = random.Random(job.seed)
    words = ["".join(rng.choices("etaoinshrdlucmfw", k=rng.randint(1, 9))) for _ in range(WORDS)]
    weights = [1.0 / (place + 3) for place in range(WORDS)]
    _write(held_out, [_dialogue(rng, words, weights) for _ in range(job.eval_samples)])
    texts, tokens = [], 0
    while tokens < SPARE * job.report_at[-1]:
        texts.append(_dialogue(rng, words, weights))
        tokens += min(len(texts[-1]) + 1, job.length)
    _write(train, texts)
    return train, held_out


def _dialogue(rng: random.Random, words: list[str], weights: list[float]) -> str:
    """Return turns of user and assistant in plain text, as long as a drawn length asks."""
    wanted, text, speaker = rng.lognormvariate(math.log(MEDIAN_LENGTH), SPREAD), "", 0
    while len(text) < wanted:
        said = rng.choices(words, weights, k=rng.randint(3, 20) * (1 + 3 * speaker))
        text += f"{('user', 'assistant')[speaker]}: {' '.join(said)}\n"
        speaker = 1 - speaker
    return text


def _write(file: Path, texts: list[str]) -> None:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def model_folder(job: Job, scratch: Path, timeout_s: float) -> Path:
    """Return the folder of random NF4 weights and a tokenizer of bytes, which every system reads.

    It is kept for later runs, and its making is on no system's clock. Raises RuntimeError.
    """
    from engine.bench.model_folder import folder_name  # loads torch, which tells the device

    folder = scratch / folder_name(job.model)
    if not folder.exists():
        done = run_python(["-m", "engine.bench.model_folder", job.model, str(folder)], scratch, timeout_s)
        if "error" in done:
            raise RuntimeError(f"no model folder: {done['error']}")
    return folder
