"""Name the ways to multiply by the frozen base. No torch."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

MatmulSetting = Literal["bf16", "int8_backward", "int8", "auto"]


class Matmul(StrEnum):
    """The products of activations and frozen weights that a training step computes in INT8.

    Evaluation, adapters, attention and the head compute in the working dtype in every mode.
    """

    BF16 = "bf16"
    """None: all products are in the working dtype."""
    INT8_BACKWARD = "int8_backward"
    """Those of the input gradient. The losses of a forward pass stay what they are."""
    INT8 = "int8"
    """Those of the forward pass and of the input gradient."""

    @classmethod
    def of(cls, setting: str) -> Matmul:
        """Return the mode that a setting of `train.matmul` names."""
        return AUTO_MATMUL if setting == "auto" else cls(setting)

    @property
    def forms(self) -> tuple[str, ...]:
        """Return the forms of a weight that products read, in the order of FORMS."""
        of_forward = "forward" if self.is_int8_forward else "weights"
        of_backward = "backward" if self.is_int8_backward else "weights"
        return tuple(form for form in FORMS if form in (of_forward, of_backward))

    @property
    def is_int8_forward(self) -> bool:
        return self is Matmul.INT8

    @property
    def is_int8_backward(self) -> bool:
        return self is not Matmul.BF16


FORMS = ("forward", "backward", "weights")
"""The forms of a weight: INT8 codes for a direction, or dequantised. What saves most time per byte kept comes first.

Codes for the forward pass are rotated, so they take longest to make (H100).
"""
AUTO_MATMUL = Matmul.BF16
"""The meaning of `auto` where no sweep has decided: a trial alone, and sweeps of older versions."""
AUTO_MODES = (Matmul.BF16, Matmul.INT8_BACKWARD)
"""What `auto` may mean in a sweep.

A mode must change a trial's last eval loss by less than 0.002 nats: the 95 % interval of the mean
difference between paired trials must lie within this, for each task that was tried
(docs/measured.md). INT8 passes over all tasks, but not for each, nor at the highest rate.
"""
