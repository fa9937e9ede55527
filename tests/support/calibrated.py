"""The rows measured on a card, and their configs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.planning.compute_plan import DESCRIPTIONS, ComputePlan
from engine.shape.compute_limits import MLP_TILE_TOKENS
from engine.shape.model_shape import ModelShape
from engine.shape.policies import Policy
from tests.support.paths import ROOT
from tests.support.published_models import LLAMA_1B, LLAMA_8B

CALIBRATION = ROOT / "engine" / "bench" / "calibration" / "h100-2026-11-24.jsonl"
PEAKS = CALIBRATION.with_name("h100-2026-11-24-peaks.jsonl")
RESERVED = CALIBRATION.with_name("h100-2026-11-27-reserved.jsonl")
RAGGED = sorted(CALIBRATION.parent.glob("*-ragged.jsonl"))


def todays(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a file that today's code still computes as it was measured.

    The others have host layers in rows above one MLP tile: these stored all of attention then.
    """
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row for row in rows if not row.get("host_layers") or row["batch"] * row["length"] <= MLP_TILE_TOKENS]


ROWS = todays(CALIBRATION)

SHAPES = {"llama-3.1-8b": ModelShape.of(LLAMA_8B, "8B"), "llama-3.2-1b": ModelShape.of(LLAMA_1B, "1B")}


def config_of(
    batch: int = 2, length: int = 2048, rank: int = 16, policy: str = "recompute", keep_layers: int = 0,
    weight_cache_gib: float = 0.0, **sections: dict[str, Any],
) -> TrainConfig:  # fmt: skip
    train = {
        "max_tokens": 10**6, "micro_batch_size": batch, "keep_layers": keep_layers, "host_layers": 0,
        "weight_cache_gib": weight_cache_gib,
        "activation_checkpointing": policy,
    }  # fmt: skip
    data = {"train": "x", "max_seq_length": length, **sections.get("data", {})}
    return parse(TrainConfig, {
        "model": {"path": "x", **sections.get("model", {})}, "data": data, "lora": {"rank": rank, **sections.get("lora", {})},
        "optim": sections.get("optim", {}), "train": {**train, **sections.get("train", {})},
    })  # fmt: skip


def config_of_row(row: dict[str, Any]) -> TrainConfig:
    numbers = (row[k] for k in ("batch", "length", "rank", "policy", "keep_layers", "weight_cache_gib"))
    return config_of(*numbers, train={"host_layers": row.get("host_layers", 0)})


def row_name(row: dict[str, Any]) -> str:
    names = ("model", "batch", "length", "policy", "keep_layers", "host_layers", "weight_cache_gib")
    return "-".join(str(row.get(k, 0)) for k in names)


def plan_of(record: dict[str, Any]) -> ComputePlan:
    """Return the plan that a ragged row was measured with. Older records hold only its description."""
    if settings := record.get("settings"):
        return ComputePlan(policy=Policy.of(settings["activation_checkpointing"]), **{
            name: value for name, value in settings.items() if name != "activation_checkpointing"})  # fmt: skip
    text = record["plan"]
    policy = max((p for p in DESCRIPTIONS if f", {DESCRIPTIONS[p]}" in text), key=lambda p: len(DESCRIPTIONS[p]))

    def number(pattern: str) -> float:
        found = re.search(pattern, text)
        return float(found[1]) if found else 0.0

    counts = (int(number(p)) for p in (r"^micro-batch (\d+)", r"(\d+) layers? kept(?! on)", r"(\d+) layers? kept on the host"))
    micro_batch, keep, host = counts
    plan = ComputePlan(micro_batch, policy, keep, host, number(r"([\d.]+) GiB of weights"), text.endswith("CUDA graphs"))
    assert plan.describe() == re.sub(r"\b1 layers", "1 layer", text)  # as older versions wrote it
    return plan
