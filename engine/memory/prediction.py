"""Predict the peak of allocated CUDA bytes of training one adapter. No torch, no GPU.

The peak is `torch.cuda.max_memory_allocated`. Tensors that stay are added up from the model's
shape; those that come and go are walked through one by one (engine/memory/layer_memory.py). No
number is fitted.

Measured on one H100 (engine/bench/calibration/): within 1.1 % in 95 % of 33 settings of Llama
shapes, up to 65,536 tokens, and of six other families in a setting each. A library's mixers are
estimated (engine/memory/mixer_bytes.py): 4 % too much in one step of Qwen3.5-4B. Its decoder layers,
if they run unfused, are measured without values (engine/model/library_layers.py). For packed rows of
24 models on an H200 (131 settings) predictions are 2.3 % below to 3.1 % above the peak. For what was
reserved they are 5.3 % below to 5.1 % above, and within 4.3 % in 95 %.

A test without a GPU compares the walk with the layers' code. Only the text decoder of a model is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal

from engine.config.trial import TrainConfig
from engine.memory.live_bytes import PlacedBytes
from engine.memory.trial_walk import TrialWalk
from engine.shape.model_shape import ModelShape
from engine.units import GIB

# CUDA context, loaded kernels and the nodes of recordings, which torch does not allocate: 0.81 to
# 0.89 on an H100, more than a card with fewer multiprocessors needs.
CONTEXT_GIB = 0.9
# Shares of the peak that the caching allocator holds and cannot use. On packed rows of unequal
# samples (4B and 7B, H100) the first was 2.7 to 4.2 % with segments that grow
# (engine/model/device.py), 3.0 to 5.3 % without. The second is an estimate.
# Layers of the library: 3.7 to 7.8 % (H200, OLMo 1B and StarCoder2 3B).
FRAGMENTATION, LIBRARY_FRAGMENTATION, ROUGH_FRAGMENTATION = 0.05, 0.08, 0.12
# Of plans with recordings, beside the holes in their pool, which are found one by one: a share, and pages that
# are not full. 16 drawn settings took 0.14 GiB + 1 % (H200, segments that grow, workspaces first in the pool).
RECORDED_FRAGMENTATION, RECORDED_PAGES = 0.02, 50 * 2**20


@dataclass(frozen=True)
class MemoryPrediction:
    """The predicted memory of a config.

    - components: bytes at the moment of the peak, by what holds them.
    - phases: the peak of each phase; phase is the highest one.
    - rough: True for an estimate instead of a count: layers run unfused and were not measured, or have a
      library's mixers, or attention is eager, or the working dtype is not 16-bit.
    - fragmentation: the share of the peak that the allocator holds and cannot use.
    - host_bytes: pinned host memory for the tensors that layers store there, and the optimizer's states.
    - table_bytes: pinned host memory for input embeddings.
    - recorded_bytes: memory beyond the peak for what recordings hold, this trial's or earlier ones'.
    - find_holes: finds the bytes between the tensors of the recordings' pool, see `holes_bytes`.
    """

    components: dict[str, int]
    phases: dict[str, int]
    phase: str
    rough: bool = False
    host_bytes: int = 0
    table_bytes: int = 0
    recorded_bytes: int = 0
    fragmentation: float = FRAGMENTATION
    find_holes: Callable[[], int] | None = field(default=None, compare=False, repr=False)

    @cached_property
    def holes_bytes(self) -> int:
        """Return the bytes between the tensors of the recordings' pool, which nothing can use; 0 without recordings.

        It takes longer than the rest of the prediction, so it is found when asked for.
        """
        return 0 if self.find_holes is None else self.find_holes()

    @property
    def peak_bytes(self) -> int:
        """Return the peak of the bytes that torch allocates."""
        return sum(self.components.values())

    @property
    def peak_gib(self) -> float:
        return self.peak_bytes / GIB

    @property
    def host_gib(self) -> float:
        """Return the pinned host memory."""
        return (self.host_bytes + self.table_bytes) / GIB

    @property
    def reserve_gib(self) -> float:
        """Return the GiB that a card needs beyond the peak.

        They are the CUDA context and the memory that the allocator holds but cannot use.
        """
        return self._least_reserve_gib + self.holes_bytes / GIB

    @property
    def _least_reserve_gib(self) -> float:
        return CONTEXT_GIB + self.fragmentation * self.peak_gib + self.recorded_bytes / GIB

    @property
    def least_need_gib(self) -> float:
        """Return `need_gib` as if there were no holes, which is known at once."""
        return self.peak_gib + self._least_reserve_gib

    @property
    def reserved_gib(self) -> float:
        """Return the GiB that torch's allocator holds at its peak: tensors and what it cannot use."""
        return self.need_gib - CONTEXT_GIB

    @property
    def need_gib(self) -> float:
        """Return the GiB that a card must have, out of the total that it reports."""
        return self.peak_gib + self.reserve_gib

    def describe(self) -> str:
        """Return a short table: the bytes alive at the peak, and the peak of each phase."""
        rows = [(name, size) for name, size in sorted(self.components.items(), key=lambda item: -item[1]) if size]
        lines = [f"  {name:<22}{size / GIB:8.3f}" for name, size in rows]
        phases = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.phases.items())
        about = "about " if self.rough else ""
        head = f"peak {about}{self.peak_gib:.2f} GiB, in: {self.phase}; a card needs {self.reserve_gib:.2f} GiB more"
        return "\n".join([head, *lines, f"  phases: {phases}"])


def predict_memory(
    config: TrainConfig, shape: ModelShape, *, evaluation: bool = True, attention: Literal["flash", "cudnn"] = "flash"
) -> MemoryPrediction:
    """Predict the most bytes that torch allocates on a CUDA card while this config trains.

    Nothing in the config may be `auto`, or it raises ValueError. `evaluation` includes evaluation,
    which a benchmark does not run. `attention` names the kernel; both need the same workspace.
    """
    walk = TrialWalk(config, shape, attention)
    walk.load()
    walk.train()
    walk.step_optimizer()
    if evaluation:
        walk.evaluate()
    live = walk.live
    on_host = walk.host_stack.highest + walk.state_bytes
    held = {"host_bytes": on_host, "table_bytes": walk.table_bytes, "recorded_bytes": walk.beside_recordings()}
    held["fragmentation"] = ROUGH_FRAGMENTATION if walk.is_rough else LIBRARY_FRAGMENTATION if walk.library else FRAGMENTATION
    if walk.is_fused and config.train.cuda_graphs is True:
        held |= {"fragmentation": RECORDED_FRAGMENTATION, "find_holes": partial(_holes, config, shape, attention)}
    return MemoryPrediction(live.highest_components, live.peaks, live.highest_phase, walk.is_rough, **held)


def _holes(config: TrainConfig, shape: ModelShape, attention: Literal["flash", "cudnn"]) -> int:
    """Return what the recordings' pool takes beyond its tensors' peak: rows of two sizes, then one of an evaluation.

    Added are pages of the allocator that are not full.
    """
    live = PlacedBytes()
    walk = TrialWalk(config, shape, attention, live)
    walk.load()
    live.place()
    walk.train()
    walk.train()
    walk.evaluate()
    return RECORDED_PAGES + live.mapped - live.placed_peak


def fits(prediction: MemoryPrediction, memory_gib: float) -> bool:
    """Return True if peak and reserve fit in `memory_gib`, the total that a card reports."""
    return prediction.least_need_gib <= memory_gib and prediction.need_gib <= memory_gib
