"""Say whether a plan fits, by its prediction and by what failed attempts in this process showed. No torch.

A planner asks for nothing else of the limits, so a plan stays what it is as long as every answer does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from engine.memory.prediction import MemoryPrediction
from engine.planning.compute_plan import ComputePlan

MARGIN = 0.05
"""A plan that ran out of memory lacked an unknown amount. The next one needs this share less."""


@dataclass
class Lessons:
    """How many times the predicted memory the plans of each kind need, as out-of-memory errors showed.

    They belong to one base model in one process. `factors` has no entry for a kind that has not
    failed.
    """

    factors: dict[tuple[bool, bool], float] = field(default_factory=dict)

    def learn(self, failed: ComputePlan, available_gib: float) -> None:
        """Note that a plan ran out of memory though this process could have `available_gib`.

        A plan that was predicted to need more than that teaches nothing: others took the memory.
        """
        need = failed.need_gib
        if 0.0 < need <= available_gib:
            seen = available_gib / (need * (1.0 - MARGIN))
            self.factors[_kind(failed)] = max(seen, self.factors.get(_kind(failed), 1.0))

    def need_gib(self, plan: ComputePlan) -> float:
        """Return the memory in GiB that a card must have for a plan with a prediction."""
        return plan.need_gib * self.factors.get(_kind(plan), 1.0)


@dataclass
class Bounds:
    """The limits for which all questions so far have the same answers: from `fitted` on, and below `missed`, in GiB."""

    fitted: float = 0.0
    missed: float = math.inf

    def fits(self, need_gib: float, limit_gib: float) -> bool:
        """Return True if the need is within the limit, and take note of the answer."""
        if need_gib <= limit_gib:
            self.fitted = max(self.fitted, need_gib)
            return True
        self.missed = min(self.missed, need_gib)
        return False

    def holds(self, limit_gib: float) -> bool:
        return self.fitted <= limit_gib < self.missed


@dataclass(frozen=True)
class Validity:
    """The limits of device and host memory for which a plan is what it is; a planner fills it in."""

    device: Bounds = field(default_factory=Bounds)
    host: Bounds = field(default_factory=Bounds)

    def holds(self, memory_gib: float, host_gib: float) -> bool:
        """Return True if the same plan would be made within these limits."""
        return self.device.holds(memory_gib) and self.host.holds(host_gib)


@dataclass(frozen=True)
class MemoryLimit:
    """The device and host memory that plans must fit in, in GiB.

    predicted_gib: the most that a plan may be predicted to need, whatever was learnt. validity: notes each answer.
    """

    memory_gib: float
    lessons: Lessons = field(default_factory=Lessons)
    predicted_gib: float = math.inf
    host_gib: float = math.inf
    validity: Validity = field(default_factory=Validity)

    def fits(self, plan: ComputePlan) -> bool:
        """Return True if a plan with predicted memory fits the device."""
        least = 0.0 if plan.memory is None else plan.memory.least_need_gib  # without the search for holes
        if not self.validity.device.fits(least, self.memory_gib):
            return False
        fits = self.validity.device.fits(self.lessons.need_gib(plan), self.memory_gib)
        return fits and plan.need_gib <= self.predicted_gib

    def fits_host(self, memory: MemoryPrediction) -> bool:
        """Return True if host memory suffices for what the plan stores there."""
        return self.validity.host.fits(memory.host_gib, self.host_gib)


def _kind(plan: ComputePlan) -> tuple[bool, bool]:
    """Return what decides how the allocator's blocks are used: recordings, and copies to the host."""
    return plan.cuda_graphs, plan.host_layers > 0 or plan.policy.is_on_host
