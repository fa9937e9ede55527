"""Hold the decisions by which a card computes a config, with what is predicted of them. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.config.matmul import Matmul
from engine.config.trial import TrainConfig
from engine.memory.prediction import MemoryPrediction
from engine.planning.speed import SpeedPrediction
from engine.shape.policies import Policy
from engine.units import GIB, counted

DESCRIPTIONS = {
    Policy.KEEP: "activations kept", Policy.SELECTIVE: "MLP recomputed", Policy.RECOMPUTE: "recomputed",
    Policy.OFFLOAD: "recomputed, offloaded",
}  # fmt: skip
MATMULS = {Matmul.INT8_BACKWARD: "input gradients in INT8", Matmul.INT8: "products in INT8"}


@dataclass(frozen=True)
class ComputePlan:
    """Values for the fields of `train` that may be `auto`. The 8-bit states go to the host with `offload_optimizer`.

    `matmul` is what the config says; no plan changes it. `memory` and `speed` are predictions. They
    are None if the card or the model's shape is not known.
    """

    micro_batch_size: int
    policy: Policy
    keep_layers: int
    host_layers: int
    weight_cache_gib: float
    cuda_graphs: bool = False
    matmul: Matmul = Matmul.BF16
    offload_optimizer: bool = False
    memory: MemoryPrediction | None = None
    speed: SpeedPrediction | None = None

    @property
    def need_gib(self) -> float:
        """Return the predicted GiB that a card must have, or 0 if nothing is predicted."""
        return 0.0 if self.memory is None else self.memory.need_gib

    @property
    def evaluation_gib(self) -> float:
        """Return the predicted GiB of an evaluation's row beyond what stays; 0 if nothing is predicted."""
        phases = {} if self.memory is None else self.memory.phases
        return max(0, phases.get("evaluation", 0) - phases.get("at rest", 0)) / GIB

    def settings(self) -> dict[str, Any]:
        """Return the seven fields of `train` as plain data."""
        names = ("micro_batch_size", "keep_layers", "host_layers", "weight_cache_gib", "cuda_graphs", "offload_optimizer")
        return {"activation_checkpointing": self.policy.setting, **{name: getattr(self, name) for name in names}}

    def apply(self, config: TrainConfig) -> TrainConfig:
        """Return the config with nothing left `auto`, and the same number of bins in a step."""
        bins = config.bins_per_step
        step = {"tokens_per_step": bins * config.bin_tokens}
        return config.model_copy(update={"train": config.train.model_copy(update={**step, **self.settings()})})

    def describe(self) -> str:
        """Return one line for the user."""
        parts = [f"micro-batch {self.micro_batch_size}", DESCRIPTIONS[self.policy]]
        if self.policy is not Policy.KEEP and self.keep_layers:
            parts.append(f"{counted(self.keep_layers, 'layer')} kept")
        if self.host_layers:
            parts.append(f"{counted(self.host_layers, 'layer')} kept on the host")
        if self.weight_cache_gib:
            form = "dequantised" if self.matmul is Matmul.BF16 else "kept for products"
            parts.append(f"{self.weight_cache_gib:g} GiB of weights {form}")
        if self.offload_optimizer:
            parts.append("optimizer states on the host")
        if self.cuda_graphs:
            parts.append("CUDA graphs")
        if self.matmul in MATMULS:
            parts.append(MATMULS[self.matmul])
        return ", ".join(parts)
