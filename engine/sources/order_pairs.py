"""Build `builtin:order-pairs`: order texts with a better and a worse answer, to learn preferences from.

The better answer gives three facts as JSON. The worse one says the same in a sentence, or has one
wrong fact in its JSON: another quantity, item or customer. In one of eight training pairs the labels
are the wrong way round, as people's sometimes are, so it matters how strongly they are learnt. Those
of evaluation pairs are right. The texts are those of `builtin:orders`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.sources import orders
from engine.system.shared_cache import build_once

NUM_TRAIN, NUM_EVAL = 400, 128
FACTS = ("customer", "item", "quantity")
FAULTS = ("quantity", "sentence", *FACTS)
SWAPPED = 8  # one in so many training pairs
SENTENCES = (
    "The customer is {customer}, who wants {quantity} {item}.",
    "{customer} ordered {quantity} {item}.",
    "Sure! It is about {quantity} {item} for {customer}.",
)


def ensure() -> tuple[Path, Path]:
    """Return train.jsonl and eval.jsonl, built on first use."""
    folder = build_once("order-pairs-v2", write)
    return folder / "train.jsonl", folder / "eval.jsonl"


def write(folder: Path) -> None:
    """Write train.jsonl and eval.jsonl into `folder`."""
    orders.write_parts(folder, {"train": rows("train", NUM_TRAIN), "eval": rows("eval", NUM_EVAL)})


def rows(part: str, count: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a part, in TRL's conversational preference format.

    fault: what is worse about `rejected`. swapped: True if the labels are the wrong way round.
    """
    for i, row in enumerate(orders.rows(part, count)):
        prompt, answer = row["messages"]
        facts = {name: row[name] for name in FACTS}
        fault = FAULTS[i % len(FAULTS)]
        worse = {"role": "assistant", "content": _worse(facts, fault, i // len(FAULTS))}
        swapped = part == "train" and i % SWAPPED == SWAPPED - 1
        chosen, rejected = (worse, answer) if swapped else (answer, worse)
        yield {"prompt": [prompt], "chosen": [chosen], "rejected": [rejected], "fault": fault, "swapped": swapped}


def _worse(facts: dict[str, Any], fault: str, turn: int) -> str:
    """Return an answer with that fault. turn: makes the faults of one kind differ."""
    if fault == "sentence":
        return SENTENCES[turn % len(SENTENCES)].format(**facts)
    if fault == "quantity":
        wrong: Any = facts[fault] + (1, -1, 10)[turn % 3]
    elif fault == "item":
        wrong = _next(orders.ITEMS, facts[fault], turn)
    else:
        first, _, last = facts[fault].partition(" ")
        wrong = f"{first} {_next(orders.LAST, last, turn)}"
    return json.dumps({**facts, fault: wrong}, ensure_ascii=False)


def _next(known: tuple[str, ...], right: str, turn: int) -> str:
    """Return one of the others."""
    return known[(known.index(right) + 1 + turn % (len(known) - 1)) % len(known)]
