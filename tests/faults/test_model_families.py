"""Every family of the installed transformers that writes text is trained rightly, or refused in one line.

`python -m tests.faults.test_model_families` prints the table; `--table docs/models.md` writes it
as that page. Names of families after it restrict it.

On many cores, each process of N scans a part and keeps its rows: `--part I/N --rows FILE`. Then
`--read FILE... --table docs/models.md` makes the page of them.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import pytest

from engine.errors import InputError, first_line
from engine.model.guard import ALLOWED
from engine.system.limited_child import Bounded, TooCostly
from tests.support.model_families import families, judge, judge_export, kind, peft_difference

LIMIT_S, LIMIT_GIB = 300.0, 12.0  # of one family; most take 2 s
NOT_TRIED, NO_CONFIG, WRONG = "not tried", "no config", "wrong"

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]


@dataclass(frozen=True)
class Row:
    """Hold what the scan found out about a family. left_out: the layers without an adapter."""

    family: str
    kind: str
    left_out: tuple[str, ...] = ()
    detail: str = ""

    @property
    def trained(self) -> bool:
        return "layers" in self.kind


def scan(names: Iterable[str] | None = None) -> Iterator[Row]:
    """Yield a row for each family, each from a process of its own. No family blocks the others."""
    for family in names or families():
        with Bounded(_judged, LIMIT_S, LIMIT_GIB) as call:
            try:
                yield call(family)
            except TooCostly as costs:
                yield Row(family, NOT_TRIED, detail=str(costs))


def _judged(family: str) -> Row:
    """Return the row of a family. A config class whose defaults are not valid cannot be judged."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        verdict = judge(family)
    except Exception as error:  # the defaults of a config class need not be valid
        return Row(family, NO_CONFIG, detail=f"{type(error).__name__}: {first_line(error)}")
    if isinstance(verdict, InputError):
        return Row(family, kind(verdict), detail=verdict.allowed)
    try:
        verdict = judge_export(family, verdict)
    except InputError as error:
        return Row(family, "refused", detail=error.allowed)
    except (ValueError, AttributeError, KeyError) as error:
        return Row(family, NO_CONFIG, detail=f"no export checked: {type(error).__name__}: {first_line(error)}")
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["QLORA_SWEEP_CACHE"] = str(Path(folder) / "cache")
            gap = peft_difference(family, Path(folder))
    except InputError as error:
        return Row(family, "refused", detail=error.allowed)
    except Exception as error:  # whatever PEFT or model code raises
        return Row(family, WRONG, detail=f"{type(error).__name__}: {first_line(error)}")
    if gap is not None and not gap <= ALLOWED:
        return Row(family, WRONG, detail=f"its losses in PEFT differ by {gap:.2g} nats")
    left_out = (*verdict.without_gradient, *verdict.read_directly, *verdict.not_exported)
    return Row(family, kind(verdict), left_out, "; ".join(verdict.faults))


def page(rows: list[Row], version: str) -> str:
    """Return docs/models.md. version: of transformers."""
    lines = [HEAD.format(version=version, number=len(rows)), ""]
    lines += [f"- {number} {what}" for what, number in collections.Counter(_outcome(row) for row in rows).most_common()]
    lines += ["", "| family | layers | samples share rows | no adapter on, or why not |", "|---|---|---|---|"]
    return "\n".join([*lines, *map(_line, rows)]) + "\n"


HEAD = """# Models

What becomes of each family of transformers {version} that writes text, {number} in all. A family is
the `model_type` of config.json. Each was tried as `prepare` tries a model: on a tiny one with the
defaults of its config class. PEFT then read its exported adapter, with equal losses. Your
checkpoint's own config decides: `python -m sweep ... dry_run=true` says it before anything is paid
for.

- Fused layers are the fast path, and all that is predicted for a card rests on it. Own layers are
  those of transformers, with our quantised matmuls; `own attention` and `own logits` say what else
  is theirs, at its cost in memory.
- Where samples do not share rows, each has a row of its own.
- Families that read images or sound are trained in their text decoder.
- Experts are no linear layers: [mixtures](mixtures.md) says which of them have adapters.

This page is generated: `python -m tests.faults.test_model_families --table docs/models.md`."""


def _outcome(row: Row) -> str:
    if not row.trained:
        return row.kind
    return f"{_layers(row)}, {'shared rows' if _shares(row) else 'one sample a row'}"


def _layers(row: Row) -> str:
    parts = [part for part in re.split(r"; |, ", row.kind) if part != "one sample a row"]
    return ", ".join(part.replace("its own", "own").replace("the model's ", "") for part in parts)


def _shares(row: Row) -> bool:
    return "one sample a row" not in row.kind


def _line(row: Row) -> str:
    left = ", ".join(f"`{name}`" for name in _short(row.left_out))
    cells = [_layers(row), "yes" if _shares(row) else "no", left] if row.trained else [row.kind, "", _text(row.detail)]
    return f"| {row.family} | {' | '.join(cells)} |"


def _short(names: tuple[str, ...]) -> list[str]:
    """Return the parts for images and sound by name, and other layers by the last two parts of theirs."""
    towers = {next(part for part in name.split(".") if TOWER.search(part)) for name in names if TOWER.search(name)}
    rest = {".".join(name.replace(".*", "").split(".")[-2:]) for name in names if not TOWER.search(name)}
    return sorted(towers) + sorted(rest)


TOWER = re.compile(r"vision|visual|audio|image|speech|projector|connector|tower|embed_vision|qformer")


def _text(detail: str) -> str:
    shortened = detail if len(detail) <= 160 else detail[:157] + "..."
    return shortened.replace("|", "\\|").replace("<", "&lt;")


def test_every_family_is_right_or_refused():
    rows = list(scan())
    count = collections.Counter(row.kind for row in rows)
    assert sum(row.trained for row in rows) >= 200, count
    assert not [row for row in rows if row.kind in (WRONG, NOT_TRIED)]
    assert sum(row.kind == NO_CONFIG for row in rows) <= 12, [row for row in rows if row.kind == NO_CONFIG]


def scanned(names: Iterable[str], kept: Path | None, version: str) -> list[Row]:
    """Return the rows of these families, each written to `kept` as soon as it is known."""
    found, started = [], time.monotonic()
    for row in scan(names):
        found.append(row)
        print(f"{time.monotonic() - started:6.0f} s  {row.family}: {row.kind}", file=sys.stderr, flush=True)
        if kept:
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**asdict(row), "transformers": version}) + "\n")
    return found


def read_rows(files: Iterable[Path]) -> tuple[list[Row], str]:
    """Return the rows in these files by family, and their version of transformers. Raises ValueError if it is not one."""
    lines = [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    versions = {line.pop("transformers") for line in lines}
    if len(versions) != 1:
        raise ValueError(f"rows of one version of transformers are needed, not of {sorted(versions) or 'none'}")
    rows = {line["family"]: Row(**line | {"left_out": tuple(line["left_out"])}) for line in lines}
    return [rows[family] for family in sorted(rows)], versions.pop()


def _part(text: str) -> tuple[int, int]:
    number, _, parts = text.partition("/")
    if not (number.isdigit() and parts.isdigit() and int(number) < int(parts)):
        raise argparse.ArgumentTypeError("must be I/N with I from 0 to N - 1")
    return int(number), int(parts)


def main(arguments: list[str] | None = None) -> None:
    """Scan the families that are named, or all; print a line for each."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.test_model_families", description=__doc__)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--part", type=_part, default=(0, 1), metavar="I/N", help="scan one of N parts")
    parser.add_argument("--rows", type=Path, help="append each row to this file, as a line of JSON")
    parser.add_argument("--read", type=Path, nargs="+", help="take the rows of such files instead of scanning")
    parser.add_argument("--table", type=Path, help="write the rows as a page")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.read:
        found, version = read_rows(options.read)
    else:
        number, parts = options.part
        version = metadata.version("transformers")
        found = scanned((options.families or families())[number::parts], options.rows, version)
    for row in sorted(found, key=lambda row: (row.kind, row.family)):
        print(f"{row.family:<28} {row.kind:<70} {' '.join(_short(row.left_out))[:100]:<100} {row.detail[:200]}")
    for what, number in collections.Counter(row.kind for row in found).most_common():
        print(f"{number:>4}  {what}")
    if options.table:
        options.table.write_text(page(found, version), encoding="utf-8")


if __name__ == "__main__":
    main()
