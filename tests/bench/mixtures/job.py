"""Define what is measured of a mixture: the system, its setting, and the names of its layers. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from engine.bench.rows import OURS_ONLY, Setting

OURS, UNSLOTH, PEFT = SYSTEMS = ("ours", "unsloth", "peft")
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
TARGETS = ("attention", "experts")
FUSED_NAME = "gate_up_proj"


@dataclass(frozen=True)
class MixtureRow:
    """Hold one system in one setting.

    layers: of the model, in place of the shape's own number. is_ragged: rows full of samples of unequal
    length. offloads: the optimizer's states lie on the host. compiles: Unsloth may compile.
    """

    system: str
    setting: Setting
    layers: int
    is_ragged: bool = False
    offloads: bool = False
    compiles: bool = True

    @classmethod
    def of(cls, values: dict[str, Any]) -> MixtureRow:
        """Return the row of a JSON object that `asdict` made."""
        setting = Setting(**{**values["setting"], "targets": tuple(values["setting"]["targets"])})
        return cls(**{**values, "setting": setting})

    @property
    def label(self) -> str:
        """Return the system's name for a table."""
        return f"{self.system}, not compiled" if self.system == UNSLOTH and not self.compiles else self.system

    def record(self) -> dict[str, Any]:
        """Return the row's part of a JSON line. Only ours has settings that other systems do not know."""
        values, ours = asdict(self.setting) | {"targets": list(TARGETS)}, self.system == OURS
        values = {name: value for name, value in values.items() if ours or name == "targets" or name not in OURS_ONLY}
        more = {"is_ragged": self.is_ragged, "offloads": self.offloads} if ours else {}
        return {**values, **more, "label": self.label, "system": self.system, "layers": self.layers}


def rows_of(
    systems: list[str], setting: Setting, layers: int, is_ragged: bool, offloads: bool, compiles: bool
) -> list[MixtureRow]:
    """Return a row for each system. Others recompute activations; ours follows the setting."""
    others = replace(setting, **OURS_ONLY, policy="recompute")
    return [
        MixtureRow(OURS, setting, layers, is_ragged, offloads) if system == OURS
        else MixtureRow(system, replace(others, targets=TARGETS), layers, compiles=compiles)
        for system in dict.fromkeys(systems)
    ]  # fmt: skip
