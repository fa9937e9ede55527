"""Build `builtin:order-pairs`: order texts with a better and a worse answer, to learn preferences from.

The better answer gives three facts as JSON. The worse one says the same in a sentence, or has a number
in its JSON that stands elsewhere in the text or nowhere. The texts are those of `builtin:orders`.
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
SENTENCES = (
    "The customer is {customer}, who wants {quantity} {item}.",
    "{customer} ordered {quantity} {item}.",
    "Sure! It is about {quantity} {item} for {customer}.",
)


def ensure() -> tuple[Path, Path]:
    """Return train.jsonl and eval.jsonl, built on first use."""
    folder = build_once("order-pairs-v1", write)
    return folder / "train.jsonl", folder / "eval.jsonl"


def write(folder: Path) -> None:
    """Write train.jsonl and eval.jsonl into `folder`."""
    orders.write_parts(folder, {"train": rows("train", NUM_TRAIN), "eval": rows("eval", NUM_EVAL)})


def rows(part: str, count: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a part, in TRL's conversational preference format. fault: what is worse about `rejected`."""
    for i, row in enumerate(orders.rows(part, count)):
        prompt, answer = row["messages"]
        facts = {name: row[name] for name in FACTS}
        fault = "sentence" if i % 2 else "number"
        if fault == "sentence":
            worse = SENTENCES[i // 2 % len(SENTENCES)].format(**facts)
        else:
            worse = json.dumps({**facts, "quantity": facts["quantity"] + 1 + i % 7}, ensure_ascii=False)
        yield {"prompt": [prompt], "chosen": [answer], "rejected": [{"role": "assistant", "content": worse}], "fault": fault}
