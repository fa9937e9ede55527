"""The code keeps the house rules: size of rooms, unique names, imports in one direction."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import house
from tests.support.paths import ROOT

TOP_FILES = {".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "README.md", "constraints.txt", "pyproject.toml"}
SENTENCE = '"""This room holds things."""\n'
THREE = {f"engine/data/{name}.py": "" for name in ("readers", "tokens", "views")}
ROOM = {"engine/data/__init__.py": SENTENCE, **THREE}

# check -> files that break its rule, and what it reports
REFUSED: dict[Callable[[Path], list[str]], tuple[dict[str, str], list[str]]] = {
    house.crowded_or_empty: (
        {
            **{f"sweep/file{number}.py": "" for number in range(9)},
            **{f"sweep/study/file{number}.py": "" for number in range(13)},
            "engine/data/readers.py": "", "engine/data/tokens.py": "", "engine/data/__init__.py": SENTENCE,
        },
        ["engine/data: 2 files", "sweep: 9 files", "sweep/study: 13 files"],
    ),
    house.rooms_without_their_sentence: (
        {
            **ROOM,
            "engine/__init__.py": '__version__ = "1"\n',
            "engine/quant/__init__.py": "",
            "sweep/study/__init__.py": '"""This room holds things. And others."""\n',
            "sweep/ledger/__init__.py": f"{SENTENCE}from sweep.ledger import quota\n",
            "sweep/report/page.py": "",
        },
        ["engine/quant", "sweep/ledger", "sweep/report", "sweep/study"],
    ),
    house.repeated_file_names: (
        {**ROOM, "sweep/__main__.py": "", "engine/__main__.py": "", "sweep/study/views.py": ""},
        ["engine/data/views.py and sweep/study/views.py"],
    ),
    house.repeated_class_names: (
        {
            **ROOM,
            "engine/data/views.py": "class View:\n    class Inner: ...\n\n\nclass _Entry: ...\n",
            "sweep/study/a.py": "class _Entry: ...\n",
            "sweep/study/b.py": "class Inner: ...\n",
        },
        ["_Entry: engine/data/views.py and sweep/study/a.py"],
    ),
    house.tests_that_import_tests: (
        {
            "tests/support/trials.py": "",
            "tests/engine/test_a.py": "from tests.engine import test_b\n",
            "tests/engine/test_b.py": "from tests.support.trials import build\n",
            "tests/engine/test_c.py": "def test_x():\n    from tests.engine.test_b import build\n",
            "tests/faults/test_d.py": "from .test_e import x\nimport conftest\n",
        },
        ["tests/engine/test_a.py: test_b", "tests/engine/test_c.py: test_b", "tests/faults/test_d.py: test_e",
         "tests/faults/test_d.py: conftest"],
    ),
    house.tests_without_a_room: (
        {
            **ROOM, "engine/__init__.py": "", "sweep/__init__.py": "", "tests/test_flat.py": "",
            "tests/engine/test_trial.py": "", "tests/engine/data/test_views.py": "", "tests/engine/dta/test_views.py": "",
            "tests/docs/test_pages.py": "",
        },
        ["tests/test_flat.py", "tests/engine/dta"],
    ),
    house.import_circles: (
        {
            **ROOM,
            "engine/data/readers.py": "from engine.data import tokens\n",
            "engine/data/tokens.py": "try:\n    from engine.data.views import View\nexcept ImportError:\n    View = None\n",
            "engine/data/views.py": "from . import readers\n",
        },
        ["engine.data.readers -> engine.data.tokens -> engine.data.views -> engine.data.readers"],
    ),
}  # fmt: skip


def build(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.mark.parametrize("check", REFUSED, ids=lambda check: check.__name__)
def test_the_house_keeps_its_law(check):
    assert check(ROOT) == []


@pytest.mark.parametrize("check", REFUSED, ids=lambda check: check.__name__)
def test_a_house_that_does_not_is_refused(check, tmp_path):
    files, expected = REFUSED[check]
    found = [place.removesuffix("/__init__.py") for place in check(build(tmp_path, files))]
    assert sorted(found) == sorted(expected)


def test_a_house_like_this_one_is_taken(tmp_path):
    """Imports in functions and for type checkers alone make no circle."""
    later = "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from engine.data import views\n"
    files = {
        **ROOM, "engine/__init__.py": "", "engine/data/readers.py": "from engine.data import tokens\n",
        "engine/data/tokens.py": "def read():\n    from engine.data.readers import x\n", "engine/data/views.py": later,
        "tests/engine/data/test_views.py": "from engine.data.views import View\n",
    }  # fmt: skip
    assert {check.__name__: check(build(tmp_path, files)) for check in REFUSED} == {check.__name__: [] for check in REFUSED}


def test_no_stray_file_is_committed_at_the_top():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git checkout")
    assert {name for name in listed.stdout.splitlines() if "/" not in name} == TOP_FILES
