"""Name the tasks that searches are compared on, and write their samples.

Each task has training samples for about one pass of a trial's tokens, and 256 fixed evaluation
samples. They are made from Python's standard library or by a generator; nothing is downloaded.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.system.shared_cache import build_once
from tests.search.design import LENGTHS
from tests.search.library_text import Row, code_rows, dialogue_rows, doc_rows, key_of
from tests.search.made_requests import request_rows

VERSION = 1
NUM_EVALUATED = 256
LONGER = (*LENGTHS, 2048)


@dataclass(frozen=True)
class Task:
    """Describe a task. lengths: the values of data.max_seq_length; data: its further settings of the data section."""

    about: str
    rows: Callable[[], tuple[list[Row], list[Row]]]
    lengths: tuple[int, ...]
    data: dict[str, Any]


TASKS = {
    "docs": Task(
        "pages of the standard library's documentation as text; loss on all of it", doc_rows, LONGER, {"overlong": "split"}
    ),
    "code": Task("a function's head and documentation; loss on its body", code_rows, LENGTHS, {}),
    "requests": Task(
        "made requests: JSON, dates, units, tables, SQL, sorting; loss on the answer", request_rows, LENGTHS, {}
    ),
    "dialogue": Task("conversations about a module, of several turns; loss on all answers", dialogue_rows, LONGER, {}),
}
LATER = ("dialogue",)
"""Tasks that are recorded when the others are whole."""


def data_of(name: str) -> tuple[Path, Path]:
    """Return train.jsonl and eval.jsonl of a task, made on first use and kept in the cache."""
    folder = build_once(f"search-{name}-v{VERSION}-py{platform.python_version()}", lambda folder: write(folder, name))
    return folder / "train.jsonl", folder / "eval.jsonl"


def write(folder: Path, name: str) -> None:
    """Write a task's train.jsonl and eval.jsonl; the second has NUM_EVALUATED rows."""
    train, held_out = TASKS[name].rows()
    evaluated = sorted(held_out, key=lambda row: key_of(json.dumps(row)))[:NUM_EVALUATED]
    for part, rows in (("train", train), ("eval", evaluated)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
