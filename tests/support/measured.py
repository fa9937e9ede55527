"""Make measurements of cards without a card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from engine.planning.cards import CARDS
from engine.planning.measured_card import CardStack, MeasuredCard
from engine.planning.sheet_rates import sheet_rates

RTX_4090 = "NVIDIA GeForce RTX 4090"


def measured(card: str = RTX_4090, **changes: object) -> MeasuredCard:
    """Return a measurement of this machine's versions: an RTX 4090 with half the matmuls of its data sheet."""
    sheet = sheet_rates(CARDS["rtx4090"])
    slow = tuple((size, rate / 2) for size, rate in sheet.matmul_tflops.points)
    rates = replace(sheet, matmul_tflops=replace(sheet.matmul_tflops, points=slow), int8=sheet.of_int8)
    steps = {"8B keep 4x1000": {"measured_ms": 10.0, "predicted_ms": 11.0}}
    raw = {
        "copy GB/s": 900.0, "link to card GB/s": 25.0, "link to host GB/s": 24.0, "link both at once GB/s": 20.0,
        "launch us": 4.5,
    }  # fmt: skip
    found = MeasuredCard(CardStack.here(card), 23.6, "abc", "2026-11-27", 55.0, rates, raw, steps)
    return replace(found, **changes)


def keep(found: MeasuredCard) -> Path:
    """Write the measurement into the cache folder, as the command does; return the file."""
    from engine.planning.known_cards import stored_file

    path = stored_file(found.stack)
    path.parent.mkdir(parents=True, exist_ok=True)
    found.write(path)
    return path
