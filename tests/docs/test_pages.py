"""The pages of docs/ list every outcome, error field and decision; all they name exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from sweep.trials.record import Outcome
from tests.support import house
from tests.support.paths import ROOT

PAGES = sorted((ROOT / "docs").rglob("*.md"))
README = ROOT / "README.md"
DOCUMENTS = [*PAGES, README, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "dashboards/README.md"))]
WITH_ERROR_LINES = ("troubleshooting.md", "error-lines.md", "task-metrics.md", "several-data-sets.md", "preference-data.md")
TROUBLESHOOTING = "\n".join((ROOT / "docs" / page).read_text() for page in WITH_ERROR_LINES)
MAX_WORDS, MAX_README_WORDS = 1200, 700
UNLIMITED = ("measured.md", "models.md", "decisions/engine.md", "decisions/sweep.md")
DECISIONS = {"engine": 126, "sweep": 105}
PATH = re.compile(r"`((?:[a-z_0-9]+/)+[a-z_0-9]+\.(?:py|yaml))`")
FORMER = "engine/train.py"  # measured.md and the changelog mention old names


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def documents(pages):
    return pytest.mark.parametrize("page", pages, ids=[name_of(page) for page in pages])


def rows_for(word: str) -> list[str]:
    """Return the rows of the troubleshooting page whose first cell contains the word."""
    cells = [(line, line.split("|")[1]) for line in TROUBLESHOOTING.splitlines() if line.startswith("|")]
    return [line for line, first in cells if re.search(rf"(?<![\w.-]){re.escape(word)}(?![\w.-])", first)]


def error_fields() -> set[str]:
    """Return the fields that InputError names literally in the code.

    A file's inner keys count as the file.
    """
    fields = set()
    for file in [*(ROOT / "engine").rglob("*.py"), *(ROOT / "sweep").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "InputError" and node.args:
                field = getattr(node.args[0], "value", None)
                fields |= {field.split(":")[0]} if isinstance(field, str) else set()
    return fields


def missing_files(text: str) -> list[str]:
    """Return paths between backticks that exist neither at the top nor in one of the halves."""
    places = [ROOT, ROOT / "engine", ROOT / "sweep"]
    found = (path for path in PATH.findall(text) if path != FORMER)
    return [path for path in found if not any((place / path).is_file() for place in places)]


def dead_links(page: Path, text: str) -> list[str]:
    """Return relative links to no file, or to no numbered decision of a page."""
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = page if not path else (page.parent / path).resolve()
        if not file.exists() or (anchor.isdigit() and f'<a id="{anchor}"></a>' not in file.read_text()):
            dead.append(target)
    return dead


@pytest.mark.parametrize("outcome", Outcome)
def test_every_outcome_has_a_row_in_troubleshooting(outcome):
    assert len(rows_for(outcome.value)) == 1


def test_every_field_of_an_error_line_has_a_row_in_troubleshooting():
    fields = error_fields()
    assert len(fields) > 30
    assert [field for field in sorted(fields) if not rows_for(field)] == []
    assert rows_for("model.paths") == rows_for("COMPLETED") == []  # a missing entry is not found


@pytest.mark.parametrize("half", DECISIONS)
def test_every_decision_keeps_its_number(half):
    text = (ROOT / "docs" / "decisions" / f"{half}.md").read_text()
    anchored = [(int(anchor), int(shown)) for anchor, shown in re.findall(r'^### <a id="(\d+)"></a>(\d+)\. ', text, re.M)]
    assert sorted(anchored) == [(number, number) for number in range(1, DECISIONS[half] + 1)]


@documents(PAGES)
def test_a_page_is_short_enough_to_be_read(page):
    if not name_of(page).endswith(UNLIMITED):
        assert len(page.read_text().split()) <= MAX_WORDS


def test_the_readme_is_read_in_three_minutes():
    assert len(README.read_text().split()) <= MAX_README_WORDS


@documents(DOCUMENTS)
def test_files_and_links_of_a_document_exist(page):
    text = page.read_text()
    assert missing_files(text) == []
    gone = [path for path in house.missing_paths(ROOT, text) if path != FORMER]
    assert gone == [] or page.name == "CHANGELOG.md"
    assert dead_links(page, text) == []


def test_a_file_or_link_that_is_gone_fails_this_test():
    page = ROOT / "docs" / "architecture.md"
    assert missing_files("see `engine/no_such.py` and `training/loop.py`") == ["engine/no_such.py"]
    text = "`python tests/no_such.py 5`, `conf/model/*.yml`, `conf/*/tpe.yaml`, `sweep/study/`\n```\nls docs/none tests/\n```"
    assert house.missing_paths(ROOT, text) == ["tests/no_such.py", "conf/model/*.yml", "docs/none"]
    assert dead_links(page, "[a](no-such.md), [b](decisions/sweep.md#999), [c](decisions/sweep.md#25)") == [
        "no-such.md", "decisions/sweep.md#999"
    ]  # fmt: skip
