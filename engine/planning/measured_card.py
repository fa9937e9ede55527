"""Keep the measurement of a card in a host as one file, which carries its own checksum. No torch.

The file is meant to be read and sent: `rates` is what predictions use, `raw` holds every number in
the unit of its name, and `steps` the whole steps, predicted next to measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from engine.config.parsing import load_json
from engine.errors import InputError, printable
from engine.planning.rates import Rates
from engine.system.files import write_text
from engine.system.provenance import host_name, nvidia_driver, package_version

FORMAT, LARGEST_NUMBER = 1, 1e12
WAY_OUT = "take a file as `python -m engine calibrate --out FILE` wrote it"
STEP_TIMES = {"measured_ms", "predicted_ms"}
TILE_SIZES, LARGEST_SIZE = {"t", "n", "k", "warps", "stages"}, 256
SHOWN = {"copy GB/s", "link to card GB/s", "link to host GB/s", "link both at once GB/s", "launch us"}  # of raw, to people
TEXTS = ("card", "driver", "torch", "triton", "host", "commit", "day")


@dataclass(frozen=True)
class CardStack:
    """Say what a measurement holds for: card, driver, host and the versions of what launches kernels.

    card: as torch.cuda.get_device_name() says it.
    """

    card: str
    driver: str
    torch: str
    triton: str
    host: str

    @classmethod
    def here(cls, card: str) -> CardStack:
        """Return the stack of a card in this machine, for this Python."""
        return cls(card, nvidia_driver(), package_version("torch"), package_version("triton"), host_name())

    @property
    def digest(self) -> str:
        """Return 10 characters that name the stack in a file's name."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:10]


@dataclass(frozen=True)
class MeasuredCard:
    """A measurement.

    memory_gib: of the card. commit: of this program, empty outside a checkout. day: such as
    2026-11-27. seconds: how long it took. raw: name with unit -> number. steps: name -> measured_ms
    and predicted_ms of a whole step. tiles: use -> sizes of the tile that products in INT8 take, if it
    was tuned.
    """

    stack: CardStack
    memory_gib: float
    commit: str
    day: str
    seconds: float
    rates: Rates
    raw: Mapping[str, float]
    steps: Mapping[str, Mapping[str, float]]
    tiles: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Return True if it has all that this version measures; older ones left out products in INT8."""
        return self.rates.int8 is not None

    def text(self) -> str:
        """Return the content of the file."""
        values = {
            "format": FORMAT, **asdict(self.stack), "memory_gib": self.memory_gib, "commit": self.commit, "day": self.day,
            "seconds": self.seconds, "rates": self.rates.to_dict(), "raw": dict(self.raw),
            "steps": {name: dict(step) for name, step in self.steps.items()},
        }  # fmt: skip
        if self.tiles:
            values["tiles"] = {use: dict(tile) for use, tile in self.tiles.items()}
        return json.dumps({**values, "digest": _digest(values)}, indent=1) + "\n"

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all. StorageError if the disk does not take it."""
        write_text(path, self.text())

    @classmethod
    def read(cls, path: Path, field: str = "file") -> MeasuredCard:
        """Read the file. Raises InputError about `field` if it is damaged or another kind of file."""
        values = load_json(path)
        if not isinstance(values, dict) or "digest" not in values:
            raise InputError(field, str(path), f"is no measurement of a card; {WAY_OUT}")
        if values.get("format") != FORMAT:
            allowed = f"must have format {FORMAT}, not {values.get('format')!r}; measure again with this version"
            raise InputError(field, str(path), allowed)
        content = {name: value for name, value in values.items() if name != "digest"}
        if values["digest"] != _digest(content):
            raise InputError(field, str(path), f"has changed since it was written; {WAY_OUT}")
        try:
            return cls._of(content)
        except (KeyError, TypeError, AttributeError, InputError) as error:
            said = error.allowed if isinstance(error, InputError) else f"lacks {error}"
            raise InputError(field, str(path), f"is no whole measurement ({said}); {WAY_OUT}") from None

    @classmethod
    def _of(cls, values: dict[str, Any]) -> MeasuredCard:
        texts = {name: values[name] for name in TEXTS}
        if not all(isinstance(text, str) for text in texts.values()) or not texts["card"]:
            raise InputError("file", texts, f"{', '.join(TEXTS)} must be texts")
        if not _is_day(texts["day"]):  # the newest file of a kind of card counts
            raise InputError("file", texts["day"], "day must be such as 2026-11-27")
        stack = CardStack(*(texts[name] for name in ("card", "driver", "torch", "triton", "host")))
        steps = {name: _numbers(step) for name, step in values["steps"].items()}
        if not all(set(step) >= STEP_TIMES and min(step.values()) > 0.0 for step in steps.values()):
            raise InputError("file", values["steps"], f"steps must have {' and '.join(sorted(STEP_TIMES))} above 0")
        memory_gib, seconds = _numbers({"memory_gib": values["memory_gib"], "seconds": values["seconds"]}).values()
        rates, raw = Rates.from_dict(values["rates"]), _numbers(values["raw"])
        if not set(raw) >= SHOWN or not all(number > 0.0 for number in (memory_gib, seconds, *raw.values())):
            raise InputError("file", raw, f"memory_gib, seconds and raw must be above 0, and raw hold {', '.join(sorted(SHOWN))}")
        facts = (stack, memory_gib, texts["commit"], texts["day"], seconds, rates, raw, steps)
        return cls(*facts, {use: _sizes(tile) for use, tile in values.get("tiles", {}).items()})

    def described(self) -> str:
        """Return card, versions and day in a few words."""
        return printable(f"{self.stack.card.removeprefix('NVIDIA ')}, torch {self.stack.torch}, {self.day}")


def _numbers(values: Any) -> dict[str, float]:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST_NUMBER:  # nor NaN
            raise InputError(name, value, f"{name} must be a number")
    return {name: float(value) for name, value in values.items()}


def _is_day(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _sizes(values: Any) -> dict[str, int]:
    """Return the sizes of a tile, whole numbers that a card can have: but for the stages, powers of 2."""
    if set(values) != TILE_SIZES or not all(_is_size(size, name == "stages") for name, size in values.items()):
        names = ", ".join(sorted(TILE_SIZES))
        raise InputError("file", values, f"tiles must have {names}, powers of 2 up to {LARGEST_SIZE} but for the stages")
    return dict(values)


def _is_size(size: Any, is_any: bool) -> bool:
    is_whole = isinstance(size, int) and not isinstance(size, bool) and 0 < size <= LARGEST_SIZE
    return is_whole and (is_any or size & (size - 1) == 0)


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
