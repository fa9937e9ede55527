"""Every causal-LM family of the installed transformers is trained rightly, or refused in one line.

`python -m tests.faults.test_model_families` prints the table, with the numbers of the last lines.
"""

from __future__ import annotations

import collections
import logging
import os

import pytest

from engine.errors import InputError, first_line
from tests.support.model_families import families, judge, kind

SLOW = {"blt"}  # its tiny model has 190 million weights

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]


def scan() -> dict[str, tuple[str, str]]:
    """Return kind and detail by family. A config class that cannot be made by default is left out."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    found = {}
    for family in families():
        if family in SLOW:
            continue
        try:
            verdict = judge(family)
        except Exception as error:  # the defaults of a config class need not be valid
            found[family] = ("no config", f"{type(error).__name__}: {first_line(error)}")
            continue
        detail = verdict.allowed if isinstance(verdict, InputError) else "; ".join(verdict.faults)
        found[family] = (kind(verdict), detail)
    return found


def test_every_family_is_right_or_refused():
    found = scan()
    count = collections.Counter(what for what, _ in found.values())
    right = sum(number for what, number in count.items() if "layers" in what)
    assert right >= 120, count
    assert count["no config"] <= 3, [family for family, (what, _) in found.items() if what == "no config"]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = scan()
    for family, (what, detail) in sorted(rows.items(), key=lambda row: (row[1][0], row[0])):
        print(f"{family:<28} {what:<70} {detail[:160]}")
    for what, number in collections.Counter(what for what, _ in rows.values()).most_common():
        print(f"{number:>4}  {what}")
