"""Build `builtin:orders`: short order texts, each with three facts to extract as JSON.

It is a task with one right answer, so that a sweep can choose by exact_match. Numbers that are not
asked for stand in each text. Training and evaluation share words, but no customer. The files are
the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.system.shared_cache import build_once

NUM_TRAIN, NUM_EVAL = 800, 128
FIRST = ("Ada", "Bruno", "Carla", "Dmitri", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kavya", "Leo", "Mira", "Nils",
         "Olga", "Pablo", "Rosa", "Sven", "Tara", "Yusuf")  # fmt: skip
LAST = ("Arden", "Berg", "Costa", "Duarte", "Egger", "Fontaine", "Grau", "Holm", "Ito", "Jansen", "Keller", "Lund", "Moreau",
        "Novak", "Okafor", "Petit", "Rossi", "Silva", "Toth", "Weber")  # fmt: skip
CITIES = ("Bergen", "Cadiz", "Delft", "Ghent", "Graz", "Lyon", "Porto", "Turku")
ITEMS = ("lamps", "desk chairs", "water bottles", "notebooks", "blue vases", "wool blankets", "bread knives", "tea cups",
         "door mats", "candles", "bookshelves", "garden gloves")  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
TEXTS = (
    "Order {order}: {customer} from {city} would like {quantity} {item}, delivered by {day}.",
    "On {day} {customer} called from {city} about order {order} and asked for {quantity} {item}.",
    "Please send {quantity} {item} to {customer}, {city}. Reference {order}, paid on {day}.",
    "{customer} ({city}) returned {returned} {item} and ordered {quantity} new ones on {day}, number {order}.",
    "We promised {customer} in {city} {quantity} {item} for {price} euros each; order {order}, {day}.",
)
QUESTION = "{text}\n\nExtract customer, item and quantity as JSON."


def ensure() -> tuple[Path, Path]:
    """Return train.jsonl and eval.jsonl, built on first use."""
    folder = build_once("orders-v1", write)
    return folder / "train.jsonl", folder / "eval.jsonl"


def write(folder: Path) -> None:
    """Write train.jsonl and eval.jsonl into `folder`."""
    write_parts(folder, {"train": rows("train", NUM_TRAIN), "eval": rows("eval", NUM_EVAL)})


def write_parts(folder: Path, parts: dict[str, Iterator[dict[str, Any]]]) -> None:
    """Write NAME.jsonl into `folder` for each part. parts: name -> rows."""
    for name, rows_of_part in parts.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows_of_part)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def rows(part: str, count: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a part. Each has messages, and the facts as columns of their own."""
    for i in range(count):
        facts = {
            "customer": _customer(part, i),
            "item": _pick(ITEMS, part, i, "item"),
            "quantity": 2 + _number(part, i, "quantity") % 48,
        }
        others = {
            "order": 1000 + _number(part, i, "order") % 9000, "returned": 2 + _number(part, i, "returned") % 8,
            "price": 5 + _number(part, i, "price") % 90, "city": _pick(CITIES, part, i, "city"),
            "day": _pick(DAYS, part, i, "day"),
        }  # fmt: skip
        text = QUESTION.format(text=_pick(TEXTS, part, i, "text").format(**facts, **others))
        answer = json.dumps(facts, ensure_ascii=False)
        yield {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}], **facts}


def _customer(part: str, i: int) -> str:
    """Return a name. Every fourth pair of names is for evaluation alone."""
    names = [(f"{first} {last}", (a + b) % 4 == 0) for a, first in enumerate(FIRST) for b, last in enumerate(LAST)]
    return _pick([name for name, evaluates in names if evaluates == (part == "eval")], part, i, "customer")


def _pick(known: Sequence[str], *place: object) -> str:
    return known[_number(*place) % len(known)]


def _number(*place: object) -> int:
    """Return a number that depends on the place alone, on every machine and Python."""
    return int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:8], "little")
