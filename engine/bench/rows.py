"""Define measurements as data: settings, rows of a table, the suites and the ladder. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

POLICIES = {"recompute": "recomputed", "offload": "recomputed, inputs on the host", "selective": "recomputed in the MLP",
            "keep": "kept"}  # fmt: skip
"""Other systems use gradient checkpointing for `recompute` and `offload`, and none otherwise."""


@dataclass(frozen=True)
class Setting:
    """Hold one setting to measure.

    cap_gib: emulates a smaller card. warmup: first steps, left out of the times. targets: as
    `lora.target_modules`; only ours knows others than all-linear.

    Only for `ours`: keep_layers last layers keep activations, and host_layers others keep them on
    the host. weight_cache_gib (for dequantised weights), cuda_graphs and matmul belong to it too.
    """

    model: str = "llama-3.1-8b"
    batch: int = 2
    length: int = 2048
    rank: int = 16
    dropout: float = 0.0
    policy: str = "recompute"
    cap_gib: float | None = None
    keep_layers: int = 1
    host_layers: int = 0
    weight_cache_gib: float = 0.0
    cuda_graphs: bool = False
    matmul: str = "bf16"
    steps: int = 8
    warmup: int = 3
    targets: str | tuple[str, ...] = "all-linear"


OURS_ONLY: dict[str, Any] = {"keep_layers": 0, "host_layers": 0, "weight_cache_gib": 0.0, "cuda_graphs": False,
                             "matmul": "bf16", "targets": "all-linear"}  # fmt: skip
"""The values of these fields for any other system."""


@dataclass(frozen=True)
class Row:
    """Hold one system in one setting. suite: its name, or empty."""

    label: str
    system: str
    setting: Setting
    suite: str = ""

    def record(self) -> dict[str, Any]:
        """Return the row's part of a JSON line."""
        return {"label": self.label, "system": self.system, "suite": self.suite, **asdict(self.setting)}


LONG: dict[str, Any] = {
    "model": "llama-3.1-8b", "batch": 1, "rank": 32, "policy": "offload", "keep_layers": 0, "cap_gib": 23.5, "steps": 3,
    "warmup": 1,
}  # fmt: skip
EIGHT_BILLION: dict[str, Any] = {"model": "llama-3.1-8b", "cuda_graphs": True}
RECORDED = ("qwen3.5-4b", "gemma-4-e2b")
"""Families whose layers make a host wait so often that a trial records them."""
FAMILIES = ("smollm3-3b", "granite-3.3-2b", "phi-4-mini", "olmo-3-7b", "granite-3.3-8b", "ministral-3-8b")
INT8: tuple[dict[str, Any], ...] = (
    {**EIGHT_BILLION, "batch": 2, "length": 2048, "policy": "recompute"},
    {**EIGHT_BILLION, "batch": 2, "length": 2048, "policy": "keep", "cap_gib": 23.5, "weight_cache_gib": 5.0},
    {**EIGHT_BILLION, "batch": 1, "length": 8192, "policy": "recompute", "keep_layers": 0},
    {**EIGHT_BILLION, "batch": 1, "length": 8192, "policy": "selective", "cap_gib": 23.5, "keep_layers": 14,
     "systems": ("ours",)},
    {"model": "llama-3.2-1b", "batch": 4, "length": 2048, "policy": "keep", "weight_cache_gib": 2.0, "cuda_graphs": True},
    {"length": 65536, "host_layers": 31, **LONG, "keep_layers": 1, "steps": 1, "systems": ("ours", "unsloth"),
     "modes": ("bf16", "int8")},
)  # fmt: skip
"""The settings of docs/eight-bit.md."""
SUITES: dict[str, tuple[dict[str, Any], ...]] = {
    "table": (
        {"model": "llama-3.1-8b", "batch": 2, "length": 2048, "policy": "offload", "keep_layers": 3, "host_layers": 12},
        {"model": "llama-3.1-8b", "batch": 2, "length": 2048, "policy": "keep", "cap_gib": 23.5, "weight_cache_gib": 5.0},
        {"model": "llama-3.1-8b", "batch": 1, "length": 8192, "policy": "offload", "keep_layers": 2, "host_layers": 14},
        {"model": "llama-3.2-1b", "batch": 4, "length": 2048, "policy": "keep", "weight_cache_gib": 2.0},
        {"model": "smollm2-135m", "batch": 4, "length": 512, "policy": "keep", "cuda_graphs": True},
    ),
    "long": (
        {"length": 6144, "host_layers": 14, **LONG, "systems": ("ours", "peft")},
        {"length": 65536, "host_layers": 31, **LONG, "keep_layers": 1, "steps": 1},
        {"length": 131072, "host_layers": 32, **LONG, "steps": 1, "systems": ("ours", "peft")},
    ),
    "int8": INT8,
    "families": tuple(
        {"model": name, "batch": 2, "length": 2048, "policy": "recompute", "cap_gib": 23.5, "cuda_graphs": name in RECORDED}
        for name in (*FAMILIES, *RECORDED)
    ),
}
"""systems, modes: the only systems and `matmul` values measured in this setting; else all that the command names."""

LADDER: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("PEFT and bitsandbytes, activations recomputed", "peft", {"policy": "recompute"}),
    ("+ own loss and quantised layer, flat adapter, packed attention", "ours-unfused", {"policy": "recompute"}),
    ("+ fused decoder layers", "ours", {"policy": "recompute", "keep_layers": 0}),
    ("+ the last layer kept", "ours", {"policy": "recompute", "keep_layers": 1}),
    ("+ 6 others kept on the host", "ours", {"policy": "recompute", "keep_layers": 1, "host_layers": 6}),
    ("+ all attention kept", "ours", {"policy": "selective"}),
    ("+ all activations kept", "ours", {"policy": "keep"}),
    ("+ weights kept dequantised (2 GiB)", "ours", {"policy": "keep", "weight_cache_gib": 2.0}),
)
"""Label, system and changes to the setting; each row adds one optimisation to the row before."""


def plain_rows(systems: Iterable[str], base: Setting, modes: Sequence[str] = ()) -> list[Row]:
    """Return a row for every system in one setting, ours in each of the `matmul` modes (default: the setting's)."""
    rows = [_row(system, system, replace(base, matmul=mode), "") for system in systems for mode in modes or [base.matmul]]
    return list(dict.fromkeys(rows))  # the modes do not concern other systems


def suite_rows(name: str, systems: Iterable[str], base: Setting, modes: Sequence[str] = ()) -> list[Row]:
    """Return a row for every system in every setting of a suite that includes it, ours in each mode.

    The ladder names its own systems.
    """
    rows, systems, modes = [], list(systems), modes or [base.matmul]
    if name == "ladder":
        steps = [(replace(base, matmul=mode), step) for mode in modes for step in LADDER]
        rows = [_row(label, system, replace(setting, **changes), name) for setting, (label, system, changes) in steps]
        return list(dict.fromkeys(rows))
    for entry in SUITES[name]:
        changes = {key: value for key, value in entry.items() if key not in ("systems", "modes")}
        settings = [replace(base, **changes, matmul=mode) for mode in modes if mode in entry.get("modes", modes)]
        chosen = [system for system in systems if system in entry.get("systems", systems)]
        rows += [_row(system, system, setting, name) for system in chosen for setting in settings]
    return list(dict.fromkeys(rows))


def _row(label: str, system: str, setting: Setting, suite: str) -> Row:
    if system != "ours":
        return Row(label, system, replace(setting, **OURS_ONLY), suite)
    return Row(label if setting.matmul == "bf16" else f"{label}, {setting.matmul}", system, setting, suite)
